"""Input-invariant against input-dependent connections between features (paper Sections 3.3 and 5).

The pullback of a feature onto an earlier transcoder needs no input; its mean over a corpus, weighted by
activations, needs many. How far do the two agree on which earlier features matter?
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tclib.dictionary import Dictionary
from tclib.features import (
    activation_quantiles,
    mean_pullbacks,
    pullback,
    spearman,
    top_k_overlap,
)
from tclib.lm import LanguageModel
from tclib.runs import InputError

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
        co_active = mean != 0
        ks = [k for k in OVERLAP_KS if 10 * k <= len(mean)]
        overlaps = {f"overlap_{k}": top_k_overlap(invariant, mean, k) for k in ks}
        active = (invariant[co_active], mean[co_active])
        overlaps |= {
            f"active_overlap_{k}": top_k_overlap(*active, k) if k <= len(active[0]) else np.nan
            for k in ks
        }
        lines.append(
            {
                "layer": later.config.layer,
                "feature": feature,
                "earlier_layer": earlier.config.layer,
                "n_candidates": int(co_active.sum()),
                "spearman": spearman(*active),
                **overlaps,
            }
        )
    return pd.DataFrame(lines)


def live_features(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Int[Tensor, "row pos"],
    n_features: int,
    generator: torch.Generator,
    min_log10_frequency: float = -4.0,
) -> list[int]:
    """Features drawn at random from those that fire on more than 10^min of the tokens, BOS left out.

    Errors: `InputError` if fewer than `n_features` are live.
    """
    site = dictionary.config.input_site
    n_fired = torch.zeros(dictionary.config.n_features, dtype=torch.float64, device=lm.device)
    n_tokens = 0
    for batch in rows.split(16):
        acts = lm.read(batch.long(), {site})[site][(batch != lm.bos_id).to(lm.device)]
        n_fired += (dictionary.encode(acts) > 0).sum(0)
        n_tokens += len(acts)
    live = (n_fired / n_tokens > 10.0**min_log10_frequency).nonzero()[:, 0].cpu()
    if len(live) < n_features:
        raise InputError(
            f"{n_features} live features asked for, but layer {dictionary.config.layer} has {len(live)}: "
            "ask for fewer, or give more rows"
        )
    chosen = torch.randperm(len(live), generator=generator)[:n_features]
    return sorted(live[chosen].tolist())
