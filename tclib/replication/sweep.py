"""Notebook 02: sparsity against faithfulness (paper Section 4.2, Figure 3)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tclib.evaluation.equal_l0 import (
    SAES,
    ce_gap,
    ce_gap_table,
    compared_families,
    cost_table,
    mlp_worth,
    share_of_worth,
    shared_l0,
)
from tclib.evaluation.evaluate import Evaluation
from tclib.figures.style import save_figure
from tclib.figures.training import over_tokens, sparsity_faithfulness
from tclib.replication.artifacts import Trained
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.transcoders import evaluate_once, train_once
from tclib.replication.verdicts import Line, Measured, decided
from tclib.support.errors import InputError
from tclib.support.steps import save_table
from tclib.training.spec import DictionarySpec

STEP = "02_sparsity_vs_faithfulness"
EVALUATION_STEP = f"{STEP}_evaluation"
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
    """The table behind Figure 3, with each dictionary's family and sparsity (λ, λ₀ or k).

    Dictionaries on fewer tokens (`sweep.token_budgets`) stand in `budget_table` instead.
    """
    evaluation = evaluate_once(run, EVALUATION_STEP, run.swept)
    specs = _own_specs(run, evaluation.table)
    width = run.preset.sweep.expansion
    table = evaluation.table.assign(
        family=[
            spec.family if spec.expansion == width else f"{spec.family} ×{spec.expansion}"
            for spec in specs
        ],
        sparsity=[spec.sparsity for spec in specs],
        expansion=[spec.expansion for spec in specs],
    )
    is_whole = [spec.n_tokens is None for spec in specs]
    return replace(evaluation, table=table[is_whole].reset_index(drop=True))


def _own_specs(run: Run, table: pd.DataFrame) -> list[DictionarySpec]:
    specs = {spec.name: spec for spec in run.preset.sweep.specs()}
    return [specs[name] for name in table["name"]]


def budget_table(run: Run) -> pd.DataFrame:
    """The middle sparsity of transcoders and SAEs over training tokens; empty without `token_budgets`.

    Columns: kind, n_tokens, l0, fvu, ce, dead_share, and ce_increase with its interval.
    """
    table = evaluate_once(run, EVALUATION_STEP, run.swept).table
    specs = _own_specs(run, table)
    whole = {replace(spec, n_tokens=None) for spec in specs if spec.n_tokens is not None}
    n_tokens = [spec.n_tokens or run.preset.sweep.training.n_tokens for spec in specs]
    is_shown = [replace(spec, n_tokens=None) in whole for spec in specs]
    columns = ["kind", "n_tokens", "l0", "fvu", "ce", "dead_share", "ce_original"]
    columns += ["ce_increase", "ce_increase_low", "ce_increase_high"]
    found = table.assign(n_tokens=n_tokens)[is_shown][columns]
    return found.sort_values(["kind", "n_tokens"], ascending=[False, True], ignore_index=True)


def budget_figure(run: Run) -> Figure:
    """CE and L0 against training tokens, for both kinds of Figure 3."""
    step = run.step(EVALUATION_STEP)
    figure = over_tokens(save_table(budget_table(run), step, "tokens"), run.preset.model)
    return save_figure(figure, step, "figure_3_tokens")


def budget_in_words(run: Run) -> str:
    """What the last doubling of the training tokens still changes (Markdown)."""
    parts = []
    for kind, own in budget_table(run).groupby("kind", sort=False):
        before, last = own.iloc[-2], own.iloc[-1]
        parts.append(
            f"{kind}: CE {last['ce'] - before['ce']:+.4f} nats, L0 {before['l0']:.1f} → {last['l0']:.1f}, FVU "
            f"{before['fvu']:.3f} → {last['fvu']:.3f}"
        )
    return f"From {before['n_tokens']:,} to {last['n_tokens']:,} tokens, {'; '.join(parts)}."


def figure_3(run: Run) -> Figure:
    """CE against L0 for this run's model and its companions', and the paper's published points."""
    tables = {title: evaluation.table for title, evaluation in run.sweeps.items()}
    figure = sparsity_faithfulness(tables, paper_sweep())
    return save_figure(figure, run.step(EVALUATION_STEP), "figure_3")


def gap_table(run: Run) -> pd.DataFrame:
    """`ce_gap_table` of every sweep against every kind of SAE that it has, kept beside the figure."""
    found = {
        (title, against): ce_gap_table(evaluation, against)
        for title, evaluation in run.sweeps.items()
        for against in SAES
        if against in set(evaluation.table["kind"])
    }
    gaps = pd.concat(found, names=["model", "against", ""])
    save_table(gaps.reset_index(level=[0, 1]), run.step(EVALUATION_STEP), "ce_gap")
    return gaps


def equal_cost(run: Run) -> pd.DataFrame:
    """`cost_table` of this run's sweep, kept beside it."""
    n_parameters = run.lm.n_mlp_parameters(run.preset.sweep.layer)
    found = cost_table(run.sweep, run.lm.d_model, n_parameters)
    return save_table(found, run.step(EVALUATION_STEP), "equal_cost")


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
# Figure 3's numbers in the paper


def paper_sweep() -> pd.DataFrame:
    """The published points of Figure 3, Pythia-410M layer 15 (data/paper/fig3_pythia410m.csv)."""
    table = pd.DataFrame(paper_table("fig3_pythia410m"))
    table = table.rename(columns={"l1_coefficient": "sparsity"})
    return table.astype({"sparsity": float, "l0": float, "ce": float})


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
    """The statistic of Figure 3's claim: `share_of_worth`, with the rule's premise."""
    table = compared_families(evaluation.table)
    worth = mlp_worth(evaluation, int(table["layer"].iloc[0])).mean()
    best = table.groupby("kind")["ce_recovered"].max()
    is_applicable = bool(worth >= MIN_WORTH and best.min() >= MIN_RECOVERED)
    return Measured(*share_of_worth(evaluation, table), is_applicable)


def measured(run: Run) -> dict[str, Measured]:
    """The statistic of every sweep, by the rule's name and the model."""
    return {f"faithfulness ({title})": faithfulness(e) for title, e in run.sweeps.items()}
