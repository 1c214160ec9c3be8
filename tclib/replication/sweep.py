"""Notebook 02: sparsity against faithfulness (paper Section 4.2, Figure 3)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from tclib.evaluation.evaluate import BOOTSTRAP_SEED, Evaluation
from tclib.figures.style import save_figure
from tclib.figures.training import sparsity_faithfulness
from tclib.replication.artifacts import Trained
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.transcoders import evaluate_once, train_once
from tclib.replication.verdicts import Line, Measured, decided
from tclib.support.errors import InputError
from tclib.support.statistics import bootstrap_means, interval, ratio_interval
from tclib.support.steps import save_table

STEP = "02_sparsity_vs_faithfulness"
EVALUATION_STEP = f"{STEP}_evaluation"
N_GAP_POINTS = 5
MIN_WORTH = 0.01  # nats that mean ablation of the MLP must cost for shares of it to mean anything
MIN_RECOVERED = 0.5  # of it, which the best dictionary of each kind must win back
_CLAUSES = {"transcoder": "transcoders better", "SAE": "SAEs better", "tie": "no difference"}


def make_sweep(run: Run) -> Trained:
    """Transcoders and SAEs of one layer over several sparsities, from one harvest.

    Errors: `InputError` for a preset without a sweep.
    """
    config = run.preset.sweep
    if not config.specs():
        raise InputError(
            f"preset {run.preset.name} has no sweep: give it sweep.transcoder_l1, sweep.sae_mlp_out_l1 or "
            "sweep.families"
        )
    return train_once(run, STEP, config.specs(), config.training)


def evaluate_sweep(run: Run) -> Evaluation:
    """The table behind Figure 3, with each dictionary's family and sparsity (λ, λ₀ or k)."""
    evaluation = evaluate_once(run, EVALUATION_STEP, run.swept)
    specs = {spec.name: spec for spec in run.preset.sweep.specs()}
    own = [specs[name] for name in evaluation.table["name"]]
    table = evaluation.table.assign(
        family=[spec.family for spec in own], sparsity=[spec.sparsity for spec in own]
    )
    return replace(evaluation, table=table)


def figure_3(run: Run) -> Figure:
    """CE against L0 for this run's model and its companions', and the paper's published points."""
    tables = {title: evaluation.table for title, evaluation in run.sweeps.items()}
    figure = sparsity_faithfulness(tables, paper_sweep())
    return save_figure(figure, run.step(EVALUATION_STEP), "figure_3")


def gap_table(run: Run) -> pd.DataFrame:
    """`ce_gap_table` of every sweep, kept beside the figure."""
    gaps = pd.concat({t: ce_gap_table(e) for t, e in run.sweeps.items()}, names=["model", ""])
    save_table(gaps.reset_index(level=0), run.step(EVALUATION_STEP), "ce_gap")
    return gaps


# ---------------------------------------------------------------------------------------------
# Who is ahead at equal L0


def paper_sweep() -> pd.DataFrame:
    """The published points of Figure 3, Pythia-410M layer 15 (data/paper/fig3_pythia410m.csv)."""
    table = pd.DataFrame(paper_table("fig3_pythia410m"))
    table = table.rename(columns={"l1_coefficient": "sparsity"})
    return table.astype({"sparsity": float, "l0": float, "ce": float})


