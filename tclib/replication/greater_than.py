"""Notebook 06: the greater-than circuit, its features' two curves, and features against neurons.

components.csv   every MLP and head: mean and zero ablation, direct attribution
reading_heads.csv   which heads carry the year into the chosen MLP's features
feature_curves.csv   Figure 4: direct logit attribution and de-embedding of each feature over YY
curves.csv   Figure 5 left: probability difference against k, mean and interval, every ranking and kind
harmful.csv  Figure 5 right: what leaving single features out changes
summary.json the single figures (original, all features, without the harmful one, where the curves cross)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tclib.circuits.frozen import FrozenPrompts
from tclib.evaluation.replace import replace_mlp
from tclib.features.from_weights import Head
from tclib.figures.graph import layered_graph
from tclib.figures.greater_than import (
    ablation_figure,
    component_figure,
    feature_curve_figure,
    harmful_figure,
)
from tclib.figures.style import save_figure
from tclib.greater_than.analysis import analyse, first_template
from tclib.greater_than.components import ablation_effects, strongest_mlp
from tclib.greater_than.evidence import (
    Interval,
    best_lags,
    is_worth_something,
    shift_evidence,
)
from tclib.greater_than.task import GreaterThan, mean_probability_difference
from tclib.replication.artifacts import GreaterThanResults, Trained
from tclib.replication.checks import COLUMNS, check_line, printed_tolerance
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.transcoders import train_once
from tclib.replication.verdicts import Line, Measured, decided
from tclib.support.files import new_file
from tclib.support.progress import progress
from tclib.support.steps import ensure, save_table, write_csv

STEP = "06_greater_than"
COMPONENTS_STEP = f"{STEP}_components"
SAES_STEP = f"{STEP}_saes"
REPLACEMENTS_STEP = f"{STEP}_replacements"
# (0.798 − 0.629) / (0.883 − 0.629): the value with the bias alone is read off Figure 5.
PAPER_KEPT = 0.665
TABLES = ("components", "reading_heads", "feature_curves", "curves", "harmful")
FIGURES = ("components", "graph", "figure_4", "figure_5_left", "figure_5_right")


def task_of(run: Run) -> GreaterThan:
    """The preset's task: all its templates, each with every year."""
    return GreaterThan.of(run.lm, run.preset.greater_than.templates)


def make_components(run: Run) -> pd.DataFrame:
    """Every MLP and head ablated, made once (no dictionary needed)."""
    step, config = run.step(COMPONENTS_STEP), run.preset.greater_than
    parameters = {"templates": list(config.templates), "every": config.components_every}

    def make() -> Mapping[str, Any]:
        task = task_of(run).scored().every(config.components_every)
        effects = ablation_effects(run.lm, task)
        write_csv(effects, step, "components")
        return {"n_components": len(effects)}

    ensure(step, parameters, {"model": run.model_hash}, make)
    return pd.read_csv(step.folder / "components.csv")


def make_replacements(run: Run) -> pd.DataFrame:
    """The metric with each transcoder in its MLP's place, one at a time, made once.

    Columns: layer, original, replaced, kept (their ratio), over all prompts that count.
    """
    step = run.step(REPLACEMENTS_STEP)
    parameters = {"templates": list(run.preset.greater_than.templates)}

    def make() -> Mapping[str, Any]:
        task = task_of(run)
        original = mean_probability_difference(run.lm, task)
        lines = []
        for one in progress(run.transcoders.values(), "replacing MLPs", unit="layer"):
            with replace_mlp(run.lm, one):
                replaced = mean_probability_difference(run.lm, task)
            line = {"layer": one.config.layer, "original": original, "replaced": replaced}
            lines.append({**line, "kept": replaced / original})
        write_csv(pd.DataFrame(lines), step, "replacements")
        return {"n_layers": len(lines)}

    ensure(step, parameters, {"model": run.model_hash, **run.trained.hashes}, make)
    return pd.read_csv(step.folder / "replacements.csv")


