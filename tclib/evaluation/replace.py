"""Context managers that change what an MLP returns, and put everything back afterwards.

All of them act on every position, BOS included, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError


@contextmanager
def replace_mlp(
    lm: LanguageModel, dictionary: Dictionary, kept_features: Int[Tensor, "kept"] | None = None
) -> Iterator[None]:
    """Put a transcoder in the MLP's place, or an SAE's reconstruction in the output's.

    With `kept_features`, all others are zero-ablated; biases and skip connection stay. An SAE on
    mlp_in cannot stand in for an MLP: `InputError`.
    """
    dictionary.check_model(lm)
    if dictionary.config.kind == "sae_mlp_in":
        raise InputError(
            "an sae_mlp_in reconstructs the MLP's input and cannot replace its output: "
            "use replace_mlp_input"
        )

    def override(mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
        return _reconstruct(dictionary, _input_of(dictionary, mlp_in, mlp_out), kept_features)

    with lm.override_mlp(dictionary.config.layer, override):
        yield


@contextmanager
def replace_mlp_input(lm: LanguageModel, dictionary: Dictionary) -> Iterator[None]:
    """Run the MLP of the SAE's layer on the SAE's reconstruction of its input."""
    dictionary.check_model(lm)
    if dictionary.config.kind != "sae_mlp_in":
        raise InputError(
            f"a {dictionary.config.kind} does not reconstruct the MLP's input: use replace_mlp"
        )
    with lm.override_mlp_input(dictionary.config.layer, lambda x: dictionary(x).reconstruction):
        yield


@contextmanager
def replace_site(lm: LanguageModel, dictionary: Dictionary) -> Iterator[None]:
    """Replace whatever the dictionary reconstructs: the MLP's output, or its input."""
    replace = replace_mlp_input if dictionary.config.kind == "sae_mlp_in" else replace_mlp
    with replace(lm, dictionary):
        yield


@contextmanager
def set_mlp_out(
    lm: LanguageModel, layer: int, value: Float[Tensor, "d_model"] | None = None
) -> Iterator[None]:
    """The MLP's output becomes `value` everywhere: its mean (mean ablation), or zero by default."""

    def override(_mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
        if value is None:
            return torch.zeros_like(mlp_out)
        return value.to(mlp_out).expand_as(mlp_out)

    with lm.override_mlp(layer, override):
        yield


def _input_of(dictionary: Dictionary, mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
    return mlp_out if dictionary.config.kind == "sae_mlp_out" else mlp_in


def _reconstruct(dictionary: Dictionary, x: Tensor, kept: Tensor | None) -> Tensor:
    feature_acts = dictionary.encode(x)
    if kept is not None:
        masked = torch.zeros_like(feature_acts)
        masked[..., kept] = feature_acts[..., kept]
        feature_acts = masked
    return dictionary.decode(feature_acts, x)