def compared_families(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of a sweep's first family of transcoders and its first of SAEs."""
    if "family" not in table:
        return table
    first = table.groupby("kind", sort=False)["family"].first()
    return table[table["family"].isin(first)].reset_index(drop=True)


def shared_l0(table: pd.DataFrame, n_points: int = N_GAP_POINTS) -> Float[np.ndarray, "point"]:
    """L0 values, evenly spaced in log, over the range that both kinds of a sweep cover.

    Empty where the ranges do not overlap.
    """
    ranges = table.groupby("kind")["l0"].agg(["min", "max"])
    low, high = ranges["min"].max(), ranges["max"].min()
    return np.geomspace(low, high, n_points) if low < high else np.array([])


def ce_gap(table: pd.DataFrame, at_l0: Float[np.ndarray, "point"]) -> Float[np.ndarray, "point"]:
    """CE of the SAEs minus CE of the transcoders at equal L0, interpolated linearly in log L0.

    Positive where transcoders are better.
    """

    def curve(kind: str) -> np.ndarray:
        points = table[table["kind"] == kind].sort_values("l0")
        return np.asarray(np.interp(np.log(at_l0), np.log(points["l0"]), points["ce"]))

    return np.asarray(curve("sae_mlp_out") - curve("transcoder"))


def ce_gap_table(evaluation: Evaluation) -> pd.DataFrame:
    """`ce_gap` of a sweep with a 95 % interval, paired by row of the corpus.

    Columns: l0, ce_gap, low, high, winner (`transcoder`, `SAE`, or `tie` where 0 is inside).
    """
    table = compared_families(evaluation.table)
    at_l0 = shared_l0(table)
    if len(at_l0) == 0:
        return pd.DataFrame(columns=["l0", "ce_gap", "low", "high", "winner"])
    row_gaps = _row_gaps(evaluation, table, at_l0)
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    low, high = interval(bootstrap_means(row_gaps, generator))
    winner = np.where(low > 0, "transcoder", np.where(high < 0, "SAE", "tie"))
    return pd.DataFrame(
        {"l0": at_l0, "ce_gap": row_gaps.mean(0), "low": low, "high": high, "winner": winner}
    )


def _row_gaps(
    evaluation: Evaluation, table: pd.DataFrame, at_l0: Float[np.ndarray, "point"]
) -> Float[np.ndarray, "row point"]:
    """`ce_gap` by row of the corpus: it is linear in the dictionaries' CE, so rows can be resampled."""
    weights = np.stack(
        [ce_gap(table.assign(ce=np.eye(len(table))[i]), at_l0) for i in range(len(table))]
    )
    return np.asarray(evaluation.row_ce[table["name"]].to_numpy() @ weights)


def family_table(table: pd.DataFrame) -> pd.DataFrame:
    """The dictionaries of a sweep's other families beside its transcoders at equal L0.

    Columns: family, sparsity, l0, ce, transcoder_ce (of the compared transcoders, interpolated in log
    L0; NaN outside their range), difference (negative: better than they). Empty without others.
    """
    base = compared_families(table)
    own = base[base["kind"] == "transcoder"].sort_values("l0")
    others = table[~table["name"].isin(base["name"])] if "family" in table else table.iloc[:0]
    at = np.interp(
        np.log(others["l0"].to_numpy(float)),
        np.log(own["l0"].to_numpy(float)),
        own["ce"].to_numpy(float),
        left=np.nan,
        right=np.nan,
    )
    found = others[["family", "sparsity", "l0", "ce"]] if len(others) else pd.DataFrame()
    return found.assign(transcoder_ce=at, difference=others["ce"].to_numpy() - at)


def who_wins(gaps: pd.DataFrame) -> str:
    """One clause on a `ce_gap_table`: who is better where."""
    if gaps.empty:
        return "the two kinds share no range of L0"
    winners = list(gaps["winner"])
    if len(set(winners)) == 1:
        clause = _CLAUSES[winners[0]]
        return f"{clause} at every L0 from {gaps['l0'].min():.1f} to {gaps['l0'].max():.1f}"
    parts = []
    for winner, group in gaps.groupby("winner", sort=False):
        values = ", ".join(f"{l0:.3g}" for l0 in group["l0"])
        parts.append(f"{_CLAUSES[str(winner)]} at L0 {values}")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------
# Words and claims


def sweeps_in_words(run: Run) -> str:
    """Paper and ours, of Figure 3 (Markdown)."""
    paper = paper_sweep()
    published = ce_gap(paper, shared_l0(paper))
    tables = [evaluation.table for evaluation in run.sweeps.values()]
    ours = "; ".join(f"**{t}**: {who_wins(ce_gap_table(e))}" for t, e in run.sweeps.items())
    worth = " and ".join(
        f"{(table['ce_mean_ablated'] - table['ce_original']).iloc[0]:.3f}" for table in tables
    )
    return (
        "*Paper:* transcoders equal or better everywhere; at equal L0 the published Pythia-410M points give "
        f"SAE − transcoder {published.min():+.4f} to {published.max():+.4f} nats. *Ours:* {ours}. The gap is "
        f"to be read against what the MLP is worth ({worth} nats of mean ablation). These dictionaries have "
        f"{int(tables[0]['n_features'].iloc[0]):,} features; L0 is over {int(tables[0]['n_tokens'].iloc[0]):,} "
        "tokens, BOS left out; one seed."
    )


def claims(run: Run) -> list[Line]:
    """Figure 3's claim for every sweep."""
    return [sweep_claim(title, evaluation) for title, evaluation in run.sweeps.items()]


def sweep_claim(model: str, evaluation: Evaluation) -> Line:
    """Figure 3's claim: at equal L0, transcoders are as faithful as SAEs or more."""
    gaps, measured = ce_gap_table(evaluation), faithfulness(evaluation)
    paper = paper_sweep()
    published = ce_gap(paper, shared_l0(paper))
    found = f"{gaps['ce_gap'].min():+.4f} to {gaps['ce_gap'].max():+.4f} nats" if len(gaps) else ""
    line = decided(
        "faithfulness",
        f"SAE − transcoder CE {published.min():+.4f} to {published.max():+.4f} nats (Pythia-410M L15)",
        f"{found}: {who_wins(gaps)}; share of the MLP's worth {measured.in_words}",
        measured,
    )
    return {**line, "claim": f"{line['claim']} ({model})"}


def faithfulness(evaluation: Evaluation) -> Measured:
    """The statistic of Figure 3's claim: the mean gap over what mean ablation of the MLP costs, by rows."""
    table = compared_families(evaluation.table)
    at_l0 = shared_l0(table)
    if len(at_l0) == 0:
        return Measured(math.nan, math.nan, math.nan, False)
    ablated = evaluation.baseline_ce[f"mean_ablated L{table['layer'].iloc[0]}"]
    worth = ablated - evaluation.baseline_ce["original"]
    gaps = _row_gaps(evaluation, table, at_l0).mean(1)
    measured = ratio_interval(gaps, worth.to_numpy(), np.random.default_rng(BOOTSTRAP_SEED))
    best = table.groupby("kind")["ce_recovered"].max()
    is_applicable = bool(worth.mean() >= MIN_WORTH and best.min() >= MIN_RECOVERED)
    return Measured(*measured, is_applicable)
