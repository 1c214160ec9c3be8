"""One MLP on the task's prompts, in every kind of unit: curves, and the feature that hurts (paper Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import l0
from tclib.features.from_weights import Head
from tclib.greater_than.components import component_attributions, reading_heads, strongest_head
from tclib.greater_than.curves import (
    Curve,
    ablation_curve,
    crossing,
    k_grid,
    leave_one_out,
    metric_of,
    nearest_approach,
    rank_by_attribution,
    steepest_drop,
)
from tclib.greater_than.evidence import Interval, gain_without, harm_evidence, kept_evidence
from tclib.greater_than.feature_curves import feature_curves
from tclib.greater_than.task import (
    GreaterThan,
    full_vocabulary_differences,
    mean_probability_difference,
)
from tclib.greater_than.units import (
    Units,
    dictionary_units,
    neuron_units,
    random_direction_units,
    rank_by_variance,
)
from tclib.models.language_model import LanguageModel
from tclib.models.running import LowerRun
from tclib.support.errors import InputError
from tclib.support.statistics import bootstrap_means, interval

FEATURES, NEURONS, CONTROL = "transcoder features", "neurons", "random directions"
WITHOUT = "transcoder features, without the one that hurts"
N_CURVE_FEATURES = 10


class Analysed(NamedTuple):
    """The MLP under study on the task's prompts, with all kinds of units it can be written in."""

    lm: LanguageModel
    task: GreaterThan
    below: LowerRun
    units: dict[str, Units]
    orders: dict[tuple[str, str], Int[Tensor, "unit"]]

    def curve(self, units: str, ranking: str, dense_to: int, remove: bool = False) -> Curve:
        """One curve; `ranking` is variance or attribution."""
        own, order = self.units[units], self.orders[units, ranking]
        name = f"removed, {ranking}" if remove else ranking
        ks = k_grid(own.n_units, dense_to)
        return ablation_curve(self.lm, self.task, self.below, own, order, ks, remove, name)


def prepare(
    lm: LanguageModel,
    task: GreaterThan,
    dictionary: Dictionary,
    saes: Mapping[str, Dictionary],
    seed: int,
) -> Analysed:
    """The lower run, all kinds of units, and their rankings (variance: over the misfits too)."""
    for one in (dictionary, *saes.values()):
        one.check_model(lm)
    below = lm.run_below(task.tokens, dictionary.config.layer)
    runs = [below, *(lm.run_below(tokens, below.layer) for tokens in task.misfits)]
    features = [dictionary_units(dictionary, run, FEATURES) for run in runs]
    kinds = [
        features,
        [neuron_units(lm, run) for run in runs],
        [random_direction_units(one, torch.Generator().manual_seed(seed)) for one in features],
    ]
    if saes:
        nearest = _nearest_l0(saes, below, features[0], task.tokens != lm.bos_id)
        kinds.append([dictionary_units(nearest, run, "SAE features") for run in runs])
    orders = {}
    for kind, *misfits in kinds:
        orders[kind.name, "variance"] = rank_by_variance(kind, task, misfits)
        orders[kind.name, "attribution"] = rank_by_attribution(lm, task, below, kind)
    return Analysed(lm, task, below, {kind[0].name: kind[0] for kind in kinds}, orders)


def _nearest_l0(
    saes: Mapping[str, Dictionary],
    below: LowerRun,
    features: Units,
    is_text: Bool[Tensor, "prompt pos"],
) -> Dictionary:
    """The SAE whose L0 on the prompts is nearest to the transcoder's, as a ratio, BOS left out."""
    wanted = l0(features.acts[is_text])

    def distance(sae: Dictionary) -> float:
        return abs(math.log((l0(sae.encode(below.mlp_out)[is_text]) + 1e-9) / wanted))

    return min(saes.values(), key=distance)


def all_curves(analysed: Analysed) -> dict[tuple[str, str], Curve]:
    """Curves by (units, ranking): the paper's two in full, the others on a coarser grid."""
    curves = {}
    for name in analysed.units:
        is_main = name in (FEATURES, NEURONS)
        curves[name, "variance"] = analysed.curve(name, "variance", 100 if is_main else 30)
        if name == CONTROL:
            continue
        curves[name, "attribution"] = analysed.curve(name, "attribution", 30)
        if is_main:
            removed = analysed.curve(name, "attribution", 30, remove=True)
            curves[name, removed.ranking] = removed
    return curves


def curve_table(curves: list[Curve]) -> pd.DataFrame:
    """Columns: units, ranking, k, value, low, high: mean and 95 % interval over prompts."""
    tables = []
    for curve in curves:
        low, high = interval(bootstrap_means(curve.values.T, np.random.default_rng(0)))
        columns = {"units": curve.units, "ranking": curve.ranking, "k": curve.ks}
        tables.append(pd.DataFrame({**columns, "value": curve.mean, "low": low, "high": high}))
    return pd.concat(tables, ignore_index=True)


