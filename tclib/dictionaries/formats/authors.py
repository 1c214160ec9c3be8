"""The paper's own .pt files, read only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import Tensors, entry, place_of
from tclib.models.locate import first_line
from tclib.support.errors import InputError

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
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    weights = NAMES.ours(path, tensors, own, {"b_dec": (d_in,)})
    weights["b_enc"] = weights["b_enc"] - tensors["b_dec"] @ weights["W_enc"]
    return Dictionary(own, **weights)


def read_authors_tensor(path: Path) -> Tensor:
    """A lone tensor, as the authors saved firing frequencies. Errors: `InputError` for anything else."""
    held = _loaded(path)
    if not isinstance(held, Tensor):
        raise InputError(f"{path} holds a {type(held).__name__}: expected one tensor")
    return held.float()


class _Configuration:
    """Takes the attributes of the authors' configuration, without their class."""


# torch's own reader of tensors and plain values knows these besides; it runs nothing that is not named.
_KNOWN: list[Any] = [(_Configuration, "sae_training.config.LanguageModelSAERunnerConfig"), str]


def _loaded(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_globals(_KNOWN):
            strangers = sorted(get_unsafe_globals_in_checkpoint(path))
            held = None if strangers else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} is truncated or no torch file ({first_line(error)}): download it again"
        ) from error
    if strangers:
        raise InputError(
            f"{path} asks for {', '.join(strangers)} while it is read: a weights file holds tensors and "
            "plain values only, and nothing else is ever run; get it from a source that you trust"
        )
    return held
