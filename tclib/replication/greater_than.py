"""Notebook 06: the greater-than circuit, its features' two curves, and features against neurons.

components.csv   every MLP and head: mean and zero ablation, direct attribution
reading_heads.csv   which heads carry the year into the chosen MLP's features
feature_curves.csv   Figure 4: direct logit attribution and de-embedding of each feature over YY
curves.csv   Figure 5 left: probability difference against k, mean and interval, every ranking and kind
ahead.csv    at which of the first ten k features lead, neurons lead, or neither
harmful.csv  Figure 5 right: what leaving single features, or single neurons, out changes
held_out_harm.csv   the same for the one that hurts, chosen on some prompts and tested on others
controls.csv the headline statistics for the transcoder, and for what must not pass for one
summary.json the single figures (original, all features, without the harmful one, where the curves cross)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

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
from tclib.greater_than.controls import STATISTICS
from tclib.greater_than.evidence import Interval, is_kept, is_worth_something
from tclib.greater_than.feature_curves import highest_third
from tclib.greater_than.kinds import FEATURES
from tclib.greater_than.lags import best_lags, shift_evidence, shift_test
from tclib.greater_than.task import GreaterThan, mean_probability_difference
from tclib.models.controls import with_shuffled_mlp
from tclib.replication.artifacts import GreaterThanResults, Trained
from tclib.replication.checks import COLUMNS, check_line, printed_tolerance
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.transcoders import Teacher, train_once
from tclib.replication.verdicts import RULES, Line, Measured, decided, verdict
from tclib.support.files import new_file
from tclib.support.progress import progress
from tclib.support.steps import ensure, save_table, write_csv

STEP = "06_greater_than"
COMPONENTS_STEP = f"{STEP}_components"
SAES_STEP = f"{STEP}_saes"
CONTROL_STEP = f"{STEP}_control"
REPLACEMENTS_STEP = f"{STEP}_replacements"
CONTROL_SHARE = 4  # the control's transcoder sees a quarter of the tokens that the others see
# (0.798 − 0.629) / (0.883 − 0.629): the value with the bias alone is read off Figure 5.
PAPER_KEPT = 0.665
TABLES = (
    "components",
    "reading_heads",
    "feature_curves",
    "curves",
    "ahead",
    "harmful",
    "held_out_harm",
    "controls",
)
THIRDS_OF = {"reads": "de_embedding", "promotes": "dla"}
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


def _control(run: Run) -> Trained | None:
    """A transcoder of the same recipe, on a quarter of the tokens, of the chosen MLP with its neurons shuffled.

    None where the transcoders are the released ones, whose recipe is not this run's, or none is of that MLP.
    """
    config, layer, seed = run.preset.transcoders, chosen_layer(run), run.preset.seed
    if config.published or layer not in config.chosen_layers(run.lm):
        return None
    full = config.training
    training = replace(
        full,
        n_tokens=max(full.batch_size, full.n_tokens // CONTROL_SHARE),
        warmup_steps=full.warmup_steps // CONTROL_SHARE,
        decay_steps=full.decay_steps // CONTROL_SHARE,
        cache_activations=False,  # of a model that nothing else reads
    )
    teacher = Teacher(
        f"MLP {layer} shuffled by seed {seed}", lambda: with_shuffled_mlp(run.lm, layer, seed)
    )
    return train_once(run, CONTROL_STEP, [config.at("transcoder", layer)], training, teacher)


def _learned(trained: Trained) -> dict[str, float]:
    """The end of a dictionary's training: its tokens, and L0 and FVU on its last batch."""
    last = trained.log.iloc[-1]
    return {"n_tokens": int(last["n_tokens"]), "l0": float(last["l0"]), "fvu": float(last["fvu"])}


def make_greater_than(run: Run) -> GreaterThanResults:
    """The artifacts of step 06, made once; the SAE nearest in L0 is set beside the transcoder.

    Errors: `InputError` if the chosen layer has no transcoder.
    """
    step, config = run.step(STEP), run.preset.greater_than
    trained, controls = _task_saes(run), _control(run)
    saes = trained.dictionaries if trained else {}
    control = next(iter(controls.dictionaries.values())) if controls else None
    # The control's file may have the name of the transcoder's.
    hashes = {
        f"control {name}": value for name, value in (controls.hashes if controls else {}).items()
    }
    hashes |= trained.hashes if trained else {}
    inputs = {"model": run.model_hash, **run.trained.hashes, **hashes}

    def make() -> Mapping[str, Any]:
        task = task_of(run)
        tokens = first_template(task).scored().tokens
        frozen = FrozenPrompts(run.lm, tokens, run.transcoders.values())
        head = None if config.head is None else Head(*config.head)
        layer = chosen_layer(run)
        seed = run.preset.seed
        tables, summary = analyse(frozen, task, run.components, saes, layer, head, seed, control)
        summary["control"] = None if controls is None else _learned(controls)
        for name, table in tables.items():
            write_csv(table, step, name)
        with new_file(step.folder / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2))
        return summary

    # Runs of earlier versions, which had other tables, are refused.
    parameters = {**asdict(config), "seed": run.preset.seed, "tables": list(TABLES)}
    ensure(step, parameters, inputs, make)
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
        "figure_4": lambda: feature_curve_figure(features, best_lags(features)),
        "figure_5_left": lambda: ablation_figure(curves, summary),
        "figure_5_right": lambda: harmful_figure(curves, features, found.held_out_harm, summary),
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