def harmful_features(analysed: Analysed, curve: Curve) -> tuple[pd.DataFrame, Curve]:
    """Who hurts: the steepest drop of the curve, confirmed by leaving out each of the first fifty.

    Returns the table of `leave_one_out` with rank and is_steepest, and the curve without that feature.
    """
    lm, task, below = analysed.lm, analysed.task, analysed.below
    units, order = analysed.units[FEATURES], analysed.orders[FEATURES, "variance"]
    suspect = steepest_drop(curve, order)
    candidates = order[:50].tolist()
    table = leave_one_out(lm, task, below, units, candidates)
    rank = {feature: i for i, feature in enumerate(candidates, start=1)}
    table = table.assign(rank=table["unit"].map(rank), is_steepest=table["unit"] == suspect)
    rest = order[order != suspect]
    silenced = replace(units.without(suspect), name=WITHOUT)
    ks = k_grid(len(rest))
    return table, ablation_curve(lm, task, below, silenced, rest, ks, ranking="variance")


def analyse(
    frozen: FrozenPrompts,
    task: GreaterThan,
    effects: pd.DataFrame,
    saes: Mapping[str, Dictionary],
    layer: int,
    head: Head | None,
    seed: int,
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """All tables, and the single figures, of one MLP.

    Args:
        frozen: the scored prompts of the task's first sentence, with transcoders.
        task: all prompts.
        effects: `ablation_effects` of every component.
        saes: dictionaries to compare with; the one nearest in L0 is taken.
        layer, head: the MLP, and the head that brings the year (None: the one that varies most with it).
        seed: of the random directions.

    Errors: `InputError` if the layer has no transcoder.
    """
    if layer not in frozen.transcoders:
        raise InputError(
            f"the task runs through MLP {layer}, which has no transcoder: there is one at layers "
            f"{sorted(frozen.transcoders)}; train one there, or set greater_than.layer in the preset"
        )
    dictionary = frozen.transcoders[layer]
    one = first_template(task).scored()
    analysed = prepare(frozen.lm, task, dictionary, saes, seed)
    top = analysed.orders[FEATURES, "variance"][:N_CURVE_FEATURES].tolist()
    heads = reading_heads(frozen, dictionary, top, task.subject_pos)
    head = strongest_head(heads) if head is None else head
    curves = all_curves(analysed)
    harmful, without = harmful_features(analysed, curves[FEATURES, "variance"])
    worst = int(harmful[harmful["is_steepest"]].iloc[0]["unit"])
    shown = [*top, *([] if worst in top else [worst])]
    tables = {
        "components": effects.merge(component_attributions(frozen, one)),
        "reading_heads": heads,
        "feature_curves": feature_curves(frozen, one, frozen.transcoders, dictionary, head, shown),
        "curves": curve_table([*curves.values(), without]),
        "harmful": harmful,
    }
    return tables, _summary(analysed, curves, harmful, without, dictionary, head)


def first_template(task: GreaterThan) -> GreaterThan:
    """Only the first sentence, every year of it."""
    return task.subset([i for i, t in enumerate(task.template_idx) if t == task.template_idx[0]])


def _summary(
    analysed: Analysed,
    curves: Mapping[tuple[str, str], Curve],
    harmful: pd.DataFrame,
    without: Curve,
    dictionary: Dictionary,
    head: Head,
) -> dict[str, Any]:
    """The single figures that the paper states, and what was chosen."""
    lm, task, below = analysed.lm, analysed.task, analysed.below
    features, neurons = curves[FEATURES, "variance"], curves[NEURONS, "variance"]
    suspect = harmful[harmful["is_steepest"]].iloc[0]
    scored, is_text = task.scored(), task.tokens != lm.bos_id
    return {
        "evidence": _evidence(analysed, features, neurons),
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
        "crossing": crossing(features, neurons),
        "nearest_approach": nearest_approach(features, neurons),
        "features_ahead_1_to_10": [k for k in range(1, 11) if features.at(k) > neurons.at(k)],
        "ahead_without_harmful": [k for k in range(1, 11) if without.at(k) > neurons.at(k)],
        "harmful_feature": int(suspect["unit"]),
        "harmful_rank": int(suspect["rank"]),
        "harmful_gain": float(suspect["gain"]),
        "best_single_gain_feature": int(harmful.iloc[0]["unit"]),
        "l0": {name: l0(units.acts[is_text]) for name, units in analysed.units.items()},
        "top_features": analysed.orders[FEATURES, "variance"][:N_CURVE_FEATURES].tolist(),
    }


def _evidence(analysed: Analysed, features: Curve, neurons: Curve) -> dict[str, Interval]:
    """What the claims are decided by, of the two main curves."""
    lm, task, below = analysed.lm, analysed.task, analysed.below
    feature_gain, neuron_gain = (
        gain_without(
            lm, task, below, analysed.units[name], analysed.orders[name, "variance"], curve
        )
        for name, curve in ((FEATURES, features), (NEURONS, neurons))
    )
    is_odd = [number % 2 == 1 for number in task.scored().numbers]
    worth = (neurons.values[-1] - neurons.values[0])[is_odd]
    harmful = harm_evidence(feature_gain, neuron_gain, worth)
    return {**kept_evidence(features, neurons), "harmful": harmful}
