"""Intervals, rank statistics and agreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from tclib.support.errors import InputError


def bootstrap_means(
    values: Float[np.ndarray, "row *columns"],
    generator: np.random.Generator,
    n_resamples: int = 2_000,
) -> Float[np.ndarray, "resample *columns"]:
    """Means over resampled rows. Rows, not tokens: tokens of one row are not independent."""
    n_rows = len(values)
    draws = (generator.integers(0, n_rows, n_rows) for _ in range(n_resamples))
    return np.stack([values[draw].mean(0) for draw in draws])


def interval(
    means: Float[np.ndarray, "resample *columns"], level: float = 0.95
) -> tuple[Float[np.ndarray | np.float64, "*columns"], Float[np.ndarray | np.float64, "*columns"]]:
    """Percentile interval over resamples: (low, high)."""
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return low, high


def to_numpy(values: Tensor) -> np.ndarray:
    """A tensor as float64 on the CPU, for tables."""
    return values.double().cpu().numpy()


def auroc(graded: Float[np.ndarray, "item"], positive: Bool[np.ndarray, "item"]) -> float:
    """Area under the ROC curve, ties counted half; 0.5 where one side is empty."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if n_positive == 0 or n_negative == 0:
        return 0.5
    ranks = pd.Series(graded).rank().to_numpy()
    below = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(below / (n_positive * n_negative))


def cohens_kappa(one: Sequence[str], other: Sequence[str]) -> float:
    """Agreement of two raters beyond chance; 1 is perfect, 0 is chance. NaN where chance is certain.

    Errors: `InputError` for lists of different lengths, or none.
    """
    if len(one) != len(other) or not one:
        raise InputError(
            f"{len(one)} and {len(other)} ratings: expected the same items, at least one"
        )
    kinds = sorted({*one, *other})
    observed = float(np.mean([a == b for a, b in zip(one, other, strict=True)]))
    n_pairs = len(one) * len(other)
    chance = sum(list(one).count(kind) * list(other).count(kind) for kind in kinds) / n_pairs
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def top_k_overlap(one: Float[Tensor, "item"], other: Float[Tensor, "item"], k: int) -> float:
    """Share of the k highest of one that are among the k highest of the other (paper: 30/25/14 %)."""
    if not 1 <= k <= len(one):
        raise InputError(f"k {k}: expected 1 to {len(one)}")
    tops = [set(scores.argsort(descending=True)[:k].tolist()) for scores in (one, other)]
    return len(tops[0] & tops[1]) / k


def spearman(one: Float[Tensor, "item"], other: Float[Tensor, "item"]) -> float:
    """Rank correlation; ties share their mean rank. NaN for fewer than three items."""
    if len(one) < 3:
        return float("nan")
    ranks = [pd.Series(to_numpy(scores)).rank().to_numpy() for scores in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
