"""One MLP on the task's prompts, in every kind of unit: curves, and the feature that hurts (paper Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.greater_than.curves import (
    Curve,
    ablation_curve,
    k_grid,
    leave_one_out,
    rank_by_attribution,
    steepest_drop,
)
from tclib.greater_than.task import (
    GreaterThan,
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
from tclib.support.statistics import bootstrap_means, interval

FEATURES, NEURONS, CONTROL = "transcoder features", "neurons", "random directions"


WITHOUT = "transcoder features, without the one that hurts"


class Analysed(NamedTuple):
    """The MLP under study on the task's prompts, with all kinds of units it can be written in."""

    lm: LanguageModel
    task: GreaterThan
    below: LowerRun
    units: dict[str, Units]
    orders: dict[tuple[str, str], Int[Tensor, "unit"]]

    def curve(self, units: str, ranking: str, dense_to: int, remove: bool = False) -> Curve:
        """One curve; `ranking` is variance or attribution."""
        own = self.units[units]
        order = self.orders[units, ranking]
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
    """The lower run, all kinds of units, and their rankings."""
    below = lm.run_below(task.tokens, dictionary.config.layer)
    features = dictionary_units(dictionary, below, FEATURES)
    generator = torch.Generator().manual_seed(seed)
    kinds = [features, neuron_units(lm, below), random_direction_units(features, generator)]
    if saes:
        kinds.append(dictionary_units(_nearest_l0(saes, below, features), below, "SAE features"))
    units = {kind.name: kind for kind in kinds}
    orders = {}
    for kind in kinds:
        orders[kind.name, "variance"] = rank_by_variance(kind, task)
        orders[kind.name, "attribution"] = rank_by_attribution(lm, task, below, kind)
    return Analysed(lm, task, below, units, orders)


def _nearest_l0(saes: Mapping[str, Dictionary], below: LowerRun, features: Units) -> Dictionary:
    """The SAE whose L0 on the prompts is nearest to the transcoder's, as a ratio."""

    def distance(sae: Dictionary) -> float:
        return abs(math.log((_l0(sae.encode(below.mlp_out)) + 1e-9) / _l0(features.acts)))

    return min(saes.values(), key=distance)


def _l0(acts: Float[Tensor, "prompt pos unit"]) -> float:
    """Mean number of active units a token, the first token left out."""
    return float((acts[:, 1:] > 0).sum(-1).double().mean())


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


def _curve_table(curves: list[Curve]) -> pd.DataFrame:
    """Columns: units, ranking, k, value, low, high: mean and 95 % interval over prompts."""
    tables = []
    for curve in curves:
        generator = np.random.default_rng(0)
        low, high = interval(bootstrap_means(curve.values.T, generator))
        tables.append(
            pd.DataFrame(
                {
                    "units": curve.units,
                    "ranking": curve.ranking,
                    "k": curve.ks,
                    "value": curve.mean,
                    "low": low,
                    "high": high,
                }
            )
        )
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
