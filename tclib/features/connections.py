"""Input-invariant against input-dependent connections between features (paper Sections 3.3 and 5).

The pullback of a feature onto an earlier transcoder needs no input; its mean over a corpus, weighted by
activations, needs many. How far do the two agree on which earlier features matter?
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.features.from_weights import activation_quantiles, mean_pullbacks, pullback
from tclib.models.language_model import LanguageModel
from tclib.support.statistics import spearman, top_k_overlap

OVERLAP_KS = (10, 20, 50)  # as in the paper's walkthrough
MIN_QUANTILE = 0.2  # tokens count where a feature exceeds this quantile of its positive activations


def compare_connections(
    lm: LanguageModel,
    later: Dictionary,
    features: Sequence[int],
    earlier: Dictionary,
    rows: Int[Tensor, "row pos"],
) -> pd.DataFrame:
    """For each feature: Spearman and top-k overlap of its pullback and its mean pullback on `rows`.

    Columns: layer, feature, earlier_layer, n_candidates (earlier features that are active on the same
    tokens), spearman (over those), overlap_10, overlap_20, overlap_50 (over all features, as in the
    paper; only k up to a tenth of the width), active_overlap_10 and so on (over the candidates).
    """
    minima = activation_quantiles(lm, later, features, rows, MIN_QUANTILE)
    means = mean_pullbacks(lm, later, features, earlier, rows, minima)
    lines = []
    for feature, mean in zip(features, means, strict=True):
        invariant = pullback(lm, later, feature, earlier)
        active = (invariant[mean != 0], mean[mean != 0])
        n_active = len(active[0])
        line = {
            "layer": later.config.layer,
            "feature": feature,
            "earlier_layer": earlier.config.layer,
            "n_candidates": n_active,
            "spearman": spearman(*active),
        }
        ks = [k for k in OVERLAP_KS if 10 * k <= len(mean)]
        line |= {f"overlap_{k}": top_k_overlap(invariant, mean, k) for k in ks}
        for k in ks:
            line[f"active_overlap_{k}"] = top_k_overlap(*active, k) if k <= n_active else np.nan
        lines.append(line)
    return pd.DataFrame(lines)
