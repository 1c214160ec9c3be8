"""What a root does to first order: the graph's total effect, finite differences, the real model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import GEOMETRIES, KINDS, freeze

from tclib.circuits.derivatives import (
    FOLLOWS,
    Follow,
    local_value,
    neuron_attributions,
    predicted_changes,
    root_gradients,
)
from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.graph import attribution_graph, total_effects
from tclib.circuits.interventions import ablated_values

EPSILON = 1e-5


def explained(
    frozen: FrozenPrompts, on_feature: bool = False
) -> tuple[Target, pd.DataFrame, np.ndarray]:
    """A root on the second prompt, the features of its graph, and their total effects."""
    root = frozen.feature_target(2, 3, 5, 1) if on_feature else frozen.logit_target({5: 1.0}, -1, 1)
    graph = attribution_graph(frozen, [root], prompt=1)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    return root, features, total_effects(graph)[features.index]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_norms_frozen_it_is_the_graphs_total_effect(geometry: str, kind: str) -> None:
    frozen = freeze(geometry, kind, layers=(0, 2) if kind == "skip" else (0, 1, 2))
    for on_feature in (False, True):
        root, features, totals = explained(frozen, on_feature)
        gradients = root_gradients(frozen, root, "frozen norms")
        np.testing.assert_allclose(
            predicted_changes(frozen, features, gradients), -totals, rtol=1e-7, atol=1e-10
        )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nothing_added_leaves_the_root_as_it_is(geometry: str) -> None:
    frozen = freeze(geometry, layers=(0, 2))
    nothing = torch.zeros(3, *frozen.cache.final_in.shape[1:], dtype=torch.float64)
    for root in (frozen.logit_target({5: 1.0}, -1, 1), frozen.feature_target(2, 3, 5, 1)):
        for follow in FOLLOWS[:-1]:
            value = local_value(frozen, root, nothing, follow)
            assert float(value) == pytest.approx(frozen.value(root), rel=1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("follow", FOLLOWS[:-1])
def test_it_is_what_a_small_change_does_in_the_same_partly_frozen_model(
    geometry: str, follow: Follow
) -> None:
    frozen = freeze(geometry, "skip")
    root, features, _ = explained(frozen)
    lines = features.sample(6, random_state=0)
    predicted = predicted_changes(frozen, lines, root_gradients(frozen, root, follow))
    for line, expected in zip(lines.itertuples(), predicted, strict=True):
        added = torch.zeros(3, *frozen.cache.final_in.shape[1:], dtype=torch.float64)
        decoder = frozen.transcoders[line.layer].decoder_direction(line.feature)
        added[line.layer, line.pos] = -EPSILON * line.activation * decoder
        moved = local_value(frozen, root, added, follow) - frozen.value(root)
        assert float(moved) / EPSILON == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_activation_times_gradient_is_what_a_small_ablation_does_in_the_model(
    geometry: str,
) -> None:
    frozen = freeze(geometry)
    for on_feature in (False, True):
        root, features, _ = explained(frozen, on_feature)
        features = features.sample(40, random_state=0)
        predicted = predicted_changes(frozen, features, root_gradients(frozen, root, "everything"))
        small = features.assign(activation=EPSILON * features["activation"])
        nothing = features.assign(activation=0.0)
        moved = ablated_values(frozen, small, root) - ablated_values(frozen, nothing, root)
        np.testing.assert_allclose(moved / EPSILON, predicted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_nothing_but_norms_to_follow_all_of_the_model_follows(geometry: str) -> None:
    """One token: its pattern is 1 whatever happens. The last layer: no MLP stands above it."""
    frozen = freeze(geometry, n_pos=1)
    root, features, totals = explained_alone(frozen)
    last = (features["layer"] == 2).to_numpy()
    norms, mlps, everything = (
        predicted_changes(frozen, features, root_gradients(frozen, root, follow))
        for follow in FOLLOWS[1:]
    )
    np.testing.assert_allclose(mlps, everything, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(norms[last], everything[last], rtol=1e-6)
    assert not np.allclose(norms[last], -totals[last], rtol=1e-2)
    assert not np.allclose(norms[~last], everything[~last], rtol=1e-2)
    # With the transcoders (and their errors) in the MLPs' places, the whole model does as predicted.
    some = slice(0, None, 5)
    moved = replaced_model_changes(frozen, root, features[some])
    np.testing.assert_allclose(moved / EPSILON, norms[some], rtol=2e-2, atol=2e-3)


def explained_alone(frozen: FrozenPrompts) -> tuple[Target, pd.DataFrame, np.ndarray]:
    root = frozen.logit_target({5: 1.0}, -1)
    graph = attribution_graph(frozen, [root])
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    return root, features, total_effects(graph)[features.index]


def replaced_model_changes(
    frozen: FrozenPrompts, root: Target, features: pd.DataFrame
) -> np.ndarray:
    """A small part of each feature taken out of the running model whose MLPs are transcoders with errors."""
    lm, found = frozen.lm, []
    tokens = frozen.cache.tokens[[root.prompt]]
    for line in features.itertuples():
        removed = EPSILON * line.activation * frozen.transcoders[line.layer].W_dec[line.feature]

        def replaced(
            layer: int, x: torch.Tensor, line: object, removed: torch.Tensor
        ) -> torch.Tensor:
            parts = frozen.parts[layer]
            y = parts.dictionary(x).reconstruction + parts.error[root.prompt]
            return y - removed if layer == line.layer else y  # type: ignore[attr-defined]

        with (
            lm.stand_in_for_mlp(0, lambda x, a=(line, removed): replaced(0, x, *a)),
            lm.stand_in_for_mlp(1, lambda x, a=(line, removed): replaced(1, x, *a)),
            lm.stand_in_for_mlp(2, lambda x, a=(line, removed): replaced(2, x, *a)),
        ):
            cache = lm.cache(tokens)
        value = root.constant + cache.final_in[0, -1] / cache.final_scale[0, -1] @ root.direction
        found.append(float(value) - frozen.value(root))
    return np.array(found)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_neurons_of_the_last_layer_are_attributed_through_their_output_weights(
    geometry: str,
) -> None:
    frozen = freeze(geometry, layers=(0, 2))
    root = frozen.logit_target({5: 1.0, 9: -1.0}, -1)
    found = neuron_attributions(frozen, root)
    run = frozen.lm.run_below(frozen.cache.tokens[[0]], 2)
    assert found.shape == (2, *run.neuron_acts.shape[1:])
    g = root_gradients(frozen, root, "everything")[2]
    expected = run.neuron_acts[0] * (g @ frozen.lm.neuron_weights(2).W_out.T)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6)
