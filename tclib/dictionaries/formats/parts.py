"""What the readers and writers of other libraries' formats share: hooks, shapes, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.support.errors import InputError

HOOK_IN, HOOK_OUT = "blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.hook_mlp_out"


def layer_of(hook: str, where: Path) -> int:
    """The layer that a hook name speaks of. Errors: `InputError` for one that is no MLP input."""
    parts = hook.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise InputError(f"{where}: hook {hook!r}; expected one like blocks.8.ln2.hook_normalized")
    basis_of(hook)
    return int(parts[1])


def basis_of(hook: str) -> Literal["processed", "raw"]:
    """The basis of the activations at a hook. Errors: `InputError` for one that is no MLP input."""
    if hook.endswith("ln2.hook_normalized"):
        return "processed"
    if hook.endswith(("hook_mlp_in", "mlp.hook_in")):
        return "raw"
    raise InputError(f"hook {hook!r} is no MLP input: expected ln2.hook_normalized or mlp.hook_in")


def check_exportable(dictionary: Dictionary, name: str, activations: tuple[str, ...]) -> None:
    """Raise `InputError` for anything but a transcoder of one of the activations that `name` can hold."""
    config = dictionary.config
    if config.kind != "transcoder" or config.activation not in activations:
        raise InputError(
            f"{name} cannot hold a {config.activation} {config.kind}: expected a transcoder with "
            f"{' or '.join(activations)}"
        )


def check_tensors(
    where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `InputError` unless exactly the tensors of `shapes` are there, as floating point."""
    missing, extra = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or extra:
        raise InputError(f"{where}: tensors missing {missing}, not expected {extra}")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            hint = " (transposed?)" if found == shape[::-1] else ""
            raise InputError(f"{where}: {name} has shape {found}{hint}, expected {shape}")
        if not tensors[name].is_floating_point():
            raise InputError(f"{where}: {name} is {tensors[name].dtype}, expected floating point")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file in float32. Errors: `InputError` if missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path} is missing: expected the weights there")
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Errors: `InputError` for anything else."""
    return _read_config(path, json.loads)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Errors: `InputError` for anything else."""
    return _read_config(path, yaml.safe_load)


def _read_config(path: Path, parse: Any) -> dict[str, Any]:
    try:
        held = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected the configuration there"
        ) from error
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__}: expected names and values")
    return held


def for_saving(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them."""
    return {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}
