"""How many years later features promote than they read (paper Figure 4), as a statistic with its nulls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tclib.support.statistics import ranked, sign_test_p, wilson_interval

MAX_LAG = 40  # years
MIN_OVERLAP = 50  # answers on which two shifted curves are compared
N_PERMUTATIONS = 9_999
SEED = 0


class ShiftTest(NamedTuple):
    """How many features promote later years than they read, and how often that happens by chance.

    `sign_p` is the exact two-sided sign test of later against earlier. `pairs_later` is the share of later lags,
    among later and earlier ones, of attributions and de-embeddings of different features. `permutation_p` is how
    often as many features, or more, are later where every de-embedding is handed to a feature drawn at random.
    A tie, the lag 0, counts for neither side.
    """

    n_later: int
    n_earlier: int
    n_tied: int
    sign_p: float
    pairs_later: float
    permutation_p: float

    @property
    def in_words(self) -> str:
        ties = f", {self.n_tied} at the same year (for neither side)" if self.n_tied else ""
        return f"{self.n_later} later, {self.n_earlier} earlier{ties}: two-sided sign test p = {self.sign_p:.3f}"


class _Matched(NamedTuple):
    """The best lag of each feature's attribution with each feature's de-embedding, and the correlation there."""

    features: list[int]
    lag: Int[np.ndarray, "promotes reads"]
    r: Float[np.ndarray, "promotes reads"]


def best_lags(curves: pd.DataFrame, n_features: int = 10) -> pd.DataFrame:
    """How many years later a feature's attribution lies than its de-embedding (Figure 4).

    For each of the first features the lag, of −40 to 40 years, at which the two curves correlate best
    over the answers that both have. p is that of a null by feature that keeps every curve as smooth as it is: the
    share of correlations at least as good among the pairs in which either this feature's attribution or its
    de-embedding stands with another feature's, each at its own best lag, the feature itself counted in (of ten
    features, 1/19 at least). Shifting a curve around the circle would be no null here: it moves the best lag and
    leaves the correlation there. Columns: feature, lag, r, p; empty where there are no de-embeddings or too few
    answers.
    """
    columns = ["feature", "lag", "r", "p"]
    found = _matched(curves, n_features)
    if found is None:
        return pd.DataFrame(columns=columns)
    own = found.r.diagonal()
    p = [_share_as_good(found.r, i) for i in range(len(own))]
    values = (found.features, found.lag.diagonal(), own, p)
    return pd.DataFrame(dict(zip(columns, values, strict=True)))


def _share_as_good(r: Float[np.ndarray, "promotes reads"], i: int) -> float:
    others = np.arange(len(r)) != i
    pairs = np.concatenate([[r[i, i]], r[i, others], r[others, i]])
    return float((np.round(pairs, 9) >= round(r[i, i], 9)).mean())


def shift_test(curves: pd.DataFrame, n_features: int = 10) -> ShiftTest | None:
    """Whether more features promote later years than earlier ones; None where there are no lags."""
    found = _matched(curves, n_features)
    if found is None:
        return None
    own, n = found.lag.diagonal(), len(found.lag)
    n_later, n_earlier = int((own > 0).sum()), int((own < 0).sum())
    pairs = found.lag[~np.eye(n, dtype=bool)]
    n_moved = int((pairs != 0).sum())
    generator = np.random.default_rng(SEED)
    drawn = [
        (found.lag[np.arange(n), generator.permutation(n)] > 0).sum() for _ in range(N_PERMUTATIONS)
    ]
    as_many = 1 + int((np.array(drawn) >= n_later).sum())
    return ShiftTest(
        n_later,
        n_earlier,
        n - n_later - n_earlier,
        sign_test_p(n_later, n_later + n_earlier),
        int((pairs > 0).sum()) / n_moved if n_moved else float("nan"),
        as_many / (1 + N_PERMUTATIONS),
    )


def shift_evidence(lags: pd.DataFrame) -> tuple[float, float, float]:
    """The share of features with a positive lag, by Wilson's interval; NaN for none.

    A tie is no later year: it stays among the features, and is none of the later ones.
    """
    if lags.empty:
        return (float("nan"),) * 3
    n_later = int((lags["lag"] > 0).sum())
    return n_later / len(lags), *wilson_interval(n_later, len(lags))


def _matched(curves: pd.DataFrame, n_features: int) -> _Matched | None:
    first = curves[curves["rank"] <= n_features]
    promoted, read = (
        first.pivot(index="rank", columns="answer", values=name).to_numpy(float)
        for name in ("dla", "de_embedding")
    )
    if not len(read) or not np.isfinite(read).all() or read.shape[1] < MIN_OVERLAP:
        return None
    found = [[_best_lag(one, other) for other in read] for one in promoted]
    features = first.drop_duplicates("rank").sort_values("rank")["feature"].tolist()
    lag, r = (np.array([[one[part] for one in line] for line in found]) for part in (0, 1))
    return _Matched(features, lag, r)


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
    best = int(ranked(np.array(scores))[0])  # a tie goes to the smallest lag everywhere
    return lags[best], scores[best]


def _correlation(one: Float[np.ndarray, "answer"], other: Float[np.ndarray, "answer"]) -> float:
    size = one.std() * other.std()
    return float(((one - one.mean()) * (other - other.mean())).mean() / size) if size > 0 else 0.0
