"""What the readers and writers of other libraries' formats share: hooks, shapes, files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tclib.dictionaries.dictionary import Basis, Dictionary, DictionaryConfig
from tclib.dictionaries.kinds import Activation
from tclib.dictionaries.lazy import LazyDictionary, MappedRows
from tclib.support.declared import shown
from tclib.support.errors import InputError, listed
from tclib.support.foreign import check_header, read_json, read_yaml
from tclib.support.paths import check_file

T = TypeVar("T")
HOOK_IN: dict[Basis, str] = {
    "processed": "ln2.hook_normalized",
    "raw": "mlp.hook_in",
    "stream": "hook_resid_mid",
}
HOOK_OUT = "hook_mlp_out"
# The same where no norm stands behind the MLP, as in most families.
HOOKS_OUT = (HOOK_OUT, "mlp.hook_out")
NORM_BEHIND = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)
HASH = "tclib_model_hash"  # a key of ours, which the others' readers pass over
MATRICES = ("W_enc", "W_dec")  # what may stay in the file
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SAID: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    dict: "names and values",
    list: "a list",
}
JUMPS: tuple[Activation, ...] = ("relu", "jumprelu", "batch_topk")  # what a format without k holds


def place_of(hook_in: str, hook_out: str, where: Path, model: str = "") -> tuple[int, Basis]:
    """The layer and the basis of a transcoder between two hooks of TransformerLens.

    Errors: `InputError` unless it reads what the norm in front of an MLP gives, or takes, and writes what that
    MLP adds to the stream, which is not what a `model` with a norm behind its MLPs has at mlp.hook_out.
    """
    layer, basis = basis_of(hook_in, where)
    layer_out, name_out = _layer_and_name(hook_out, where)
    if name_out not in HOOKS_OUT:
        raise InputError(
            f"{where}: output hook {hook_out!r} is no MLP output: expected {' or '.join(HOOKS_OUT)}"
        )
    if name_out != HOOK_OUT and NORM_BEHIND.search(model):
        raise InputError(
            f"{where}: output hook {hook_out!r} of {model} stands in front of the norm behind the MLP, and what is "
            f"added to the stream behind it: expected {HOOK_OUT}"
        )
    if layer_out != layer:
        raise InputError(
            f"{where}: it reads layer {layer} ({hook_in}) and writes layer {layer_out} ({hook_out}): "
            "expected a transcoder of one layer's MLP"
        )
    return layer, basis


def basis_of(hook_in: str, where: Path) -> tuple[int, Basis]:
    """The layer and the basis of what is read at a hook. Errors: `InputError` unless an MLP reads there."""
    layer, name = _layer_and_name(hook_in, where)
    bases: dict[str, Basis] = {own: basis for basis, own in HOOK_IN.items()}
    bases["hook_mlp_in"] = "stream"  # a copy of it
    if name not in bases:
        raise InputError(
            f"{where}: hook {hook_in!r} is no MLP input: expected {' or '.join(bases)}"
        )
    return layer, bases[name]


def _layer_and_name(hook: str, where: Path) -> tuple[int, str]:
    found = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", hook)
    if found is None:
        raise InputError(f"{where}: hook {hook!r}; expected one like blocks.8.ln2.hook_normalized")
    return int(found[1]), found[2]


def entry(
    values: Mapping[str, Any], name: str, kind: type[T], where: Path, default: T | None = None
) -> T:
    """A value of a configuration; null is none. Errors: `InputError` if it is missing or of another type."""
    value = values.get(name)
    value = default if value is None else value
    if type(value) is not kind:
        # Its text is not shown: lists of a pickle may double themselves.
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{where}: {name} is {found}; expected {SAID[kind]}")
    if isinstance(value, int) and abs(value) >= 2**31:
        raise InputError(
            f"{where}: {name} has {value.bit_length()} bits; expected a width or a layer"
        )
    return value


def check_same(values: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    """Raise `InputError` for a value, where there is one, that would change the equations or the place."""
    for name, same in expected.items():
        found = values.get(name)
        if found is not None and (type(found) is not type(same) or found != same):
            raise InputError(f"{where}: {name} is {shown(found)}; only {same!r} can be read")


def check_exportable(
    dictionary: Dictionary, name: str, activations: tuple[Activation, ...]
) -> None:
    """Raise `InputError` for anything but a finite transcoder of one of the activations that `name` can hold."""
    dictionary.check_finite()
    config = dictionary.config
    if config.kind != "transcoder" or config.activation not in activations:
        raise InputError(
            f"{name} cannot hold a {config.activation} {config.kind}: expected a transcoder with "
            f"{' or '.join(activations)}"
        )


@dataclass(frozen=True)
class Tensors:
    """How a format keeps a dictionary's weights: where its names differ, and what it transposes."""

    names: Mapping[str, str] = field(default_factory=dict)  # ours: theirs
    transposed: frozenset[str] = frozenset()  # our names
    relu_first: bool = False  # a relu stands before the jump: a threshold below 0 does what 0 does

    def dictionary(
        self,
        where: Path,
        tensors: Mapping[str, Tensor],
        config: DictionaryConfig,
        lazy: bool = False,
    ) -> Dictionary:
        """The dictionary of `ours`; if `lazy`, its matrices stay in the file."""
        if not lazy:
            return Dictionary(config, **self.ours(where, tensors, config))
        self.check(where, tensors, config)
        found = self._read(tensors, [name for name in config.shapes() if name not in MATRICES])
        mapped = {
            name: MappedRows(where, tensors[self._their(name)], self._by_column(name))
            for name in MATRICES
        }
        return LazyDictionary(config, mapped["W_enc"], decoder=mapped["W_dec"], **found)

    def _their(self, name: str) -> str:
        return self.names.get(name, name)

    def _by_column(self, name: str) -> bool:
        """Whether a feature is a column of the file's matrix."""
        return (name == "W_enc") != (name in self.transposed)

    def check(
        self,
        where: Path,
        tensors: Mapping[str, Tensor],
        config: DictionaryConfig,
        besides: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Raise `InputError` unless exactly the weights of `config` (and those of `besides`) are there."""
        expected = {
            self._their(name): shape[::-1] if name in self.transposed else shape
            for name, shape in config.shapes().items()
        }
        _check_tensors(where, tensors, {**expected, **(besides or {})})

    def ours(
        self,
        where: Path,
        tensors: Mapping[str, Tensor],
        config: DictionaryConfig,
        besides: Mapping[str, tuple[int, ...]] | None = None,
    ) -> dict[str, Tensor]:
        """The weights that `config` expects, by our names, in float32.

        Errors: `InputError` unless exactly they (and those of shapes `besides`) are there, in their
        shapes, as floating point.
        """
        self.check(where, tensors, config, besides)
        return self._read(tensors, config.shapes())

    def _read(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        found = {name: tensors[self._their(name)] for name in names}
        ours = {n: (t.T if n in self.transposed else t).float() for n, t in found.items()}
        if self.relu_first and "threshold" in ours:
            ours["threshold"] = ours["threshold"].clamp_min(0.0)
        return ours

    def save(self, dictionary: Dictionary, path: Path) -> None:
        """Write the weights by the format's names, in float32, as safetensors."""
        weights = {
            self.names.get(name, name): weight.T if name in self.transposed else weight
            for name, weight in dictionary.parameters().items()
        }
        save_file({n: w.float().contiguous().cpu() for n, w in weights.items()}, path)


def _check_tensors(
    where: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing, extra = listed(set(shapes) - set(tensors)), listed(set(tensors) - set(shapes))
    if missing or extra:
        raise InputError(f"{where}: tensors missing [{missing}], not expected [{extra}]")
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        if found != shape:
            hint = " (transposed?)" if found == shape[::-1] else ""
            raise InputError(f"{where}: {name} has shape {found}{hint}, expected {shape}")
        if tensors[name].dtype not in FLOATS:
            raise InputError(f"{where}: {name} is {tensors[name].dtype}, expected floating point")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Errors: `InputError` if it is missing or damaged."""
    check_file(path, "expected the weights there")
    try:
        check_header(path)
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object, or a YAML mapping. Errors: `InputError` for anything else."""
    held = (read_json if path.suffix == ".json" else read_yaml)(path)
    if not isinstance(held, dict):
        raise InputError(f"{path} holds a {type(held).__name__}: expected names and values")
    return held
