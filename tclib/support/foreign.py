"""What a file from elsewhere may ask of its reader, looked at before it is read.

A few kilobytes can ask for gigabytes or hours: archives that inflate, references that double what they name,
headers longer than any library writes. Limits are far above what real files hold.
"""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tclib.support.errors import InputError
from tclib.support.paths import check_file

MAX_TEXT = 100_000  # bytes of a configuration, and of a pickle, whose tensors lie beside it
MAX_HEADER = 1_000_000  # bytes of a safetensors header
MAX_SCALAR = 3_000  # characters of one value in YAML: longer numbers have no decimal form in Python
MAX_DEPTH = 50  # lists within lists
MAX_WRITTEN_OUT = 1_000_000  # characters and values, with what references name in their place


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Errors: `InputError` if it cannot be read, is larger than 100 kB or nested deeper than 50.
    """
    return parse_json(_text(path, "JSON"), path)


def parse_json(text: str, where: Path) -> Any:
    """What a text in JSON says. Errors: `InputError` for another text, or one nested deeper than 50."""
    try:
        held = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {_line(error)}") from error
    level, n_levels = [held], 0
    while level := [inner for value in level for inner in _inside(value)]:
        n_levels += 1
        _Value().hold([_Value(depth=n_levels)], where)
    return held


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which lets the last of two equal names win, in silence."""
    held = dict(pairs)
    if len(held) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in held if names.count(name) > 1)
        raise ValueError(f"{twice[:60]} stands there twice")
    return held


def _inside(value: Any) -> Iterable[Any]:
    held = value.values() if isinstance(value, dict) else value
    return held if isinstance(value, dict | list) else ()


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, in plain values.

    Errors: `InputError` if it cannot be read, is larger than 100 kB or nested deeper than 50, if one value
    has more than 3,000 characters, or if all come to more than a million with aliases written out; if a key
    stands twice, or is no name.
    """
    text = _text(path, "YAML")
    try:
        _check_aliases(text, path)
        return yaml.load(text, _Strict)
    except InputError:
        raise
    except Exception as error:  # values that look like a date or a number raise all kinds
        raise InputError(f"{path} is not YAML: {_line(error)}") from error


class _Strict(yaml.SafeLoader):
    """YAML as people mean it: the language lets the last of two equal keys win, in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.YAMLError(f"key {key.value}: expected a name{key.start_mark}")
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value} stands there twice{key.start_mark}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _text(path: Path, language: str) -> str:
    check_file(path, f"give a file in {language}")
    try:
        with open(path, "rb") as file:
            held = file.read(MAX_TEXT + 1)
        if len(held) > MAX_TEXT:
            raise InputError(f"{path} has more than {MAX_TEXT:,} bytes: expected a short text file")
        return held.decode()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_line(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not {language}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_header(path: Path) -> None:
    """Raise `InputError` for a safetensors file whose header is longer than any library writes.

    What the header declares is held against the file by safetensors itself, which allocates nothing
    before.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise InputError(
            f"{path} declares a header of {length:,} bytes: expected at most {MAX_HEADER:,}; it is damaged, or "
            "no safetensors file"
        )


def pickled_names(path: Path) -> set[str]:
    """The functions and classes that a file of `torch.save` asks for, as module.name.

    Errors: `InputError` if it inflates, or its pickle is larger than 100 kB, nested deeper than 50 or, with
    what references name written out, more than a million values and characters; anything at all for
    what is no such file.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        inflated = sum(member.file_size for member in members)
        # The sizes are the file's own word, which the reader of a compressed member does not go by.
        if inflated > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError(
                f"{path} has {size:,} bytes, and would unpack to {inflated:,} or more: torch.save compresses "
                "nothing, so that no file of weights grows; do not use it"
            )
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if archive.getinfo(name).file_size > MAX_TEXT:
            raise InputError(
                f"{path} holds a pickle of more than {MAX_TEXT:,} bytes: expected a few names and numbers"
            )
        return _check_pickle(archive.read(name), path)


# ---------------------------------------------------------------------------------------------
# References, written out


@dataclass
class _Value:
    """A value of a file that is looked at, not made; infinite while it is not yet whole."""

    size: float = 1
    depth: int = 0

    def hold(self, values: Iterable[_Value], where: Path) -> None:
        """Take other values in. Errors: `InputError` beyond what may be read."""
        for value in values:
            self.size += value.size
            self.depth = max(self.depth, 1 + value.depth)
        if self.depth > MAX_DEPTH:
            raise InputError(
                f"{where} holds values nested more than {MAX_DEPTH} deep: no library writes that; do not use it"
            )
        if self.size > MAX_WRITTEN_OUT:
            raise InputError(
                f"{where} holds values whose references, written out, are more than {MAX_WRITTEN_OUT:,} values "
                "and characters: no library writes that; do not use it"
            )


def _check_aliases(text: str, where: Path) -> None:
    anchored: dict[str | None, _Value] = {}
    opened: list[tuple[str | None, _Value]] = [(None, _Value())]
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            anchored[event.anchor] = _Value(math.inf)
            _Value().hold([_Value(depth=len(opened))], where)
            opened.append((event.anchor, _Value()))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, found = opened.pop()
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_SCALAR:
                raise InputError(
                    f"{where} holds a value of {len(event.value):,} characters: expected at most {MAX_SCALAR:,}"
                )
            anchor, found = event.anchor, _Value(1 + len(event.value))
        elif isinstance(event, yaml.AliasEvent):
            anchor, found = None, anchored.get(event.anchor, _Value())
        else:
            continue
        anchored[anchor] = found
        opened[-1][1].hold([found], where)


# What these put into the value below, that value holds from then on.
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
_MARK = _Value()


def _check_pickle(pickled: bytes, where: Path) -> set[str]:
    """The names in a pickle, by a walk through its instructions: nothing of it is made."""
    names: set[str] = set()
    stack: list[_Value] = []
    memo: dict[Any, _Value] = {}
    for instruction, argument, _ in pickletools.genops(pickled):
        name = instruction.name
        if name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        else:
            if name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
            taken = _taken(stack, instruction.stack_before)
            made = taken.pop(0) if name in _FILLS else _Value()
            text = argument if isinstance(argument, str | bytes) else ""
            made.hold([*taken, *([_Value(len(text))] if text else [])], where)
            stack += [made] * len(instruction.stack_after)
    return names


def _taken(stack: list[_Value], pattern: list[Any]) -> list[_Value]:
    """Take from the stack what an instruction takes, down to the last mark if it asks for that."""
    start = len(stack) - len(pattern)
    if pickletools.markobject in pattern:
        mark = max(i for i, value in enumerate(stack) if value is _MARK)
        start = mark - pattern.index(pickletools.markobject)
    taken = [value for value in stack[start:] if value is not _MARK]
    del stack[start:]
    return taken
