"""The unit that hurts: the worst feature, and beside it the worst neuron, chosen and tested in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from tclib.greater_than.curves import (
    Curve,
    ablation_curve,
    k_grid,
    leave_one_out,
    steepest_drop,
    values_of,
)
from tclib.greater_than.evidence import Interval, generator, mean_interval
from tclib.greater_than.kinds import MAIN, NEURONS, Analysed
from tclib.greater_than.task import GreaterThan
from tclib.support.statistics import ratio_interval

WITHOUT = ", without the one that hurts"
WITHIN = 50  # of the ranking, among which the one that hurts is looked for


def harmful_units(analysed: Analysed, curve: Curve) -> tuple[pd.DataFrame, Curve]:
    """Who hurts: the steepest drop of the curve, confirmed by leaving out each of the first fifty.

    Returns the table of `leave_one_out` with kind, rank and is_steepest, and the curve without that unit.
    """
    lm, task, below = analysed.lm, analysed.task, analysed.below
    units, order = analysed.units[curve.units], analysed.orders[curve.units, "variance"]
    suspect = steepest_drop(curve, order)
    candidates = order[:WITHIN].tolist()
    table = leave_one_out(lm, task, below, units, candidates)
    rank = {unit: i for i, unit in enumerate(candidates, start=1)}
    table = table.assign(rank=table["unit"].map(rank), is_steepest=table["unit"] == suspect)
    table.insert(0, "kind", curve.units)
    rest = order[order != suspect]
    silenced = replace(units.without(suspect), name=curve.units + WITHOUT)
    ks = k_grid(len(rest))
    return table, ablation_curve(lm, task, below, silenced, rest, ks, ranking="variance")


def halves(task: GreaterThan) -> dict[tuple[str, str], Bool[np.ndarray, "scored_prompt"]]:
    """How the scored prompts are split: which are tested, by (on what a unit is chosen, on what it is tested).

    By years always, by sentences where there are several.
    """
    scored = task.scored()
    is_odd = np.array([number % 2 == 1 for number in scored.numbers])
    is_other = np.array([one != task.template_idx[0] for one in scored.template_idx])
    found = {("even years", "odd years"): is_odd}
    return found | ({("first sentence", "other sentences"): is_other} if is_other.any() else {})


def held_out_gain(
    analysed: Analysed, curve: Curve, is_tested: Bool[np.ndarray, "scored_prompt"]
) -> tuple[int, Float[np.ndarray, "tested_prompt"]]:
    """The unit that hurts most on some scored prompts, and what leaving it out adds on each of the others.

    Chosen and measured on different prompts, so that it is no gain of the choice alone.
    """
    units, order = analysed.units[curve.units], analysed.orders[curve.units, "variance"]
    suspect = steepest_drop(replace(curve, values=curve.values[:, ~is_tested]), order)
    whole, without = (
        values_of(analysed.lm, analysed.task, analysed.below, one.output())
        for one in (units, units.without(suspect))
    )
    return suspect, (without - whole)[is_tested]


def held_out_table(analysed: Analysed, curves: Mapping[tuple[str, str], Curve]) -> pd.DataFrame:
    """`held_out_gain` of features and of neurons, for each of `halves`.

    Columns: kind, chosen_on, tested_on, unit, gain, low, high (95 %, over the tested prompts), n_prompts.
    """
    lines = []
    for (chosen_on, tested_on), is_tested in halves(analysed.task).items():
        for kind in MAIN:
            unit, gain = held_out_gain(analysed, curves[kind, "variance"], is_tested)
            gained = dict(zip(("gain", "low", "high"), mean_interval(gain), strict=True))
            which = {"kind": kind, "chosen_on": chosen_on, "tested_on": tested_on, "unit": unit}
            lines.append({**which, **gained, "n_prompts": len(gain)})
    return pd.DataFrame(lines)


def harm_evidence(
    analysed: Analysed, curve: Curve, curves: Mapping[tuple[str, str], Curve]
) -> Interval:
    """`held_out_gain` of a curve's units on odd years less that of neurons, as a share of the MLP's worth there."""
    neurons = curves[NEURONS, "variance"]
    is_odd = halves(analysed.task)["even years", "odd years"]
    gain, neuron_gain = (held_out_gain(analysed, one, is_odd)[1] for one in (curve, neurons))
    worth = (neurons.values[-1] - neurons.values[0])[is_odd]
    return ratio_interval(gain - neuron_gain, worth, generator())
