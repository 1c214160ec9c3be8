"""All tables, and the single figures, of one MLP on the task (paper Section 5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import l0
from tclib.features.from_weights import Head
from tclib.greater_than.components import component_attributions, reading_heads, strongest_head
from tclib.greater_than.controls import controls_table
from tclib.greater_than.curves import Curve, crossing, metric_of, nearest_approach
from tclib.greater_than.evidence import Interval, ahead_by_k, kept_evidence
from tclib.greater_than.feature_curves import feature_curves
from tclib.greater_than.harm import WITHOUT, harm_evidence, harmful_units, held_out_table
from tclib.greater_than.kinds import (
    FEATURES,
    MAIN,
    NEURONS,
    Analysed,
    all_curves,
    curve_table,
    prepare,
)
from tclib.greater_than.task import (
    GreaterThan,
    full_vocabulary_differences,
    mean_probability_difference,
)
from tclib.greater_than.units import AT_MEAN
from tclib.models.controls import untrained
from tclib.support.errors import InputError

N_CURVE_FEATURES = 10
Curves = Mapping[tuple[str, str], Curve]


def analyse(
    frozen: FrozenPrompts,
    task: GreaterThan,
    effects: pd.DataFrame,
    saes: Mapping[str, Dictionary],
    layer: int,
    head: Head | None,
    seed: int,
    control: Dictionary | None = None,
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """All tables, and the single figures, of one MLP.

    Args:
        frozen: the scored prompts of the task's first sentence, with transcoders.
        task: all prompts.
        effects: `ablation_effects` of every component.
        saes: dictionaries to compare with; the one nearest in L0 is taken.
        layer, head: the MLP, and the head that brings the year (None: the one that varies most with it).
        seed: of the random directions and of the untrained model.
        control: a transcoder of the MLP shuffled, if there is one.

    Errors: `InputError` if the layer has no transcoder.
    """
    if layer not in frozen.transcoders:
        raise InputError(
            f"the task runs through MLP {layer}, which has no transcoder: there is one at layers "
            f"{sorted(frozen.transcoders)}; train one there, or set greater_than.layer in the preset"
        )
    dictionary = frozen.transcoders[layer]
    one = first_template(task).scored()
    analysed = prepare(frozen.lm, task, dictionary, saes, seed, control)
    top = analysed.orders[FEATURES, "variance"][:N_CURVE_FEATURES].tolist()
    heads = reading_heads(frozen, dictionary, top, task.subject_pos)
    head = strongest_head(heads) if head is None else head
    curves = all_curves(analysed)
    found = [harmful_units(analysed, curves[name, "variance"]) for name in MAIN]
    harmful = pd.concat([table for table, _ in found], ignore_index=True)
    curves |= {(without.units, without.ranking): without for _, without in found}
    worst = int(_steepest(harmful, FEATURES)["unit"])
    shown = [*top, *([] if worst in top else [worst])]
    tables = {
        "components": effects.merge(component_attributions(frozen, one)),
        "reading_heads": heads,
        "feature_curves": feature_curves(frozen, one, frozen.transcoders, dictionary, head, shown),
        "curves": curve_table(list(curves.values())),
        "ahead": _ahead(curves),
        "harmful": harmful,
        "held_out_harm": held_out_table(analysed, curves),
        "controls": controls_table(analysed, curves, untrained(frozen.lm, seed)),
    }
    return tables, _summary(analysed, curves, tables, dictionary, head)


def first_template(task: GreaterThan) -> GreaterThan:
    """Only the first sentence, every year of it."""
    return task.subset([i for i, t in enumerate(task.template_idx) if t == task.template_idx[0]])


def _steepest(harmful: pd.DataFrame, kind: str) -> pd.Series:
    """The line of the unit after which the kept-k curve falls most."""
    return harmful[harmful["is_steepest"] & (harmful["kind"] == kind)].iloc[0]


def _ahead(curves: Curves) -> pd.DataFrame:
    """`ahead_by_k` of features over neurons: as they are, without the one that hurts, others at their mean."""
    pairs = [
        (FEATURES, NEURONS),
        (FEATURES + WITHOUT, NEURONS),
        (FEATURES + AT_MEAN, NEURONS + AT_MEAN),
    ]
    tables = []
    for one, other in pairs:
        table = ahead_by_k(curves[one, "variance"], curves[other, "variance"])
        table.insert(0, "units", one)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _summary(
    analysed: Analysed,
    curves: Curves,
    tables: Mapping[str, pd.DataFrame],
    dictionary: Dictionary,
    head: Head,
) -> dict[str, Any]:
    """The single figures that the paper states, and what was chosen."""
    lm, task, below = analysed.lm, analysed.task, analysed.below
    features, neurons = (curves[name, "variance"] for name in MAIN)
    without = curves[FEATURES + WITHOUT, "variance"]
    worst, worst_neuron = (_steepest(tables["harmful"], name) for name in MAIN)
    scored, is_text = task.scored(), task.tokens != lm.bos_id
    return {
        "evidence": _evidence(analysed, curves),
        "form": task.form,
        "layer": dictionary.config.layer,
        "head": list(head),
        "n_prompts": len(scored.numbers),
        "n_left_out": len(task.left_out),
        "original": mean_probability_difference(lm, task),
        "original_full_vocabulary": float(full_vocabulary_differences(lm, scored).mean()),
        "all_features": features.at(features.ks[-1]),
        "without_harmful": without.at(without.ks[-1]),
        "mlp_bias_only": neurons.at(0),
        "mlp_removed": metric_of(lm, task, below, torch.zeros_like(below.mlp_out)),
        "mlp_mean_ablated": curves[NEURONS + AT_MEAN, "variance"].at(0),
        "crossing": crossing(features, neurons),
        "nearest_approach": nearest_approach(features, neurons),
        "harmful_feature": int(worst["unit"]),
        "harmful_rank": int(worst["rank"]),
        "harmful_gain": float(worst["gain"]),
        "harmful_neuron": int(worst_neuron["unit"]),
        "harmful_neuron_gain": float(worst_neuron["gain"]),
        "l0": {name: l0(units.acts[is_text]) for name, units in analysed.units.items()},
        "top_features": analysed.orders[FEATURES, "variance"][:N_CURVE_FEATURES].tolist(),
    }


def _evidence(analysed: Analysed, curves: Curves) -> dict[str, Interval]:
    """What the claims are decided by, of the two main curves."""
    features, neurons = (curves[name, "variance"] for name in MAIN)
    harmful = harm_evidence(analysed, features, curves)
    return {**kept_evidence(features, neurons), "harmful": harmful}
