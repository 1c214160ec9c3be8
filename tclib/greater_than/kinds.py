"""One MLP on the task's prompts, in every kind of unit that it can be written in, and the curves of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import l0
from tclib.greater_than.curves import Curve, ablation_curve, k_grid, rank_by_attribution
from tclib.greater_than.task import GreaterThan
from tclib.greater_than.units import (
    Units,
    at_mean,
    dictionary_units,
    neuron_units,
    random_direction_units,
    rank_by_variance,
)
from tclib.models.language_model import LanguageModel
from tclib.models.running import LowerRun
from tclib.support.statistics import bootstrap_means, interval

FEATURES, NEURONS, SAE = "transcoder features", "neurons", "SAE features"
RANDOM, SHUFFLED = "random directions", "transcoder of the shuffled MLP"
MAIN = (FEATURES, NEURONS)
DENSE_TO, MAIN_DENSE_TO, ATTRIBUTION_DENSE_TO = (
    60,
    100,
    30,
)  # every k up to there; the paper draws 60


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

    def mean_curve(self, units: str) -> Curve:
        """As `curve` by variance, but what is not kept goes to its mean (`at_mean`) instead of to 0."""
        own, order = at_mean(self.units[units], self.task), self.orders[units, "variance"]
        ks = k_grid(own.n_units, DENSE_TO)
        return ablation_curve(self.lm, self.task, self.below, own, order, ks, ranking="variance")


def prepare(
    lm: LanguageModel,
    task: GreaterThan,
    dictionary: Dictionary,
    saes: Mapping[str, Dictionary],
    seed: int,
    control: Dictionary | None = None,
) -> Analysed:
    """The lower run, all kinds of units, and their rankings (variance: over the misfits too).

    `control` is the transcoder of `with_shuffled_mlp`, which is not of this model: it is only held finite.
    """
    for one in (dictionary, *saes.values()):
        one.check_model(lm)
    if control is not None:
        control.check_finite()
    below = lm.run_below(task.tokens, dictionary.config.layer)
    runs = [below, *(lm.run_below(tokens, below.layer) for tokens in task.misfits)]
    units, orders = {}, {}
    for kind, *misfits in _kinds(lm, runs, task, dictionary, saes, control, seed):
        units[kind.name] = kind
        orders[kind.name, "variance"] = rank_by_variance(kind, task, misfits)
        orders[kind.name, "attribution"] = rank_by_attribution(lm, task, below, kind)
    return Analysed(lm, task, below, units, orders)


def _kinds(
    lm: LanguageModel,
    runs: list[LowerRun],
    task: GreaterThan,
    dictionary: Dictionary,
    saes: Mapping[str, Dictionary],
    control: Dictionary | None,
    seed: int,
) -> Iterator[list[Units]]:
    """Every kind of unit, of the task's run and of each of its misfits'."""
    features = [dictionary_units(dictionary, run, FEATURES) for run in runs]
    yield features
    yield [neuron_units(lm, run) for run in runs]
    yield [random_direction_units(one, torch.Generator().manual_seed(seed)) for one in features]
    if saes:
        nearest = _nearest_l0(saes, runs[0], features[0], task.tokens != lm.bos_id)
        yield [dictionary_units(nearest, run, SAE) for run in runs]
    if control is not None:
        yield [dictionary_units(control, run, SHUFFLED) for run in runs]


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

    return min(saes.values(), key=lambda sae: round(distance(sae), 4))  # a tie: the first


def all_curves(analysed: Analysed) -> dict[tuple[str, str], Curve]:
    """Curves by (units, ranking).

    Every kind is kept by both rankings. Features and neurons are removed, too (a control holds nothing that could
    be taken away), and kept with the others at their mean.
    """
    found = []
    for name in analysed.units:
        is_main = name in MAIN
        found.append(analysed.curve(name, "variance", MAIN_DENSE_TO if is_main else DENSE_TO))
        found.append(analysed.curve(name, "attribution", ATTRIBUTION_DENSE_TO))
        if is_main:
            found.append(analysed.curve(name, "attribution", ATTRIBUTION_DENSE_TO, remove=True))
            found.append(analysed.mean_curve(name))
    return {(curve.units, curve.ranking): curve for curve in found}


def curve_table(curves: list[Curve]) -> pd.DataFrame:
    """Columns: units, ranking, k, value, low, high: mean and 95 % interval over prompts."""
    tables = []
    for curve in curves:
        low, high = interval(bootstrap_means(curve.values.T, np.random.default_rng(0)))
        columns = {"units": curve.units, "ranking": curve.ranking, "k": curve.ks}
        tables.append(pd.DataFrame({**columns, "value": curve.mean, "low": low, "high": high}))
    return pd.concat(tables, ignore_index=True)
