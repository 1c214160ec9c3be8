"""Taking a feature out of the free-running model, and what the graph predicts for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import (
    GEOMETRIES,
    KINDS,
    freeze,
    frozen_forward,
    make_lm,
    measured_acts,
    random_rows,
    random_transcoder,
)

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import attribution_graph, total_effects
from tclib.circuits.interventions import ablated_values, ablation_table
from tclib.features.connections import compare_connections
from tclib.features.examples import live_features
from tclib.features.from_weights import mean_pullbacks, pullback
from tclib.support.errors import InputError
from tclib.support.statistics import spearman, top_k_overlap


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_total_effects_of_all_leaves_make_up_the_root(geometry: str, kind: str) -> None:
    """Root = Σ leaves' totals + Σ features' biases, each passed on: every path is counted once."""
    frozen = freeze(geometry, kind, n_prompts=1)
    root = frozen.logit_target({5: 1.0, 9: -1.0}, -1)
    graph = attribution_graph(frozen, [root])
    total = total_effects(graph)
    is_feature = (graph.nodes["kind"] == "feature").to_numpy()
    z = graph.nodes["activation"].to_numpy()[graph.targets[:-1]]
    constants = (total[graph.targets[:-1]] / z * graph.constant[:-1]).sum() + graph.constant[-1]
    assert total[~is_feature].sum() + constants == pytest.approx(frozen.value(root), rel=1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_total_effects_are_gradients_through_open_features(geometry: str) -> None:
    frozen = freeze(geometry, "relu", n_prompts=1)
    root = frozen.logit_target({5: 1.0}, -1)
    graph = attribution_graph(frozen, [root])
    # A frozen model in which features follow their pre-activations: gates stay, sizes do not.
    gates = {layer: (z > 0).double() for layer, z in measured_acts(frozen).items()}
    acts = {layer: torch.zeros_like(z) for layer, z in gates.items()}
    shift = {layer: torch.zeros_like(z, requires_grad=True) for layer, z in gates.items()}
    for layer in sorted(gates):
        pre_acts, _ = frozen_forward(frozen, frozen.cache.token_embedding, acts)
        acts[layer] = pre_acts[layer] * gates[layer] + shift[layer]
    _, logits = frozen_forward(frozen, frozen.cache.token_embedding, acts)
    logits[0, -1, 5].backward()
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    expected = [
        float(shift[line.layer].grad[0, line.pos, line.feature]) * line.activation
        for line in features.itertuples()
    ]
    np.testing.assert_allclose(total_effects(graph)[features.index], expected, rtol=1e-8)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_feature_of_the_last_layer_is_taken_out_as_the_model_would(geometry: str) -> None:
    """By hand: the last MLP's output without z d, then the final norm and the unembedding."""
    frozen = freeze(geometry, "relu", n_prompts=1)
    lm = frozen.lm
    root = frozen.logit_target({5: 1.0, 9: -1.0}, -1)
    table = ablation_table(frozen, attribution_graph(frozen, [root]), root, 1000, seed=0)
    lines = table[(table["layer"] == 2) & (table["pos"] == frozen.n_pos - 1)]
    assert len(lines) > 3
    for line in lines.itertuples():
        decoder = frozen.transcoders[2].decoder_direction(line.feature)
        stream = frozen.cache.final_in[0, -1] - line.activation * lm.final_norm.centre(decoder)
        logits = stream / lm.final_norm.scale(stream) @ lm.W_U + lm.b_U
        actual = float(logits[5] - logits[9]) - frozen.value(root)
        assert line.actual == pytest.approx(actual, rel=1e-5, abs=1e-7)
        assert line.predicted_direct == pytest.approx(line.predicted_total, rel=1e-9)


def test_ablations_are_drawn_by_seed_and_checked() -> None:
    frozen = freeze("gpt2", "relu", n_prompts=1)
    root, other = frozen.logit_target({5: 1.0}, -1), frozen.logit_target({6: 1.0}, -1)
    graph = attribution_graph(frozen, [root])
    one, again, different = (
        ablation_table(frozen, graph, root, 10, seed)["name"].tolist() for seed in (1, 1, 2)
    )
    assert one == again != different and len(set(one)) == 10
    with pytest.raises(InputError, match="the graph explains"):
        ablation_table(frozen, graph, other, 10, 0)