def chosen_layer(run: Run) -> int:
    """The preset's MLP, or the one that the ablations find."""
    given = run.preset.greater_than.layer
    return strongest_mlp(run.components) if given is None else given


def _task_saes(run: Run) -> Trained | None:
    """SAEs beside the chosen MLP's transcoder: the preset's, else the sweep's, if it is of that MLP."""
    config, sweep = run.preset.transcoders, run.preset.sweep
    if specs := run.preset.greater_than.sae_specs(chosen_layer(run), config):
        return train_once(run, SAES_STEP, specs, config.training)
    own = [spec for spec in sweep.full_specs() if spec.kind == "sae_mlp_out"]
    if not own or sweep.layer != chosen_layer(run) or not run.tells("02"):
        return None
    names = {spec.name for spec in own if spec.expansion == config.expansion}
    return run.swept.only(names)


def make_greater_than(run: Run) -> GreaterThanResults:
    """The artifacts of step 06, made once; the SAE nearest in L0 is set beside the transcoder.

    Errors: `InputError` if the chosen layer has no transcoder.
    """
    step, config = run.step(STEP), run.preset.greater_than
    trained = _task_saes(run)
    saes, hashes = ({}, {}) if trained is None else (trained.dictionaries, trained.hashes)
    inputs = {"model": run.model_hash, **run.trained.hashes, **hashes}

    def make() -> Mapping[str, Any]:
        task = task_of(run)
        tokens = first_template(task).scored().tokens
        frozen = FrozenPrompts(run.lm, tokens, run.transcoders.values())
        head = None if config.head is None else Head(*config.head)
        layer = chosen_layer(run)
        tables, summary = analyse(frozen, task, run.components, saes, layer, head, run.preset.seed)
        for name, table in tables.items():
            write_csv(table, step, name)
        with new_file(step.folder / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2))
        return summary

    ensure(step, {**asdict(config), "seed": run.preset.seed}, inputs, make)
    summary = json.loads((step.folder / "summary.json").read_text())
    summary["evidence"] = {name: tuple(one) for name, one in summary["evidence"].items()}
    tables = {name: pd.read_csv(step.folder / f"{name}.csv") for name in TABLES}
    return GreaterThanResults(**tables, summary=summary, step=step)


# ---------------------------------------------------------------------------------------------
# Figures


def figure(run: Run, name: str) -> Figure:
    """One of `FIGURES`, drawn from the step's tables and saved beside them."""
    found = run.greater_than
    curves, features, summary = found.curves, found.feature_curves, found.summary
    draw = {
        "components": lambda: component_figure(found.components),
        "graph": lambda: _graph_figure(run),
        "figure_4": lambda: feature_curve_figure(features),
        "figure_5_left": lambda: ablation_figure(curves, summary),
        "figure_5_right": lambda: harmful_figure(curves, features, summary),
    }
    return save_figure(draw[name](), found.step, name)


def _graph_figure(run: Run) -> Figure:
    small = run.circuits.small
    return layered_graph(small, f"{run.prompt.root.name}: {''.join(small.tokens[1:])}")


# ---------------------------------------------------------------------------------------------
# Claims


