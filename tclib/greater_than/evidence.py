"""The statistics by which the claims of Section 5.2 are decided, each with its 95 % interval over prompts.

Shares are of what the MLP adds to the metric: the original's mean less that of the MLP's output bias alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tclib.greater_than.curves import Curve, steepest_drop, values_of
from tclib.greater_than.task import GreaterThan
from tclib.greater_than.units import Units
from tclib.models.language_model import LanguageModel
from tclib.models.running import LowerRun
from tclib.support.statistics import (
    bootstrap_means,
    interval,
    ratio_interval,
    wilson_interval,
)

FIRST_KS = range(1, 11)
MIN_WORTH = 0.05  # of the metric, which an MLP must add for shares of it to mean anything
MAX_LAG = 40  # years
MIN_OVERLAP = 50  # answers on which two shifted curves are compared
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
        "kept": ratio_interval(features.values[-1] - bias_only, worth, _generator()),
        "first_features": ratio_interval(ahead, worth, _generator()),
    }


def is_worth_something(worth: Interval) -> bool:
    """The premise of every share: the MLP adds `MIN_WORTH` or more, and surely more than nothing."""
    value, low, _ = worth
    return value >= MIN_WORTH and low > 0


def gain_without(
    lm: LanguageModel,
    task: GreaterThan,
    below: LowerRun,
    units: Units,
    order: Int[Tensor, "unit"],
    curve: Curve,
) -> Float[np.ndarray, "prompt"]:
    """What leaving out the unit that hurts even years most adds on each prompt of an odd year.

    Chosen and measured on different prompts, so that it is no gain of the choice alone.
    """
    is_odd = np.array([number % 2 == 1 for number in task.scored().numbers])
    suspect = steepest_drop(replace(curve, values=curve.values[:, ~is_odd]), order)
    without = values_of(lm, task, below, units.without(suspect).output())
    return np.asarray((without - values_of(lm, task, below, units.output()))[is_odd])


def harm_evidence(
    feature_gain: Float[np.ndarray, "prompt"],
    neuron_gain: Float[np.ndarray, "prompt"],
    worth: Float[np.ndarray, "prompt"],
) -> Interval:
    """`gain_without` of features less that of neurons, as a share of the MLP's worth."""
    return ratio_interval(feature_gain - neuron_gain, worth, _generator())


def best_lags(curves: pd.DataFrame, n_features: int = 10) -> pd.DataFrame:
    """How many years later a feature's attribution lies than its de-embedding (Figure 4).

    For each of the first features the lag, of −40 to 40 years, at which the two curves correlate best
    over the answers that both have. p is the share of correlations at least as good among the
    attributions and de-embeddings of different features, each at its own best lag: a null that keeps the
    curves as smooth as they are. Columns: feature, lag, r, p; empty where there are no de-embeddings or
    too few answers.
    """
    wide = {
        name: curves[curves["rank"] <= n_features].pivot(
            index="rank", columns="answer", values=name
        )
        for name in ("dla", "de_embedding")
    }
    promoted, read = (table.to_numpy(float) for table in wide.values())
    columns = ["feature", "lag", "r", "p"]
    if not np.isfinite(read).all() or read.shape[1] < MIN_OVERLAP:
        return pd.DataFrame(columns=columns)
    found = [[_best_lag(one, other) for other in read] for one in promoted]
    r = np.array([[one[1] for one in line] for line in found])
    null = r[~np.eye(len(r), dtype=bool)]
    own = curves.drop_duplicates("rank").set_index("rank")["feature"]
    return pd.DataFrame(
        {
            "feature": own.loc[wide["dla"].index].to_numpy(),
            "lag": [found[i][i][0] for i in range(len(r))],
            "r": r.diagonal(),
            "p": [float((np.append(null, one) >= one).mean()) for one in r.diagonal()],
        },
        columns=columns,
    )


def _best_lag(
    promoted: Float[np.ndarray, "answer"], read: Float[np.ndarray, "answer"]
) -> tuple[int, float]:
    """The smallest lag of the best correlation of promoted[y + lag] with read[y]."""
    n = len(promoted)
    room = min(MAX_LAG, n - MIN_OVERLAP)
    lags = sorted(range(-room, room + 1), key=abs)
    scores = [
        _correlation(promoted[max(0, lag) : n + min(0, lag)], read[max(0, -lag) : n - max(0, lag)])
        for lag in lags
    ]
    best = int(np.argmax(np.round(scores, 9)))  # so that a tie goes to the smallest lag everywhere
    return lags[best], scores[best]


def _correlation(one: Float[np.ndarray, "answer"], other: Float[np.ndarray, "answer"]) -> float:
    size = one.std() * other.std()
    return float(((one - one.mean()) * (other - other.mean())).mean() / size) if size > 0 else 0.0


def shift_evidence(lags: pd.DataFrame) -> Interval:
    """The share of features with a positive lag, by Wilson's interval; NaN for none."""
    if lags.empty:
        return (float("nan"),) * 3
    n_later = int((lags["lag"] > 0).sum())
    return n_later / len(lags), *wilson_interval(n_later, len(lags))


def _at(curve: Curve, k: int) -> Float[np.ndarray, "prompt"]:
    """The metric by prompt with the first k units kept; all of them, where there are no more."""
    return np.asarray(curve.values[curve.ks.index(min(k, curve.ks[-1]))])


def _generator() -> np.random.Generator:
    return np.random.default_rng(SEED)


def mean_interval(values: Float[np.ndarray, "prompt"]) -> Interval:
    """The mean with its interval over prompts."""
    low, high = interval(bootstrap_means(values, _generator()))
    return float(values.mean()), float(low), float(high)