def test_taking_nothing_out_changes_nothing() -> None:
    frozen = freeze("llama", "relu", n_prompts=2)
    root = frozen.logit_target({5: 1.0}, -1, prompt=1)
    features = attribution_graph(frozen, [root], prompt=1).nodes.iloc[:40].assign(activation=0.0)
    np.testing.assert_allclose(
        ablated_values(frozen, features, root), frozen.value(root), rtol=1e-6
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_connections_compare_the_two_pullbacks(geometry: str) -> None:
    frozen = freeze(geometry, "relu", n_prompts=1)
    lm, (earlier, _, later) = frozen.lm, frozen.transcoders.values()
    rows = random_rows(6)
    table = compare_connections(lm, later, [3, 7], earlier, rows)
    assert table["feature"].tolist() == [3, 7]
    z = later.encode(lm.read(rows.long(), {later.config.input_site})[later.config.input_site])
    z = z[:, 1:, 3].flatten()
    minimum = float(z[z > 0].double().quantile(0.2))
    mean = mean_pullbacks(lm, later, [3], earlier, rows, [minimum])[0]
    invariant = pullback(lm, later, 3, earlier)
    line = table.iloc[0]
    assert line["n_candidates"] == int((mean != 0).sum())
    assert line["spearman"] == pytest.approx(spearman(invariant[mean != 0], mean[mean != 0]))
    assert "overlap_10" not in table  # forty features are too few for a top ten to say anything
    assert top_k_overlap(invariant, invariant, 10) == 1.0


def test_live_features_are_drawn_from_those_that_fire() -> None:
    frozen: FrozenPrompts = freeze("gpt2", "relu", n_prompts=1)
    dictionary = frozen.transcoders[1]
    dictionary.b_enc[:30] = -1e6
    lm, rows = make_lm("gpt2"), random_rows(8)
    generator = torch.Generator().manual_seed(0)
    drawn = live_features(lm, dictionary, rows, 5, generator)
    assert len(set(drawn)) == 5 and min(drawn) >= 30
    with pytest.raises(InputError, match="11 live features asked for, but layer 1 has"):
        live_features(lm, dictionary, rows, 11, generator)


def test_one_dead_feature_moves_no_other_draw() -> None:
    lm, dictionary, rows = make_lm("gpt2"), random_transcoder(1, "relu"), random_rows(8)
    drawn = live_features(lm, dictionary, rows, 6, torch.Generator().manual_seed(0))
    dictionary.b_enc[drawn[2]] = -1e6
    again = live_features(lm, dictionary, rows, 6, torch.Generator().manual_seed(0))
    assert again[:5] == drawn[:2] + drawn[3:]
    assert again[5] not in drawn


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_with_norms_frozen_the_last_layers_features_move_the_root_exactly(geometry: str) -> None:
    frozen = freeze(geometry, "relu", n_prompts=2)
    root = frozen.logit_target({5: 1.0, 9: -1.0}, -1, prompt=1)
    graph = attribution_graph(frozen, [root], prompt=1)
    table = ablation_table(frozen, graph, root, 1000, seed=0)
    last = table[(table["layer"] == 2) & (table["pos"] == frozen.n_pos - 1)]
    np.testing.assert_allclose(
        last["actual_norms_frozen"], last["predicted_direct"], rtol=1e-4, atol=1e-6
    )
    assert not np.allclose(last["actual"], last["predicted_direct"], rtol=1e-2)
    feature_root = frozen.feature_target(2, 3, 5, prompt=1)
    below = attribution_graph(frozen, [feature_root], prompt=1)
    lines = below.nodes[(below.nodes["kind"] == "feature") & (below.nodes["layer"] == 1)]
    moved = ablated_values(frozen, lines, feature_root, freeze_norms=True)
    nothing = ablated_values(frozen, lines.assign(activation=0.0), feature_root, freeze_norms=True)
    np.testing.assert_allclose(nothing, frozen.value(feature_root), rtol=1e-4, atol=1e-6)
    assert np.abs(moved - nothing).max() > 1e-3
