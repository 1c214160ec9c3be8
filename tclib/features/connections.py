"""Input-invariant against input-dependent connections between features (paper Sections 3.3 and 5).

The pullback of a feature onto an earlier transcoder needs no input; its mean over a corpus, weighted by
activations, needs many. How far do the two agree on which earlier features matter? Both have the weights in
them, and so agree in part whatever the weights are: beside their overlap stands the same overlap with the
earlier decoder directions drawn at random, of the same norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.features.from_weights import activation_quantiles, mean_inputs, pullback
from tclib.models.language_model import LanguageModel
from tclib.support.statistics import top_k_overlap

OVERLAP_KS = (10, 20, 50)  # as in the paper's walkthrough
MIN_QUANTILE = 0.2  # tokens count where a feature exceeds this quantile of its positive activations


def compare_connections(
    lm: LanguageModel,
    later: Dictionary,
    features: Sequence[int],
    earlier: Dictionary | Sequence[Dictionary],
    rows: Int[Tensor, "row pos"],
    generator: torch.Generator,
) -> pd.DataFrame:
    """For each feature: top-k overlap of its pullback and its mean pullback on `rows`.

    Several earlier transcoders share the passes over the rows. Columns: layer, feature, earlier_layer,
    n_candidates (earlier features that are active on the same tokens), overlap_10, overlap_20, overlap_50
    (over all features, as in the paper; only k up to a tenth of the width), active_overlap_10 and so on
    (over the candidates), random_overlap_10, random_active_overlap_10 and so on (the same, decoder
    directions drawn by `generator`).
    """
    several = [earlier] if isinstance(earlier, Dictionary) else list(earlier)
    minima = activation_quantiles(lm, later, features, rows, MIN_QUANTILE)
    inputs = mean_inputs(lm, later, features, several, rows, minima)
    lines = []
    for one, of_one in zip(several, inputs, strict=True):
        drawn = random_directions(one.W_dec, generator)
        for feature, mean_input in zip(features, of_one, strict=True):
            reading = lm.final_norm.centre(later.encoder_direction(feature))
            line: dict[str, float] = {
                "layer": later.config.layer,
                "feature": feature,
                "earlier_layer": one.config.layer,
                "n_candidates": int((mean_input != 0).sum()),
            }
            line |= _overlaps("", pullback(lm, later, feature, one), mean_input)
            lines.append(line | _overlaps("random_", drawn @ reading, mean_input))
    return pd.DataFrame(lines)


def random_directions(
    rows: Float[Tensor, "row d_model"], generator: torch.Generator
) -> Float[Tensor, "row d_model"]:
    """Gaussian directions, each of the norm of its row."""
    drawn = torch.randn(rows.shape, generator=generator).to(rows)
    lengths: Tensor = rows.norm(dim=1) / drawn.norm(dim=1)
    return drawn * lengths[:, None]


def _overlaps(
    prefix: str, invariant: Float[Tensor, "n_features"], mean_input: Float[Tensor, "n_features"]
) -> dict[str, float]:
    """Overlap of the top of a pullback with that of pullback × mean input: of all features, of active ones."""
    mean, is_active = invariant * mean_input, mean_input != 0
    found = {}
    for k in (k for k in OVERLAP_KS if 10 * k <= len(mean)):
        found[f"{prefix}overlap_{k}"] = top_k_overlap(invariant, mean, k)
        among = (invariant[is_active], mean[is_active])
        found[f"{prefix}active_overlap_{k}"] = (
            top_k_overlap(*among, k) if k <= len(among[0]) else np.nan
        )
    return found
