"""YAML as people mean it: what the language allows but nobody wants is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tclib.support.declared import shown
from tclib.support.errors import InputError

MAX_NODES = 100_000  # with what aliases repeat counted each time


def read_yaml(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Errors: `InputError` for a file that cannot be read, is not UTF-8 or no YAML, holds anything else, names a
    key twice, has keys that are no names, tags of Python, or nests or repeats without end.
    """
    try:
        held = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(held, dict):
        found = "nothing" if held is None else shown(held)
        raise InputError(f"{path}: expected names and values, found {found}")
    return held


class _Loader(yaml.SafeLoader):
    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None and _size(node, {}) > MAX_NODES:
            raise yaml.YAMLError("its aliases repeat without end")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.YAMLError(f"key {key.value}: expected a name{key.start_mark}")
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} stands there twice{key.start_mark}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many nodes there are, those behind an alias wherever it stands; infinite within themselves."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