def greater_than_table(
    summary: Mapping[str, Any], curves: pd.DataFrame, is_published: bool
) -> pd.DataFrame:
    """The paper's figures of Section 5.2 beside ours, in the columns of `checks`.

    With the published transcoders they are compared by the rule of `checks`; with any other model or
    dictionary they stand side by side only.
    """
    kept = curves[(curves["units"] == "transcoder features") & (curves["ranking"] == "variance")]
    by_k = kept.set_index("k")["value"]
    ours = {
        "probability_difference_original": summary["original"],
        "probability_difference_transcoder_all_features": summary["all_features"],
        "probability_difference_transcoder_without_5315": summary["without_harmful"],
        "k_where_the_curves_are_nearest": summary.get("nearest_approach"),
        "first_k_where_features_fall_behind": summary["crossing"],
        "feature_that_hurts": summary["harmful_feature"],
        "rank_of_the_feature_that_hurts": summary["harmful_rank"],
        **{f"probability_difference_transcoder_top{k}": by_k.get(k) for k in range(20, 25)},
        **{f"top_variance_feature_{i}": f for i, f in enumerate(summary["top_features"], start=1)},
    }
    lines = []
    for row in paper_table("greater_than"):
        quantity, printed, found = row["quantity"], row["value"], ours.get(row["quantity"])
        value = float("nan") if found is None else float(found)
        one = ("greater_than", quantity, float(printed), value, printed_tolerance(printed))
        line = check_line(*one)
        if not is_published:
            is_index = quantity.startswith(("top_variance_feature", "feature_that"))
            line |= {"tolerance": math.nan, "verdict": "other model"}
            line |= {"difference": math.nan} if is_index else {}
        lines.append(line)
    return pd.DataFrame(lines, columns=list(COLUMNS))


def greater_than_claims(summary: Mapping[str, Any], lags: pd.DataFrame, model: str) -> list[Line]:
    """Section 5.2's claims: the behaviour, the transcoder in the MLP's place, features and neurons, Figure 4."""
    published = {row["quantity"]: float(row["value"]) for row in paper_table("greater_than")}
    paper = {name.removeprefix("probability_difference_"): v for name, v in published.items()}
    measured = measured_evidence(summary["evidence"], lags)
    own = {name: one.in_words for name, one in measured.items()}
    worth = summary["evidence"]["worth"][0]
    ahead = len(summary["features_ahead_1_to_10"])
    later = int((lags["lag"] > 0).sum())
    r = f"r from {lags['r'].min():.2f} to {lags['r'].max():.2f}" if len(lags) else "not measurable"
    return [
        decided(
            "behaviour",
            f"{paper['original']:.3f} (GPT-2)",
            f"{own['behaviour']} ({model})",
            measured["behaviour"],
        ),
        decided(
            "kept",
            f"{paper['transcoder_all_features']:.3f} of {paper['original']:.3f}: {PAPER_KEPT:.0%} of what MLP 10 adds",
            f"{summary['all_features']:.3f} of {summary['original']:.3f}: {own['kept']} of what MLP "
            f"{summary['layer']} adds, {worth:.3f}",
            measured["kept"],
        ),
        decided(
            "first_features",
            f"features ahead for every k below {published['first_k_where_features_fall_behind']:.0f}",
            f"{own['first_features']}; ahead at {ahead} of the first 10 k",
            measured["first_features"],
        ),
        decided(
            "harmful",
            f"{paper['transcoder_all_features']:.3f} → {paper['transcoder_without_5315']:.3f} without 5315",
            f"{summary['all_features']:.3f} → {summary['without_harmful']:.3f} without "
            f"{summary['harmful_feature']}; on other prompts than chose it {own['harmful']}",
            measured["harmful"],
        ),
        decided(
            "shift",
            "three of three shown (read off Figure 4)",
            f"{later} of {len(lags)}; {r}",
            measured["shift"],
        ),
    ]


def measured_evidence(evidence: Mapping[str, Interval], lags: pd.DataFrame) -> dict[str, Measured]:
    """The statistics of Section 5.2 by the names of their rules, with their premises."""
    is_worth = is_worth_something(evidence["worth"])
    shares = {
        name: Measured(*evidence[name], is_worth) for name in ("kept", "first_features", "harmful")
    }
    shift = Measured(*shift_evidence(lags), not lags.empty)
    return {"behaviour": Measured(*evidence["original"]), **shares, "shift": shift}


def lag_table(results: GreaterThanResults) -> pd.DataFrame:
    """`best_lags` of Figure 4's features, kept beside it."""
    return save_table(best_lags(results.feature_curves), results.step, "lags")


