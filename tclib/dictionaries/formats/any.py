"""Any known format, recognised by its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.authors import read_authors
from tclib.dictionaries.formats.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from tclib.dictionaries.formats.gemma_scope import NPZ, SAFETENSORS, read_gemma_scope
from tclib.dictionaries.formats.llama_scope import is_llama_scope, read_llama_scope
from tclib.dictionaries.formats.saelens import read_saelens, write_saelens
from tclib.dictionaries.formats.sparsify import read_sparsify, write_sparsify
from tclib.support.checked import checked
from tclib.support.declared import Natural
from tclib.support.errors import InputError
from tclib.support.paths import expanded

Format = Literal[
    "tclib", "saelens", "circuit-tracer", "sparsify", "authors", "gemma-scope", "llama-scope"
]
FORMATS: tuple[Format, ...] = get_args(Format)


GIVE = "give its folder"
# Files of others that are no dictionary by themselves: what they are, and what to do.
PARTS = {
    r"sae_weights\.safetensors": f"it is the weights of a SAELens folder: {GIVE}",
    r"sae\.safetensors": f"it is the weights of a sparsify folder: {GIVE}",
    r"layer_\d+\.safetensors": f"it is one layer of a circuit-tracer set: {GIVE}, with config.yaml in it",
    r"W_(enc|dec)_\d+\.safetensors": "it is a part of a cross-layer transcoder, which tclib does not read",
}

NOTHING_KNOWN = (
    "no known dictionary; expected a .safetensors of tclib, a .pt of the authors, or a folder of SAELens "
    "(sae_weights.safetensors), sparsify (sae.safetensors), circuit-tracer (config.yaml), Gemma Scope (params.npz) or "
    "Llama Scope (hyperparams.json)"
)


class Found(NamedTuple):
    """What lies at a path: its format, and the dictionaries by layer."""

    format: Format
    dictionaries: dict[int, Dictionary]


def read_any(path: Path, layer: int | None = None, lazy: bool = False) -> Found:
    """Recognise a format by its files and read it; of a set only `layer`, if one is given.

    `lazy` as in `load_published`, where the format allows it. Errors: `InputError` if none is recognised.
    """
    kind: Format
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    part = next((what for name, what in PARTS.items() if re.fullmatch(name, path.name)), None)
    if path.suffix == ".pt":
        kind, one = "authors", read_authors(path)
    elif path.name in (NPZ, SAFETENSORS) or any((path / n).is_file() for n in (NPZ, SAFETENSORS)):
        kind, one = "gemma-scope", read_gemma_scope(path, lazy)
    elif path.suffix == ".safetensors" and path.is_file():
        remedy = part or "restore it, or train it again; of another library give the whole folder"
        kind, one = "tclib", Dictionary.load(path, remedy)
    elif is_llama_scope(path):
        kind, one = "llama-scope", read_llama_scope(path)
    elif (path / "sae_weights.safetensors").is_file():
        kind, one = "saelens", read_saelens(path, lazy)
    elif (path / "sae.safetensors").is_file():
        kind, one = "sparsify", read_sparsify(path, lazy)
    elif (path / "config.yaml").is_file():
        layers = None if layer is None else [layer]
        return Found("circuit-tracer", read_circuit_tracer(path, layers, lazy))
    else:
        raise InputError(f"{path}: {part or NOTHING_KNOWN}")
    return Found(kind, {one.config.layer: one})


@checked
def load_dictionary(
    path: str | Path, layer: Natural | None = None, lazy: bool = False
) -> Dictionary:
    """The dictionary at a path, of any known format; of several the one of `layer`, whose file alone is read.

    `lazy`: its matrices stay in the file, where the format allows it (`load_published`).

    Errors: `InputError` if no format is recognised, or which one is meant cannot be told.
    """
    found = read_any(expanded(path), layer, lazy).dictionaries
    if layer is None and len(found) == 1:
        (layer,) = found
    if layer not in found:
        raise InputError(f"{path} holds layers {sorted(found)}: give one of them, not {layer}")
    return found[layer]


def write_any(dictionaries: Mapping[int, Dictionary], out: Path, kind: Format) -> None:
    """Write in a format. Errors: `InputError` for one that holds a single dictionary, or is read only."""
    if kind == "circuit-tracer":
        write_circuit_tracer(dictionaries, out)
        return
    if kind in ("authors", "gemma-scope", "llama-scope"):
        why = "a pickle is never written" if kind == "authors" else "it is their release's own"
        raise InputError(f"{kind} is read only: {why}; choose another format")
    if len(dictionaries) != 1:
        raise InputError(
            f"{kind} holds one dictionary, not layers {sorted(dictionaries)}: one at a time"
        )
    (one,) = dictionaries.values()
    if kind == "saelens":
        write_saelens(one, out)
    elif kind == "sparsify":
        write_sparsify(one, out)
    else:
        one.save(out)
