"""The statistics by which the claims of Section 5.2 are decided, each with its 95 % interval over prompts.

Shares are of what the MLP adds to the metric: the original's mean less that of the MLP's output bias alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from jaxtyping import Float

from tclib.greater_than.curves import Curve
from tclib.support.statistics import (
    bootstrap_means,
    interval,
    ratio_interval,
)

FIRST_KS = range(1, 11)
MIN_WORTH = 0.05  # of the metric, which an MLP must add for shares of it to mean anything
SEED = 0
Interval = tuple[float, float, float]  # value, low, high


def kept_evidence(features: Curve, neurons: Curve) -> dict[str, Interval]:
    """Of the two main curves: `original`, `worth`, `kept` and `first_features` (see `verdicts.RULES`)."""
    bias_only, original = neurons.values[0], neurons.values[-1]
    worth = original - bias_only
    ahead = np.mean([_at(features, k) - _at(neurons, k) for k in FIRST_KS], axis=0)
    return {
        "original": mean_interval(original),
        "worth": mean_interval(worth),
        "kept": ratio_interval(features.values[-1] - bias_only, worth, generator()),
        "first_features": ratio_interval(ahead, worth, generator()),
    }


def is_worth_something(worth: Interval) -> bool:
    """The premise of every share: the MLP adds `MIN_WORTH` or more, and surely more than nothing."""
    value, low, _ = worth
    return value >= MIN_WORTH and low > 0


def is_kept(kept: Interval) -> bool:
    """The premise of a feature that hurts: its transcoder surely keeps something of what the MLP adds.

    Of one that keeps nothing, like random directions, some unit always hurts.
    """
    return kept[1] > 0


def ahead_by_k(one: Curve, other: Curve, ks: Iterable[int] = FIRST_KS) -> pd.DataFrame:
    """Which of two curves is ahead at each k: a lead counts where its paired interval leaves out 0, else it is a tie.

    Columns: k, difference (mean over prompts), low, high (95 %, at each k by itself), lead (1, 0 or −1).
    """
    lines = []
    for k in ks:
        difference, low, high = mean_interval(_at(one, k) - _at(other, k))
        lines.append((k, difference, low, high, int(low > 0) - int(high < 0)))
    return pd.DataFrame(lines, columns=["k", "difference", "low", "high", "lead"])


def _at(curve: Curve, k: int) -> Float[np.ndarray, "prompt"]:
    """The metric by prompt with the first k units kept; all of them, where there are no more."""
    return np.asarray(curve.values[curve.ks.index(min(k, curve.ks[-1]))])


def generator() -> np.random.Generator:
    """Of every bootstrap, the same each time."""
    return np.random.default_rng(SEED)


def mean_interval(values: Float[np.ndarray, "prompt"]) -> Interval:
    """The mean with its interval over prompts."""
    low, high = interval(bootstrap_means(values, generator()))
    return float(values.mean()), float(low), float(high)
