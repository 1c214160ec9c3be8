"""Transcoders and SAEs of a sweep compared at equal L0 (paper Section 4.2), and at equal cost.

CE is interpolated linearly in log L0 over the range that two families share. It is linear in the dictionaries'
CE, so intervals resample rows of the corpus, paired.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from jaxtyping import Float

from tclib.dictionaries.kinds import Kind
from tclib.evaluation.evaluate import BOOTSTRAP_SEED, Evaluation
from tclib.support.statistics import bootstrap_means, interval, ratio_interval

SAES: tuple[Kind, ...] = ("sae_mlp_out", "sae_mlp_in")  # of Figure 3, and of Table 1
N_POINTS = 5
Interval = tuple[float, float, float]  # value, low, high


def compared_families(table: pd.DataFrame, against: Kind = SAES[0]) -> pd.DataFrame:
    """The lines of a sweep's first family of transcoders and its first of those SAEs."""
    table = table[table["kind"].isin(["transcoder", against])]
    if "family" in table:
        first = table.groupby("kind", sort=False)["family"].first()
        table = table[table["family"].isin(first)]
    return table.reset_index(drop=True)


def shared_l0(table: pd.DataFrame, n_points: int = N_POINTS) -> Float[np.ndarray, "point"]:
    """L0 values, evenly spaced in log, over the range that both kinds of a table cover.

    Empty where the ranges do not overlap, or there is one kind alone.
    """
    ranges = table.groupby("kind")["l0"].agg(["min", "max"])
    low, high = ranges["min"].max(), ranges["max"].min()
    return np.geomspace(low, high, n_points) if len(ranges) == 2 and low < high else np.array([])


def ce_gap(table: pd.DataFrame, at_l0: Float[np.ndarray, "point"]) -> Float[np.ndarray, "point"]:
    """CE of the SAEs minus CE of the transcoders at equal L0: positive where transcoders are better."""

    def curve(points: pd.DataFrame) -> np.ndarray:
        points = points.sort_values("l0")
        return np.asarray(np.interp(np.log(at_l0), np.log(points["l0"]), points["ce"]))

    is_transcoder = table["kind"] == "transcoder"
    return np.asarray(curve(table[~is_transcoder]) - curve(table[is_transcoder]))


def ce_gap_table(evaluation: Evaluation, against: Kind = SAES[0]) -> pd.DataFrame:
    """`ce_gap` of a sweep's compared families with a 95 % interval.

    Columns: l0, ce_gap, low, high, winner (`transcoder`, `SAE`, or `tie` where 0 is inside).
    """
    table = compared_families(evaluation.table, against)
    at_l0 = shared_l0(table)
    if len(at_l0) == 0:
        return pd.DataFrame(columns=["l0", "ce_gap", "low", "high", "winner"])
    gaps = row_gaps(evaluation, table, at_l0)
    low, high = interval(bootstrap_means(gaps, np.random.default_rng(BOOTSTRAP_SEED)))
    winner = np.where(low > 0, "transcoder", np.where(high < 0, "SAE", "tie"))
    return pd.DataFrame(
        {"l0": at_l0, "ce_gap": gaps.mean(0), "low": low, "high": high, "winner": winner}
    )


def row_gaps(
    evaluation: Evaluation, table: pd.DataFrame, at_l0: Float[np.ndarray, "point"]
) -> Float[np.ndarray, "row point"]:
    """`ce_gap` by row of the corpus, so that rows can be resampled."""
    weights = np.stack(
        [ce_gap(table.assign(ce=np.eye(len(table))[i]), at_l0) for i in range(len(table))]
    )
    return np.asarray(evaluation.row_ce[table["name"]].to_numpy() @ weights)


def share_of_worth(evaluation: Evaluation, table: pd.DataFrame) -> Interval:
    """The mean gap over the shared L0s, in shares of what mean ablation of the MLP costs, by rows.

    NaN for families that share no L0.
    """
    at_l0 = shared_l0(table)
    if len(at_l0) == 0:
        return (math.nan,) * 3
    gaps = row_gaps(evaluation, table, at_l0).mean(1)
    worth = mlp_worth(evaluation, int(table["layer"].iloc[0]))
    return ratio_interval(gaps, worth, np.random.default_rng(BOOTSTRAP_SEED))


def mlp_worth(evaluation: Evaluation, layer: int) -> Float[np.ndarray, "row"]:
    """What mean ablation of the layer's MLP costs, in nats a token of each row."""
    ablated = evaluation.baseline_ce[f"mean_ablated L{layer}"]
    return np.asarray((ablated - evaluation.baseline_ce["original"]).to_numpy())


def cost_table(evaluation: Evaluation, d_model: int, n_mlp_parameters: int) -> pd.DataFrame:
    """Each family of transcoders against the narrowest SAEs on the MLP's output, at equal L0, with its cost.

    An SAE runs beside the MLP whose output it reads; a transcoder stands in the MLP's place. So a
    transcoder of equal width takes less to run, and a wider one as much. Columns: family, n_features,
    parameters and flops (of what runs, over the SAE's and its MLP's; decoders touch active features
    alone), then l0_low, l0_high (the range that both share), and of the mean gap over it: ce_gap, low,
    high. Families that share no L0 with the SAEs are left out.
    """
    table = evaluation.table
    saes = _narrowest(table[table["kind"] == SAES[0]])
    lines = []
    for family, own in table[table["kind"] == "transcoder"].groupby("family", sort=False):
        pair = pd.concat([own, saes], ignore_index=True)
        at_l0 = shared_l0(pair)
        if len(at_l0) == 0:
            continue
        gaps = row_gaps(evaluation, pair, at_l0).mean(1)
        low, high = interval(bootstrap_means(gaps, np.random.default_rng(BOOTSTRAP_SEED)))
        alone, beside = (
            np.array(_cost(d_model, int(one["n_features"].iloc[0]), float(at_l0.mean())))
            for one in (own, saes)
        )
        share = alone / (beside + np.array([n_mlp_parameters, 2 * n_mlp_parameters]))
        line = {"family": family, "n_features": int(own["n_features"].iloc[0])}
        line |= {"parameters": share[0], "flops": share[1]}
        line |= {"l0_low": at_l0[0], "l0_high": at_l0[-1]}
        lines.append({**line, "ce_gap": float(gaps.mean()), "low": float(low), "high": float(high)})
    return pd.DataFrame(lines)


def _narrowest(saes: pd.DataFrame) -> pd.DataFrame:
    first = saes.sort_values("n_features", kind="stable")["family"].iloc[:1]
    return saes[saes["family"].isin(first)]


def _cost(d_model: int, n_features: int, l0: float) -> tuple[float, float]:
    """(Parameters, operations a token) of a dictionary without skip."""
    parameters = 2 * d_model * n_features + n_features + d_model
    return parameters, 2 * d_model * (n_features + l0)
