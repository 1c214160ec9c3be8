"""Influence and scores by hand and by matrix inverse; pruned and merged graphs still add up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FEW, GEOMETRIES, KINDS, N_FEATURES, freeze, make_lm, random_rows, random_transcoder

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import (
    BIAS_KINDS,
    INPUT_KINDS,
    AttributionGraph,
    attribution_graph,
    with_influence,
)
from tclib.circuits.influence import edge_influence, node_influence, threshold_for
from tclib.circuits.prune import graph_scores, prune, prune_to_size, sum_over_tokens, supernodes
from tclib.circuits.sources import sources
from tclib.support.errors import InputError


def hand_graph() -> AttributionGraph:
    """Token → two features → root; an error into the second feature and into the root.

    Edges: f0 ← token 2 (all of it); f1 ← token 1, error −3; root ← f0 4, f1 −2, error 2.
    """
    lines = [
        ("f0", "feature", 0, 10, 1, 2.0),
        ("f1", "feature", 1, 11, 1, -2.0),
        ("error", "error", 0, -1, 1, np.nan),
        ("token", "embedding", -1, -1, 1, np.nan),
        ("bias", "decoder_bias", 0, -1, 1, np.nan),
        ("root", "root", 2, 5, 1, 5.0),
    ]
    nodes = pd.DataFrame(lines, columns=["name", "kind", "layer", "feature", "pos", "value"])
    nodes = nodes.assign(head=-1, activation=1.0, root_weight=[0.0] * 5 + [1.0], influence=0.0)
    edges = torch.tensor(
        [[0, 0, 0, 2, 0, 0], [0, 0, -3, 1, 0, 0], [4, -2, 2, 0, 1, 0]], dtype=torch.float64
    )
    graph = AttributionGraph(
        "hand", ("a", "b"), nodes, edges, np.array([0, 1, 5]), np.zeros(3), np.zeros(3)
    )
    return with_influence(graph)


def test_influence_by_hand() -> None:
    graph = hand_graph()
    influence = dict(zip(graph.nodes["name"], graph.nodes["influence"], strict=True))
    # root: 4/8 from f0, 2/8 from f1, 2/8 from the error; f1: 3/4 from the error, 1/4 from the token
    assert influence == pytest.approx(
        {
            "f0": 0.5,
            "f1": 0.25,
            "error": 0.25 + 0.25 * 0.75,
            "token": 0.5 + 0.25 * 0.25,
            "bias": 0.0,
            "root": 1.0,
        }
    )


def test_scores_by_hand() -> None:
    scores = graph_scores(hand_graph())
    assert scores.replacement == pytest.approx(0.5625 / (0.5625 + 0.4375))
    # all nodes count by influence (the root by 1): error share 1/4 at the root, 3/4 at f1, else 0
    everything = 1 + 0.5 + 0.25 + 0.4375 + 0.5625
    assert scores.completeness == pytest.approx(1 - (0.25 * 1 + 0.75 * 0.25) / everything)


def test_biases_carry_influence_where_that_is_asked_for() -> None:
    graph = with_influence(hand_graph(), INPUT_KINDS | BIAS_KINDS)
    assert graph.nodes.set_index("name")["influence"]["bias"] == pytest.approx(1 / 9)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_influence_is_the_sum_over_all_paths(geometry: str) -> None:
    graph = attribution_graph(freeze(geometry, "topk"))
    matrix = graph.edge_matrix()
    n_nodes = len(graph.nodes)
    square = torch.zeros(n_nodes, n_nodes, dtype=torch.float64)
    square[torch.from_numpy(graph.targets)] = graph.edges.abs() * matrix.counted
    square /= square.sum(1, keepdim=True).clamp(min=1e-300)
    weights = torch.from_numpy(graph.nodes["root_weight"].to_numpy().copy())
    expected = weights @ (torch.linalg.inv(torch.eye(n_nodes) - square) - torch.eye(n_nodes))
    found, passed_on = node_influence(matrix)
    torch.testing.assert_close(found, expected)
    by_edge = edge_influence(matrix)
    torch.testing.assert_close(by_edge.sum(0), expected)
    has_sources = (graph.edges.abs() * matrix.counted).sum(1) > 0
    torch.testing.assert_close(by_edge.sum(1), passed_on * has_sources)


def test_thresholds_by_hand() -> None:
    scores = torch.tensor([1.0, 5.0, 3.0, 1.0])
    assert [threshold_for(scores, share) for share in (0.0, 0.5, 0.79, 0.8, 0.81, 1.0)] == [
        *(5.0, 5.0, 3.0, 3.0, 1.0, 1.0)
    ]
    assert threshold_for(torch.zeros(3), 0.8) == 0.0


def test_pruning_by_hand() -> None:
    names = set(prune(hand_graph(), 0.6, 1.0).nodes["name"])
    # 0.5625 + 0.5 of 1.75 reach 0.6: f0 and the tokens stay, f1 and the error go
    assert names == {"f0", "token", "root"}
    assert set(prune(hand_graph(), 1.0, 1.0).nodes["name"]) == {*names, "f1", "error"}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pruned_graphs_add_up_and_have_no_loose_ends(geometry: str) -> None:
    graph = attribution_graph(freeze(geometry, "relu"))
    small = prune(graph, 0.5, 0.9)
    assert len(small.nodes) < len(graph.nodes)
    assert small.closure()["residual"].abs().max() < 1e-9
    features = small.nodes["kind"] == "feature"
    leads_on = (small.edges != 0).any(0).numpy()
    assert leads_on[features].all()
    is_explained = (small.edges != 0).any(1).numpy()
    assert is_explained[small.nodes["kind"].iloc[small.targets] == "feature"].all()
    with pytest.raises(InputError, match="node_threshold 1.5"):
        prune(graph, 1.5)
    with pytest.raises(InputError, match="edge_threshold -1"):
        prune(graph, 0.5, -1)


def test_supernodes_sum_values_and_effects() -> None:
    graph = hand_graph()
    merged = supernodes(graph, {"both": ["f0", "f1"]})
    assert merged.nodes["name"].tolist() == ["both", "error", "token", "bias", "root"]
    line = merged.nodes.set_index("name").loc["both"]
    assert (line["value"], line["kind"], line["feature"]) == (0.0, "feature", -1)
    effects = merged.edge_table().set_index(["source", "target"])["effect"]
    assert effects["both", "root"] == 2.0
    assert effects["token", "both"] == 3.0
    assert effects["error", "both"] == -3.0
    assert merged.closure()["residual"].abs().max() < 1e-12
    for groups, message in (
        ({"x": ["nobody"]}, "no nodes"),
        ({"x": ["f0"], "y": ["f0"]}, "two groups"),
        ({"x": ["root"]}, "cannot be in a group"),
        ({"token": ["f0"]}, "called as other nodes"),
    ):
        with pytest.raises(InputError, match=message):
            supernodes(graph, groups)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_summing_over_tokens_keeps_sums(geometry: str) -> None:
    graph = attribution_graph(freeze(geometry, "topk"))
    merged = sum_over_tokens(graph)
    assert len(merged.nodes) < len(graph.nodes)
    assert merged.nodes["name"].is_unique
    assert (merged.nodes["pos"] == -1).sum() > 10
    assert merged.closure()["residual"].abs().max() < 1e-9
    assert float(merged.edges.sum()) == pytest.approx(float(graph.edges.sum()))
    assert merged.nodes["influence"].sum() == pytest.approx(graph.nodes["influence"].sum())


def test_pruning_to_a_size_keeps_the_first_threshold_that_is_small_enough() -> None:
    graph = attribution_graph(freeze("gpt2", n_prompts=1))
    large, small = prune(graph, 0.8, 0.9), prune(graph, 0.4, 0.9)
    assert len(small.nodes) < len(large.nodes)
    found = prune_to_size(graph, len(large.nodes) - 1, 0.8, 0.9)
    assert 0 < len(found.nodes) < len(large.nodes)
    same = prune_to_size(graph, len(large.nodes), 0.8, 0.9)
    assert len(same.nodes) == len(large.nodes)
    with pytest.raises(InputError, match="max_nodes 1: .* always stay"):
        prune_to_size(graph, 1)


SHARES = st.floats(0.0, 1.0)


GEOMETRY = st.sampled_from(GEOMETRIES)
KIND_OF_LAYER = st.dictionaries(st.sampled_from((0, 1, 2)), st.sampled_from(KINDS), min_size=1)
N_POS, SEED = st.integers(1, 12), st.integers(0, 1000)


def frozen_prompt(
    geometry: str, kind_of_layer: dict[int, str], n_pos: int, seed: int
) -> FrozenPrompts:
    transcoders = [random_transcoder(layer, kind) for layer, kind in kind_of_layer.items()]
    return FrozenPrompts(make_lm(geometry), random_rows(1, n_pos, seed).long(), transcoders)


@FEW
@given(GEOMETRY, KIND_OF_LAYER, N_POS, SEED, st.data())
def test_the_sources_of_any_target_add_up(
    geometry: str, kind_of_layer: dict[int, str], n_pos: int, seed: int, data: st.DataObject
) -> None:
    frozen = frozen_prompt(geometry, kind_of_layer, n_pos, seed)
    pos = data.draw(st.integers(0, frozen.n_pos - 1))
    layer = data.draw(st.sampled_from(sorted(frozen.transcoders)))
    feature = data.draw(st.integers(0, N_FEATURES - 1))
    targets = [frozen.feature_target(layer, feature, pos), frozen.logit_target({feature: 1.0}, pos)]
    for target, found in zip(targets, sources(frozen, targets), strict=True):
        assert found.value == pytest.approx(frozen.value(target))
        assert abs(found.residual) < 1e-9


@pytest.mark.slow
@FEW
@given(GEOMETRY, KIND_OF_LAYER, N_POS, SEED, SHARES, SHARES)
def test_however_a_graph_is_pruned_every_target_adds_up(
    geometry: str,
    kind_of_layer: dict[int, str],
    n_pos: int,
    seed: int,
    node_threshold: float,
    edge_threshold: float,
) -> None:
    graph = attribution_graph(frozen_prompt(geometry, kind_of_layer, n_pos, seed))
    small = prune(graph, node_threshold, edge_threshold)
    totals = []
    for one in (graph, small):
        names = one.nodes["name"].to_numpy()[one.targets]
        total = one.constant + one.edges.sum(1).numpy() + one.left_out
        totals.append(pd.Series(total, names))
    whole, pruned = totals
    assert set(pruned.index) <= set(whole.index)
    np.testing.assert_allclose(pruned, whole[pruned.index], rtol=1e-9, atol=1e-9)
    assert small.closure()["residual"].abs().max() < 1e-9
