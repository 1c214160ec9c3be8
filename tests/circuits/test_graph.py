"""Every node of every graph adds up; edges equal autograd, real changes, and the one-step sources."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import (
    GEOMETRIES,
    KINDS,
    N_CTX,
    TOLERANCE,
    freeze,
    frozen_forward,
    make_lm,
    measured_acts,
    random_rows,
    random_transcoder,
    unchecked_types,
)
from torch import Tensor

from tclib.circuits.edges import Heads
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import AttributionGraph, attribution_graph
from tclib.circuits.roots import top_logits
from tclib.circuits.sources import sources
from tclib.support.errors import InputError

HEADS: tuple[Heads, ...] = ("summed", "nodes")


@pytest.mark.parametrize(
    ("geometry", "dtype", "kind", "heads"),
    list(itertools.product(GEOMETRIES, (torch.float32, torch.float64), KINDS, HEADS)),
)
def test_every_node_adds_up(geometry: str, dtype: torch.dtype, kind: str, heads: Heads) -> None:
    graph = attribution_graph(freeze(geometry, kind, dtype), prompt=1, heads=heads)
    closure = graph.closure()
    assert len(closure) > 15
    assert (closure["left_out"] == 0).all()
    assert closure["residual"].abs().max() < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("geometry", "dtype"), list(itertools.product(GEOMETRIES, TOLERANCE)))
def test_every_node_adds_up_on_a_hundred_prompts_of_every_length(
    geometry: str, dtype: torch.dtype
) -> None:
    lm = make_lm(geometry, dtype)
    kinds = itertools.cycle(KINDS)
    with unchecked_types():  # types are checked above, on fewer prompts
        for i in range(100):
            transcoders = [random_transcoder(layer, next(kinds), dtype) for layer in (0, 2)]
            tokens = random_rows(1, 1 + i * 13 % N_CTX, seed=i).long()
            graph = attribution_graph(FrozenPrompts(lm, tokens, transcoders), max_feature_nodes=50)
            assert graph.closure()["residual"].abs().max() < TOLERANCE[dtype]


def gradient_edges(frozen: FrozenPrompts, target: tuple[int, int], pos: int) -> dict[int, Tensor]:
    """Activation × gradient of a pre-activation (layer, feature) at a token, by layer of source."""
    acts = {layer: z.requires_grad_() for layer, z in measured_acts(frozen).items()}
    pre_acts, _ = frozen_forward(frozen, frozen.cache.token_embedding, acts)
    layer, feature = target
    below = [lower for lower in acts if lower < layer]
    value = pre_acts[layer][0, pos, feature]
    grads = torch.autograd.grad(value, [acts[lower] for lower in below])
    return {k: (acts[k] * g)[0].detach() for k, g in zip(below, grads, strict=True)}


@pytest.mark.parametrize(
    ("geometry", "kind", "layers"),
    list(itertools.product(GEOMETRIES, KINDS, ((0, 1, 2), (0, 2)))),
)
def test_edges_equal_autograd_through_the_frozen_model(
    geometry: str, kind: str, layers: tuple[int, ...]
) -> None:
    frozen = freeze(geometry, kind, n_prompts=1, layers=layers)
    graph = attribution_graph(frozen)
    rows = graph.nodes.iloc[graph.targets].reset_index(drop=True)
    targets = rows[(rows["kind"] == "feature") & (rows["layer"] == 2)].iloc[::5]
    assert len(targets) > 3
    for row, line in targets.iterrows():
        expected = gradient_edges(frozen, (2, line["feature"]), line["pos"])
        for layer, effects in expected.items():
            columns = graph.nodes[
                (graph.nodes["kind"] == "feature") & (graph.nodes["layer"] == layer)
            ]
            found = torch.zeros_like(effects)
            place = (columns["pos"].to_list(), columns["feature"].to_list())
            found[place] = graph.edges[row, torch.from_numpy(columns.index.to_numpy().copy())]
            torch.testing.assert_close(found, effects, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("geometry", "kind"), list(itertools.product(GEOMETRIES, KINDS)))
def test_changing_an_activation_moves_the_next_targets_as_predicted(
    geometry: str, kind: str
) -> None:
    """Add ε to one feature with the freeze and all other features held: each target moves by ε · weight."""
    frozen = freeze(geometry, kind, n_prompts=1)
    graph = attribution_graph(frozen)
    features = graph.nodes[(graph.nodes["kind"] == "feature") & (graph.nodes["layer"] == 0)]
    column = int(features.sort_values("activation").index[-1])
    source, epsilon = graph.nodes.loc[column], 0.37
    acts = measured_acts(frozen)
    before, logits_before = frozen_forward(frozen, frozen.cache.token_embedding, acts)
    acts[0] = acts[0].clone()
    acts[0][0, source["pos"], source["feature"]] += epsilon
    after, logits_after = frozen_forward(frozen, frozen.cache.token_embedding, acts)
    n_checked = 0
    for row, node in enumerate(graph.targets):
        line = graph.nodes.loc[node]
        predicted = epsilon * float(graph.edges[row, column]) / source["activation"]
        if line["kind"] == "root":
            moved = (logits_after - logits_before)[0, -1, line["feature"]]
        else:
            place = (0, line["pos"], line["feature"])
            moved = after[line["layer"]][place] - before[line["layer"]][place]
        assert predicted == pytest.approx(float(moved), rel=1e-7, abs=1e-11)
        n_checked += predicted != 0
    assert n_checked > 10


# Without skips: a graph passes them through, the one-step list names them.
@pytest.mark.parametrize(
    ("geometry", "kind"), list(itertools.product(GEOMETRIES, ("relu", "topk")))
)
def test_with_heads_as_nodes_edges_are_the_one_step_sources(geometry: str, kind: str) -> None:
    frozen = freeze(geometry, kind, layers=(0, 2))
    root = frozen.feature_target(2, 3, 5, prompt=1)
    graph = attribution_graph(frozen, [root], prompt=1, heads="nodes")
    columns = ["kind", "layer", "head", "feature", "pos"]
    found = graph.nodes.assign(effect=graph.edges[-1].numpy()).set_index(columns)["effect"]
    expected = sources(frozen, [root])[0].table
    expected = expected[expected["kind"] != "constant"].set_index(columns)["contribution"]
    found, expected = found[found != 0].align(expected[expected != 0])
    assert len(found) > 50
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=1e-9, atol=1e-13)


def effects_by_name(graph: AttributionGraph) -> pd.Series:
    return graph.edge_table().set_index(["source", "target"])["effect"].sort_index()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_order_of_transcoders_and_other_prompts_change_nothing(geometry: str) -> None:
    frozen = freeze(geometry, "topk", n_prompts=3)
    tokens = frozen.cache.tokens
    reversed_order = [frozen.transcoders[layer] for layer in (2, 0, 1)]
    alone = FrozenPrompts(frozen.lm, tokens[1:2], reversed_order)
    one = effects_by_name(attribution_graph(frozen, prompt=1))
    other = effects_by_name(attribution_graph(alone))
    pd.testing.assert_series_equal(one, other, rtol=1e-9, atol=1e-12)


def test_a_batch_of_one_target_and_a_batch_of_all_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = freeze("neox", "relu")
    all_at_once = effects_by_name(attribution_graph(frozen))
    monkeypatch.setattr("tclib.circuits.edges._CARRIED_ELEMENTS", 1)
    one_by_one = effects_by_name(attribution_graph(frozen))
    pd.testing.assert_series_equal(all_at_once, one_by_one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_features", [1, 7, 30])
def test_a_smaller_graph_keeps_the_most_influential_and_still_adds_up(
    n_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tclib.circuits.graph.ROUND", 3)
    frozen = freeze("llama", "relu")
    whole = attribution_graph(frozen)
    small = attribution_graph(frozen, max_feature_nodes=n_features)
    assert (small.nodes["kind"] == "feature").sum() == n_features < len(whole.targets)
    closure = small.closure()
    assert closure["residual"].abs().max() < 1e-9
    assert (closure["left_out"] != 0).any()
    one, other = effects_by_name(small).align(effects_by_name(whole), join="left")
    np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), rtol=1e-9)


def test_without_bos_what_is_written_there_is_left_out() -> None:
    graph = attribution_graph(freeze("gpt2"), keep_bos=False)
    written = graph.nodes[graph.nodes["kind"].isin(["feature", "error"])]
    assert written["pos"].min() == 1
    assert graph.closure()["residual"].abs().max() < 1e-9


def test_roots_are_the_most_likely_tokens() -> None:
    frozen = freeze("gpt2")
    probabilities = frozen.cache.logits[0, -1].softmax(-1).sort(descending=True)
    enough = top_logits(frozen, probability=0.5, max_logits=100)
    assert sum(enough.weights) >= 0.5 > sum(enough.weights[:-1])
    assert enough.token_ids == probabilities.indices[: len(enough.weights)].tolist()
    assert len(top_logits(frozen, probability=1.0, max_logits=4).targets) == 4
    with pytest.raises(InputError, match="probability 0"):
        top_logits(frozen, probability=0)


def test_bad_input_is_named() -> None:
    frozen = freeze("gpt2")
    root = frozen.feature_target(2, 3, 5, prompt=1)
    with pytest.raises(InputError, match="of another prompt than 0"):
        attribution_graph(frozen, [root])
    with pytest.raises(InputError, match="no roots"):
        attribution_graph(frozen, [])
    with pytest.raises(InputError, match="max_feature_nodes 0"):
        attribution_graph(frozen, max_feature_nodes=0)
    with pytest.raises(InputError, match=r"lower max_feature_nodes, shorten the prompt"):
        attribution_graph(frozen, memory_limit_gib=1e-6)
