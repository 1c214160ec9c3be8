"""The headline statistics of Section 5.2 for the transcoder, and for what must not pass for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from tclib.greater_than.curves import Curve
from tclib.greater_than.evidence import Interval, kept_evidence, mean_interval
from tclib.greater_than.harm import harm_evidence
from tclib.greater_than.kinds import FEATURES, NEURONS, Analysed
from tclib.greater_than.task import probability_differences
from tclib.greater_than.units import AT_MEAN
from tclib.models.language_model import LanguageModel
from tclib.support.statistics import to_numpy

MEAN_ABLATED, UNTRAINED = "mean-ablated MLP", "untrained model"
STATISTICS = ("difference", "kept", "first_features", "harmful")


def controls_table(
    analysed: Analysed, curves: Mapping[tuple[str, str], Curve], random_model: LanguageModel
) -> pd.DataFrame:
    """One line a statistic of each kind of unit, of the mean-ablated MLP and of a model that learned nothing.

    Columns: control, statistic, value, low, high (95 %, over prompts). Statistics: `difference`, the probability
    difference with this in the MLP's place, all units kept (of the untrained model: its own); `kept`,
    `first_features` and `harmful`, as `verdicts.RULES` defines them. Of the transcoder with the others at their
    mean, the first features are held against neurons with the others at their mean, and what is kept is a share
    of what the MLP adds over the mean-ablated MLP.
    """
    neurons, mean_neurons = curves[NEURONS, "variance"], curves[NEURONS + AT_MEAN, "variance"]
    found = {name: curves[name, "variance"] for name in analysed.units if name != NEURONS}
    rows = {name: _shares(curve, neurons) for name, curve in found.items()}
    for name, curve in found.items():
        rows[name]["harmful"] = harm_evidence(analysed, curve, curves)
    by_mean = curves[FEATURES + AT_MEAN, "variance"]
    rows[by_mean.units] = _shares(by_mean, mean_neurons)
    # With no unit kept, the neurons' mean curve is the mean-ablated MLP, whatever k.
    rows[MEAN_ABLATED] = _shares(
        replace(mean_neurons, ks=(0,), values=mean_neurons.values[:1]), neurons
    )
    own = to_numpy(probability_differences(random_model, analysed.task.scored()))
    rows[UNTRAINED] = {"difference": mean_interval(own)}
    lines = [
        (control, name, *row[name])
        for control, row in rows.items()
        for name in STATISTICS
        if name in row
    ]
    return pd.DataFrame(lines, columns=["control", "statistic", "value", "low", "high"])


def _shares(curve: Curve, neurons: Curve) -> dict[str, Interval]:
    evidence = kept_evidence(curve, neurons)
    shares = {name: evidence[name] for name in ("kept", "first_features")}
    return {"difference": mean_interval(curve.values[-1]), **shares}