def measured(run: Run) -> dict[str, Measured]:
    """Section 5.2's statistics."""
    found = run.greater_than
    return measured_evidence(found.summary["evidence"], best_lags(found.feature_curves))


def claims(run: Run) -> list[Line]:
    """Section 5.2's claims."""
    found = run.greater_than
    return greater_than_claims(found.summary, best_lags(found.feature_curves), run.preset.model)


# ---------------------------------------------------------------------------------------------
# Words


def components_in_words(results: GreaterThanResults) -> str:
    """Ours, of the ablation figure (Markdown)."""
    table, summary = results.components, results.summary
    head = tuple(summary["head"])
    line = table[(table["layer"] == head[0]) & (table["head"] == head[1])].iloc[0]
    mlp = table[(table["layer"] == summary["layer"]) & (table["head"] < 0)].iloc[0]
    ranked = table[table["head"] >= 0].sort_values("mean_drop", ascending=False)["component"]
    return (
        f"*Ours:* over {summary['n_prompts']} prompts, MLP {summary['layer']} (mean ablation costs "
        f"{mlp['mean_drop']:.3f}) and head {head[0]}.{head[1]} ({line['mean_drop']:.3f}), which varies most "
        "with the year among the heads that the MLP's features read; by ablation the first head is "
        f"{ranked.iloc[0].removeprefix('head ')}."
    )


def feature_curves_in_words(results: GreaterThanResults) -> str:
    """Ours, of Figure 4 (Markdown)."""
    curves, head = results.feature_curves, results.summary["head"]
    shares = [
        float(np.corrcoef(own["dla"], own["de_embedding"])[0, 1])
        for _, own in curves[curves["rank"] <= 10].groupby("feature")
        if own["de_embedding"].notna().all()
    ]
    median = f"{np.median(shares):.2f}" if shares else "not defined"
    return (
        f"*Ours:* the ten features whose activation varies most, through head {head[0]}.{head[1]}; median "
        f"correlation of attribution and de-embedding {median}."
    )


def _listed(ks: Sequence[int]) -> str:
    return f"{len(ks)} ({', '.join(map(str, ks))})" if ks else "none"


def ablation_in_words(results: GreaterThanResults) -> str:
    """Ours, of Figure 5, left (Markdown)."""
    summary = results.summary
    ahead, better = summary["features_ahead_1_to_10"], summary["ahead_without_harmful"]
    worth = summary["original"] - summary["mlp_bias_only"]
    if len(ahead) == 10:
        reading = "At equal k the features do better for every k from 1 to 10."
    else:
        reading = (
            f"At equal k the features do better at {_listed(ahead)} of the k from 1 to 10: this MLP adds "
            f"only {worth:.3f} to the metric, and its transcoder's output bias alone gives another start than "
            "the MLP's own bias, so the first features mostly repair that. The paper's claim is not borne out as "
            f"it stands; without the one feature that hurts (below) features are ahead at {_listed(better)}."
        )
    crossing = summary["crossing"]
    return (
        f"*Ours:* MLP {summary['layer']}, original {summary['original']:.3f}, all features "
        f"{summary['all_features']:.3f}; features first fall behind at k = "
        f"{'none' if crossing is None else crossing}. {reading}"
    )


def harmful_in_words(results: GreaterThanResults) -> str:
    """Ours, of Figure 5, right (Markdown)."""
    summary, best = results.summary, results.harmful.iloc[0]
    agree = int(best["unit"]) == summary["harmful_feature"] and best["gain"] > 0
    return (
        f"*Ours:* feature {summary['harmful_feature']} (number {summary['harmful_rank']} by variance): "
        f"{summary['all_features']:.3f} becomes {summary['without_harmful']:.3f}. Leaving out one of the first "
        f"fifty at a time, the largest gain is {best['gain']:+.4f} (feature {int(best['unit'])}). "
        + (
            "The two agree on it."
            if agree
            else "The steepest step and the largest gain are different features: a step depends on what is "
            "kept already."
        )
    )
