"""Context managers that change what an MLP returns, and put everything back afterwards.

All of them act on every position, BOS included, as in the paper.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.errors import InputError


@checked
def replace_mlp(
    lm: LanguageModel, dictionary: Dictionary, kept_features: Int[Tensor, "kept"] | None = None
) -> AbstractContextManager[None]:
    """Put a transcoder in the MLP's place, or an SAE's reconstruction in the output's.

    With `kept_features`, all others are zero-ablated; biases and skip connection stay. An SAE on
    mlp_in cannot stand in for an MLP: `InputError`.
    """
    dictionary.check_model(lm)
    if kept_features is not None and len(kept_features):
        dictionary.check_features(*kept_features.tolist())
    if dictionary.config.kind == "sae_mlp_in":
        raise InputError(
            "an sae_mlp_in reconstructs the MLP's input and cannot replace its output: "
            "use replace_mlp_input"
        )

    def reconstructed(x: Tensor) -> Tensor:
        feature_acts = dictionary.encode(x)
        if kept_features is not None:
            masked = torch.zeros_like(feature_acts)
            masked[..., kept_features] = feature_acts[..., kept_features]
            feature_acts = masked
        return dictionary.decode(feature_acts, x)

    layer = dictionary.config.layer
    if dictionary.config.kind == "sae_mlp_out":
        return lm.override_mlp(layer, lambda _mlp_in, mlp_out: reconstructed(mlp_out))
    return lm.stand_in_for_mlp(layer, reconstructed, dictionary.config.reads_stream)


def replace_mlp_input(lm: LanguageModel, dictionary: Dictionary) -> AbstractContextManager[None]:
    """Run the MLP of the SAE's layer on the SAE's reconstruction of its input."""
    dictionary.check_model(lm)
    if dictionary.config.kind != "sae_mlp_in":
        raise InputError(
            f"a {dictionary.config.kind} does not reconstruct the MLP's input: use replace_mlp"
        )
    return lm.override_mlp_input(dictionary.config.layer, lambda x: dictionary(x).reconstruction)


def replace_site(lm: LanguageModel, dictionary: Dictionary) -> AbstractContextManager[None]:
    """Replace whatever the dictionary reconstructs: the MLP's output, or its input."""
    replace = replace_mlp_input if dictionary.config.kind == "sae_mlp_in" else replace_mlp
    return replace(lm, dictionary)


def set_mlp_out(
    lm: LanguageModel, layer: int, value: Float[Tensor, "d_model"] | None = None
) -> AbstractContextManager[None]:
    """The MLP's output becomes `value` everywhere: its mean (mean ablation), or zero by default."""

    def constant(mlp_in: Tensor) -> Tensor:
        if value is None:
            return torch.zeros_like(mlp_in)
        return value.to(mlp_in).expand_as(mlp_in)

    return lm.stand_in_for_mlp(layer, constant)
