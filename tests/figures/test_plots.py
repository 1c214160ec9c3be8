"""Figures show the values that they were given."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from tclib.figures.circuits import CIRCUITS, faithfulness_over_size, predicted_against_actual
from tclib.figures.greater_than import probability_heatmap
from tclib.figures.style import save_figure
from tclib.figures.training import (
    layer_faithfulness,
    over_tokens,
    sparsity_faithfulness,
    training_curves,
)
from tclib.replication.sweep import paper_sweep
from tclib.support.steps import Step, write_manifest

mpl.use("Agg")


def sweep_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "kind": ["transcoder"] * 2 + ["sae_mlp_out"] * 2,
            "l0": [20.0, 10.0, 25.0, 12.0],
            "ce": [1.1, 1.2, 1.15, 1.25],
            "sparsity": [1e-4, 2e-4, 1e-4, 2e-4],
            "ce_original": 1.0,
            "ce_mean_ablated": 3.0,
            "ce_increase_low": [0.09, 0.19, 0.14, 0.24],
            "ce_increase_high": [0.11, 0.21, 0.16, 0.26],
        }
    )


def test_figure_3_has_a_panel_a_model_and_the_papers_points_in_the_last() -> None:
    figure = sparsity_faithfulness({"ours": sweep_table()}, paper_sweep())
    ours, paper = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in ours.lines}
    np.testing.assert_allclose(lines["transcoder"], [[10, 1.2], [20, 1.1]])
    np.testing.assert_allclose(lines["SAE on mlp_out"], [[12, 1.25], [25, 1.15]])
    assert "L0" in ours.get_xlabel()
    assert "nats" in ours.get_ylabel()
    published = {line.get_label(): line.get_xydata() for line in paper.lines}
    assert published["transcoder"][0] == pytest.approx([27.45423, 3.3682058])
    assert {t.get_text() for t in ours.texts} >= {"1", "2"}


def test_training_curves_have_a_line_a_dictionary_in_every_panel() -> None:
    log = pd.DataFrame(
        {
            "n_tokens": [1e6, 2e6] * 2,
            "dictionary": ["a", "a", "b", "b"],
            "loss": [4.0, 3, 2, 1],
            "l0": [9.0, 8, 7, 6],
            "fvu": [0.4, 0.3, 0.2, 0.1],
            "dead_share": 0.0,
        }
    )
    figure = training_curves(log)
    assert [len(axis.lines) for axis in figure.axes] == [2, 2, 2, 2]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_xydata(), [[1, 2], [2, 1]])


def test_layer_bars_are_the_tables() -> None:
    table = pd.DataFrame(
        {"layer": [0, 1], "l0": [5, 6], "fvu": [0.1, 0.2], "ce_recovered": [0.9, 0.8]}
    )
    figure = layer_faithfulness(table)
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.1, 0.2]


def test_predictions_have_a_panel_each_and_a_point_a_feature() -> None:
    table = pd.DataFrame({"layer": [0, 0, 1], "actual": [1.0, -0.01, 0.0], "p": [0.5, -0.02, 0.1]})
    figure = predicted_against_actual(table, {"one": "p", "itself": "actual"}, "logits")
    for axis, column in zip(figure.axes, ("p", "actual"), strict=True):
        points = {tuple(point) for point in axis.collections[0].get_offsets().tolist()}
        assert points == set(zip(table[column], table["actual"], strict=True))
        assert axis.get_xscale() == axis.get_yscale() == "symlog"


def test_circuits_are_drawn_by_direction_and_errors() -> None:
    lines = [
        ("dropped", "graph", "keep", 1, False, 0.2),
        ("dropped", "graph", "keep", 5, False, 0.6),
        ("dropped", "graph", "keep", 3, True, 0.4),
        ("kept", "pruned graph", "remove", 3, True, 0.1),
        ("none", "neurons", "keep", 2, False, 0.05),
    ]
    names = ["errors", "kind", "direction", "k", "is_pruned_size", "score"]
    summary = pd.DataFrame(lines, columns=names)
    figure = faithfulness_over_size(summary.assign(low=summary["score"], high=summary["score"]))
    panels = {
        axis.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        for axis in figure.axes
    }
    graph, neurons, pruned = (
        CIRCUITS[kind]["label"] for kind in ("graph", "neurons", "pruned graph")
    )
    assert panels["kept alone, errors dropped"][graph] == [[1, 0.2], [5, 0.6]]
    assert panels["kept alone, errors kept"][neurons] == [[2, 0.05]]
    assert panels["taken out, errors kept"][pruned] == [[3, 0.1]]
    assert panels["taken out, errors dropped"][graph] == []


def test_a_saved_figure_is_in_the_manifest(tmp_path) -> None:
    step = Step("demo", "00_model_and_data", tmp_path / "00", "tclib run")
    step.folder.mkdir()
    write_manifest(step, {}, {}, 0.0)
    save_figure(probability_heatmap(np.eye(100), "title"), step, "heat")
    extras = __import__("json").loads((step.folder / "manifest.json").read_text())["extras"]
    assert set(extras) == {"heat.png", "heat.pdf"}
    assert (step.folder / "heat.png").stat().st_size > 5000


def test_the_token_panel_has_a_tick_a_budget() -> None:
    lines = [
        {"kind": kind, "n_tokens": n, "ce": 1.3, "l0": 9.0, "ce_original": 1.2}
        for kind in ("transcoder", "sae_mlp_out")
        for n in (150_000, 2_400_000)
    ]
    bounds = {"ce_increase_low": 0.05, "ce_increase_high": 0.15}
    figure = over_tokens(pd.DataFrame(lines).assign(**bounds), "title")
    for axis in figure.axes:
        assert [text.get_text() for text in axis.get_xticklabels()] == ["0.15", "2.4"]
    assert len(figure.axes[1].lines) == 2
