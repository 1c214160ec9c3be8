"""Intervals, rank statistics and agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.support.errors import InputError

Z_95 = 1.959963984540054
# Student's t, 97.5 %, by degrees of freedom.
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
TIE = 1e-5  # of a value: sums of float32 in another order differ by less


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


def student_interval(values: Float[np.ndarray, "run"]) -> tuple[float, float, float]:
    """The mean of a few independent runs with its 95 % interval: (mean, low, high).

    Beyond ten runs the normal quantile stands for Student's. Errors: `InputError` for fewer than two.
    """
    if len(values) < 2:
        raise InputError(f"{len(values)} runs: expected two or more, for an interval over them")
    mean = float(values.mean())
    half = T_95.get(len(values) - 1, Z_95) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def ratio_interval(
    part: Float[np.ndarray, "item"],
    whole: Float[np.ndarray, "item"],
    generator: np.random.Generator,
) -> tuple[float, float, float]:
    """mean(part) / mean(whole) with a 95 % interval over resampled items, paired: (value, low, high)."""
    means = bootstrap_means(np.stack([part, whole], axis=-1), generator)
    low, high = interval(means[:, 0] / means[:, 1])
    return float(part.mean() / whole.mean()), float(low), float(high)


def wilson_interval(n_hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): (low, high); (0, 1) for none."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = n_hits / n, Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def newcombe_interval(n_hits: int, n: int, n_other_hits: int, n_other: int) -> tuple[float, float]:
    """95 % interval of the difference of two independent shares (Newcombe 1998, method 10): (low, high)."""
    one, other = n_hits / n, n_other_hits / n_other
    (low, high), (low_other, high_other) = (
        wilson_interval(n_hits, n),
        wilson_interval(n_other_hits, n_other),
    )
    below = math.hypot(one - low, high_other - other)
    above = math.hypot(high - one, other - low_other)
    return one - other - below, one - other + above


def fisher_p(n_hits: int, n: int, n_other_hits: int, n_other: int) -> float:
    """Fisher's exact test, two-sided, of two shares: the chance of a table as unlikely as this, or more so."""
    n_all, n_hits_all = n + n_other, n_hits + n_other_hits
    ways = [
        math.comb(n, hits) * math.comb(n_other, n_hits_all - hits)
        for hits in range(max(0, n_hits_all - n_other), min(n, n_hits_all) + 1)
    ]
    own = math.comb(n, n_hits) * math.comb(n_other, n_other_hits)
    return sum(way for way in ways if way <= own) / math.comb(n_all, n_hits_all)


def n_for_power(share: float, other: float, power: float = 0.8) -> int:
    """Items a group for which Fisher's test, at 5 % two-sided, tells two shares apart with this chance.

    Casagrande, Pike and Smith (1978): the normal approximation with its correction for counts. Errors:
    `InputError` for equal shares, or a share or power outside 0 to 1.
    """
    for name, value in (("share", share), ("other", other)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} {value:g}: expected 0 to 1")
    if share == other:
        raise InputError(f"shares {share:g} and {other:g}: no number of items tells equals apart")
    if not 0 < power < 1:
        raise InputError(f"power {power:g}: expected more than 0 and less than 1")
    gap, mean = abs(share - other), (share + other) / 2
    at_null = Z_95 * math.sqrt(2 * mean * (1 - mean))
    beyond = NormalDist().inv_cdf(power) * math.sqrt(share * (1 - share) + other * (1 - other))
    n = ((at_null + beyond) / gap) ** 2
    return math.ceil(n / 4 * (1 + math.sqrt(1 + 4 / (n * gap))) ** 2)


def sign_test_p(n_hits: int, n: int) -> float:
    """The exact sign test, two-sided: the chance of n fair coins showing a split as uneven, or more so; 1 for none."""
    rarer = min(n_hits, n - n_hits)
    n_ways = sum(math.comb(n, hits) for hits in range(rarer + 1))
    return min(1.0, n_ways / 2.0 ** (n - 1))


def settled(
    values: Float[np.ndarray, "item"] | pd.Series, least: float = 0.0
) -> Float[np.ndarray, "item"]:
    """`values` with those made equal that rounding alone may tell apart: whoever chooses by them breaks ties by index.

    From the largest down, what lies within `TIE` of the first of its tie (of its size, or `least`) takes
    its value. Other threads, kernels and machines sum in another order: no choice hangs on their last bits.
    """
    found = np.asarray(values, dtype=np.float64)
    made, numbers, first = found.copy(), found.tolist(), math.nan
    for i in np.argsort(-found, kind="stable").tolist():
        if not first - numbers[i] <= max(TIE * abs(first), least):
            first = numbers[i]
        made[i] = first
    return made


def ranked(
    values: Float[Tensor, "item"] | Float[np.ndarray, "item"] | pd.Series, least: float = 0.0
) -> Int[np.ndarray, "item"]:
    """Indices from the largest value down; ties, as `settled` has them, by index."""
    found = to_numpy(values) if isinstance(values, Tensor) else values
    return np.argsort(-settled(found, least), kind="stable")


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
    tops = [set(ranked(scores)[:k].tolist()) for scores in (one, other)]
    return len(tops[0] & tops[1]) / k


def spearman(one: Float[np.ndarray, "item"], other: Float[np.ndarray, "item"]) -> float:
    """Rank correlation; ties share their mean rank. NaN for fewer than three items, or all alike."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (one, other)]
    if len(one) < 3 or any(np.ptp(values) == 0 for values in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def slope_through_origin(x: Float[np.ndarray, "item"], y: Float[np.ndarray, "item"]) -> float:
    """The s that makes Σ |y − s x| least: the median of y / x, weighted by |x|. NaN where all x are 0.

    A few items that lie far off move it no more than any others.
    """
    counted = x != 0
    if not counted.any():
        return float("nan")
    ratios, weights = y[counted] / x[counted], np.abs(x[counted])
    order = np.argsort(ratios, kind="stable")
    reached = np.searchsorted(weights[order].cumsum(), weights.sum() / 2)
    return float(ratios[order][min(int(reached), len(order) - 1)])
