"""Leads, the unit that hurts, and the shift, on what was planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import random_transcoder, tiny_lm
from tiny_task import in_two_sentences, make_task

from tclib.greater_than.controls import MEAN_ABLATED, UNTRAINED, controls_table
from tclib.greater_than.curves import Curve
from tclib.greater_than.evidence import ahead_by_k
from tclib.greater_than.feature_curves import highest_third
from tclib.greater_than.harm import halves, harmful_units, held_out_gain, held_out_table
from tclib.greater_than.kinds import (
    FEATURES,
    MAIN,
    NEURONS,
    RANDOM,
    SHUFFLED,
    Analysed,
    all_curves,
    prepare,
)
from tclib.greater_than.units import AT_MEAN
from tclib.models.controls import untrained


def curve(values: np.ndarray) -> Curve:
    return Curve("u", "r", tuple(range(len(values))), values)


def test_a_lead_counts_only_where_its_interval_leaves_out_nothing() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.3, (4, 200))
    moved = base + np.array([0.0, 0.05, 0.0, -0.05])[:, None]
    moved[2] += 0.001 + 0.2 * (-1.0) ** np.arange(
        200
    )  # ahead in the mean; the prompts do not agree
    table = ahead_by_k(curve(moved), curve(base), range(1, 4))
    assert table["lead"].tolist() == [1, 0, -1]
    assert table["difference"][0] == pytest.approx(0.05)
    assert ahead_by_k(curve(base), curve(base), [1])["lead"].tolist() == [0]  # equal is no lead


def analysed() -> Analysed:
    """A tiny task in two sentences, whose feature 7 writes against the metric."""
    lm, task = tiny_lm(), in_two_sentences(make_task())
    dictionary = random_transcoder(2, "relu", torch.float32)
    against = -(task.is_greater[5].float() * 2 - 1)
    dictionary.W_dec[7] = 3 * lm.W_U[:, task.answer_ids] @ against
    dictionary.W_enc[:, 7] *= 4
    dictionary.b_enc[7] = 1.0
    return prepare(lm, task, dictionary, {}, 0, random_transcoder(2, "skip", torch.float32))


def test_the_worst_unit_is_chosen_on_one_half_and_tested_on_the_other() -> None:
    found = analysed()
    features = found.curve(FEATURES, "variance", 60)
    splits = halves(found.task)
    assert list(splits) == [("even years", "odd years"), ("first sentence", "other sentences")]
    for is_tested in splits.values():
        unit, gain = held_out_gain(found, features, is_tested)
        assert unit == 7 and len(gain) == is_tested.sum() and gain.mean() > 0.1
        # What happens on the tested prompts has no say in the choice.
        other = features.values.copy()
        other[:, is_tested] = np.random.default_rng(0).normal(size=other[:, is_tested].shape)
        assert held_out_gain(found, replace(features, values=other), is_tested)[0] == 7
    table, without = harmful_units(found, features)
    assert set(table["kind"]) == {FEATURES} and table[table["is_steepest"]]["unit"].item() == 7
    assert without.at(without.ks[-1]) == pytest.approx(table[table["unit"] == 7]["value"].item())


def test_features_and_neurons_are_treated_alike_and_controls_are_all_there() -> None:
    found = analysed()
    curves = all_curves(found)
    for name in found.units:
        assert {(name, "variance"), (name, "attribution")} <= curves.keys()
    held_out = held_out_table(found, curves)
    assert (
        held_out.groupby(["chosen_on", "tested_on"])["kind"].apply(list).tolist()
        == [list(MAIN)] * 2
    )
    table = controls_table(found, curves, untrained(found.lm, 0)).set_index(
        ["control", "statistic"]
    )
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    names = (FEATURES, RANDOM, SHUFFLED, FEATURES + AT_MEAN, MEAN_ABLATED, UNTRAINED)
    assert set(table.index.get_level_values("control")) == set(names)
    neurons = curves[NEURONS, "variance"]
    worth = neurons.mean[-1] - neurons.mean[0]
    for name in (FEATURES, RANDOM, SHUFFLED):
        own = curves[name, "variance"].mean
        assert table.loc[(name, "difference"), "value"] == pytest.approx(own[-1])
        kept = (own[-1] - neurons.mean[0]) / worth
        assert table.loc[(name, "kept"), "value"] == pytest.approx(kept)
    mean = curves[NEURONS + AT_MEAN, "variance"].mean[0]
    assert table.loc[(MEAN_ABLATED, "difference"), "value"] == pytest.approx(mean)
    ahead = np.mean([mean - neurons.mean[k] for k in range(1, 11)]) / worth
    assert table.loc[(MEAN_ABLATED, "first_features"), "value"] == pytest.approx(ahead)
    assert list(table.loc[UNTRAINED].index) == ["difference"]


def test_the_third_on_which_a_curve_is_highest() -> None:
    values = [5.0] * 3 + [4.0] * 3 + [4.5] * 3
    curves = pd.DataFrame({"feature": 1, "answer": range(9), "dla": values})
    assert highest_third(curves, 1, "dla") == ("early", (5.0, 4.0, 4.5))
    assert highest_third(curves.assign(dla=curves["answer"]), 1, "dla")[0] == "late"
    assert (
        highest_third(curves.assign(dla=1.0), 1, "dla")[0] == "early"
    )  # a tie goes to the earlier