def greater_than_claims(
    summary: Mapping[str, Any], ahead: pd.DataFrame, curves: pd.DataFrame, model: str
) -> list[Line]:
    """Section 5.2's claims: the behaviour, the transcoder in the MLP's place, features and neurons, Figure 4."""
    published = {row["quantity"]: float(row["value"]) for row in paper_table("greater_than")}
    paper = {name.removeprefix("probability_difference_"): v for name, v in published.items()}
    lags = best_lags(curves)
    measured = measured_evidence(summary["evidence"], lags)
    own = {name: one.in_words for name, one in measured.items()}
    worth, layer = summary["evidence"]["worth"][0], summary["layer"]
    return [
        decided(
            "behaviour",
            f"{paper['original']:.3f} (GPT-2)",
            f"{own['behaviour']} ({model})",
            measured["behaviour"],
        ),
        decided(
            "kept",
            f"{paper['transcoder_all_features']:.3f} of {paper['original']:.3f}: {PAPER_KEPT:.0%} of what MLP 10 "
            "adds over its output bias alone",
            f"{summary['all_features']:.3f} of {summary['original']:.3f}: {own['kept']} of the {worth:.3f} that "
            f"MLP {layer} adds over its output bias alone",
            measured["kept"],
        ),
        decided(
            "first_features",
            f"features ahead for every k below {published['first_k_where_features_fall_behind']:.0f}",
            f"{own['first_features']}; of k from 1 to 10 {leads_in_words(ahead, FEATURES)}",
            measured["first_features"],
        ),
        decided(
            "harmful",
            f"{paper['transcoder_all_features']:.3f} → {paper['transcoder_without_5315']:.3f} without 5315",
            f"{summary['all_features']:.3f} → {summary['without_harmful']:.3f} without "
            f"{summary['harmful_feature']}; on other prompts than chose it, less the worst neuron's gain, "
            f"{own['harmful']}",
            measured["harmful"],
        ),
        decided(
            "shift",
            "three of three shown (read off Figure 4)",
            _shift_in_words(curves, lags),
            measured["shift"],
        ),
    ]


def _shift_in_words(curves: pd.DataFrame, lags: pd.DataFrame) -> str:
    test = shift_test(curves)
    if test is None:
        return "not measurable"
    return f"{test.in_words}; r from {lags['r'].min():.2f} to {lags['r'].max():.2f}"


def leads_in_words(ahead: pd.DataFrame, units: str) -> str:
    """At how many k features lead, neurons lead, or neither does."""
    lead = ahead[ahead["units"] == units]["lead"]
    counts = {"features lead at": 1, "neurons at": -1, "ties at": 0}
    return ", ".join(f"{what} {int((lead == sign).sum())}" for what, sign in counts.items())


def measured_evidence(evidence: Mapping[str, Interval], lags: pd.DataFrame) -> dict[str, Measured]:
    """The statistics of Section 5.2 by the names of their rules, with their premises."""
    is_worth = is_worth_something(evidence["worth"])
    shares = {name: Measured(*evidence[name], is_worth) for name in ("kept", "first_features")}
    harmful = Measured(*evidence["harmful"], is_worth and is_kept(evidence["kept"]))
    shift = Measured(*shift_evidence(lags), not lags.empty)
    behaviour = Measured(*evidence["original"])
    return {"behaviour": behaviour, **shares, "harmful": harmful, "shift": shift}


def lag_table(results: GreaterThanResults) -> pd.DataFrame:
    """`best_lags` of Figure 4's features and which third of the answers each reads and promotes, kept beside it."""
    curves, lags = results.feature_curves, best_lags(results.feature_curves)
    shapes = [
        {name: highest_third(curves, feature, column)[0] for name, column in THIRDS_OF.items()}
        for feature in lags["feature"]
    ]
    table = pd.concat([lags, pd.DataFrame(shapes, columns=list(THIRDS_OF))], axis=1)
    return save_table(table, results.step, "lags")


def controls_shown(results: GreaterThanResults) -> pd.DataFrame:
    """The controls, one a row: each statistic with its interval, and what its rule says of it."""
    is_worth = is_worth_something(results.summary["evidence"]["worth"])
    by_name = results.controls.set_index(["control", "statistic"])

    def cell(line: Any) -> str:
        found = f"{line.value:+.3f} ({line.low:+.3f} to {line.high:+.3f})"
        if line.statistic not in RULES:
            return found
        holds = is_worth
        if line.statistic == "harmful":
            holds &= is_kept(tuple(by_name.loc[(line.control, "kept")]))
        measured = Measured(line.value, line.low, line.high, holds)
        return f"{found}: {verdict(line.statistic, measured)}"

    table = results.controls.assign(cell=[cell(line) for line in results.controls.itertuples()])
    wide = table.pivot(index="control", columns="statistic", values="cell").fillna("")
    return wide.loc[table["control"].unique(), list(STATISTICS)]


def measured(run: Run) -> dict[str, Measured]:
    """Section 5.2's statistics."""
    found = run.greater_than
    return measured_evidence(found.summary["evidence"], best_lags(found.feature_curves))


def claims(run: Run) -> list[Line]:
    """Section 5.2's claims."""
    found = run.greater_than
    return greater_than_claims(found.summary, found.ahead, found.feature_curves, run.preset.model)
