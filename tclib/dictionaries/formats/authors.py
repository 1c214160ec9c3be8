"""The paper's own .pt files, read only."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import FLOATS, Tensors, entry, place_of
from tclib.support.errors import InputError, first_line
from tclib.support.foreign import pickled_names
from tclib.support.paths import check_file

NAMES = Tensors({"b_dec": "b_dec_out"})  # their b_dec is subtracted from the input


def read_authors(path: Path) -> Dictionary:
    """A transcoder of the paper, with its input bias folded: b_enc ← b_enc − b_dec W_enc.

    Errors: `InputError` for a pickle that names anything but tensors and plain values, a truncated file,
    missing or transposed tensors, or a configuration whose hooks are not one MLP's.
    """
    held = _loaded(path)
    if not isinstance(held, Mapping):
        raise InputError(f"{path} holds a {type(held).__name__}: expected cfg and state_dict")
    state, config = held.get("state_dict"), held.get("cfg")
    if not isinstance(state, Mapping) or not isinstance(config, _Configuration):
        raise InputError(f"{path}: expected cfg and state_dict, found {sorted(map(str, held))}")
    values = vars(config)
    if not values.get("is_transcoder", False):
        raise InputError(
            f"{path}: cfg.is_transcoder is not set, an autoencoder; expected a transcoder"
        )
    # Training cannot do without out_hook_point: a transcoder's file has it.
    hooks = {name: entry(values, name, str, path) for name in ("hook_point", "out_hook_point")}
    layer, basis = place_of(hooks["hook_point"], hooks["out_hook_point"], path)
    for name, hook in hooks.items():
        told = entry(values, f"{name}_layer", int, path, layer)
        if told != layer:
            raise InputError(
                f"{path}: {name} {hook!r} and {name}_layer {told} name different layers"
            )
    d_in, d_out, n_features = (
        entry(values, name, int, path) for name in ("d_in", "d_out", "d_sae")
    )
    model = entry(values, "model_name", str, path, "")
    own = DictionaryConfig("transcoder", layer, d_in, d_out, n_features, model=model, basis=basis)
    tensors = {n: _whole(path, tensor) for n, tensor in state.items() if isinstance(tensor, Tensor)}
    weights = NAMES.ours(path, tensors, own, {"b_dec": (d_in,)})
    weights["b_enc"] = weights["b_enc"] - tensors["b_dec"].float() @ weights["W_enc"]
    return Dictionary(own, **weights)


def read_authors_tensor(path: Path) -> Tensor:
    """A lone tensor, as the authors saved firing frequencies. Errors: `InputError` for anything else."""
    held = _loaded(path)
    if not isinstance(held, Tensor):
        raise InputError(f"{path} holds a {type(held).__name__}: expected one tensor")
    return _whole(path, held).float()


def _whole(path: Path, tensor: Tensor) -> Tensor:
    """A tensor that its file holds in full. Errors: `InputError` for one that repeats a few numbers."""
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise InputError(
            f"{path} declares a tensor of shape {tuple(tensor.shape)} and holds {held:,} bytes of it: "
            "expected all of its values"
        )
    return tensor


class _Configuration:
    """Takes the attributes of the authors' configuration, without their class."""


# What a file may name. torch's own reader of tensors and plain values knows more, some of which allocates what
# it is told to; the last two it does not know, and neither does anything here.
_CLASS = "sae_training.config.LanguageModelSAERunnerConfig"
_STORAGES = "BFloat16 Bool Double Float Half Int Long"
_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
    *(f"torch.{kind}Storage" for kind in _STORAGES.split()),
    *map(str, FLOATS),
    "__builtin__.str",
    _CLASS,
}
_INERT: list[Any] = [(_Configuration, _CLASS), (_Configuration, "builtins.str")]


def _reason(error: Exception) -> str:
    """What torch's reader did not like, without its advice, which is to run what the file says."""
    own = str(error).partition("WeightsUnpickler error: ")[2]
    return own.strip().split("\n")[0] or first_line(error)


def _loaded(path: Path) -> Any:
    check_file(path, "give a .pt of the authors")
    try:
        strangers = sorted(pickled_names(path) - _NAMES)
        with safe_globals(_INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it reads all the same, or refuses below
            held = None if strangers else torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is truncated or no torch file ({_reason(error)}): download it again"
        ) from error
    if strangers:
        raise InputError(
            f"{path} asks for {', '.join(strangers)} while it is read: a weights file holds tensors and "
            "plain values only, and nothing else is ever run; get it from a source that you trust"
        )
    return held
