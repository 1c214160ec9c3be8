"""Taking a feature out of the free-running model, and what the graph predicts for it."""

from __future__ import annotations

import numpy as np
import pandas as pd
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

from tclib.circuits.frozen import FrozenPrompts, target_values
from tclib.circuits.graph import attribution_graph, total_effects
from tclib.circuits.interventions import (
    PREDICTIONS,
    ROWS_PER_FORWARD,
    ablated_values,
    ablation_table,
    prediction_table,
)
from tclib.features import connections
from tclib.features.connections import compare_connections, random_directions
from tclib.features.examples import live_features
from tclib.features.from_weights import activation_quantiles, mean_pullbacks, pullback
from tclib.support.errors import InputError
from tclib.support.statistics import top_k_overlap


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
    table = ablation_table(frozen, attribution_graph(frozen, [root]), root)
    lines = table[(table["layer"] == 2) & (table["pos"] == frozen.n_pos - 1)]
    assert len(lines) > 3
    for line in lines.itertuples():
        decoder = frozen.transcoders[2].decoder_direction(line.feature)
        stream = frozen.cache.final_in[0, -1] - line.activation * lm.final_norm.centre(decoder)
        logits = stream / lm.final_norm.scale(stream) @ lm.W_U + lm.b_U
        actual = float(logits[5] - logits[9]) - frozen.value(root)
        assert line.actual == pytest.approx(actual, rel=1e-5, abs=1e-7)


def test_every_feature_of_the_graph_is_taken_out() -> None:
    frozen = freeze("gpt2", "relu", n_prompts=1)
    root, other = frozen.logit_target({5: 1.0}, -1), frozen.logit_target({6: 1.0}, -1)
    graph = attribution_graph(frozen, [root])
    table = ablation_table(frozen, graph, root)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    assert table["name"].tolist() == features["name"].tolist() and len(table) > ROWS_PER_FORWARD
    with pytest.raises(InputError, match="the graph explains"):
        ablation_table(frozen, graph, other)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_feature_below_the_root_is_taken_out_as_in_a_run_from_the_start(geometry: str) -> None:
    """Layers below the feature are not run again; that changes nothing."""
    frozen = freeze(geometry, "relu", n_prompts=2)
    lm, root = frozen.lm, frozen.feature_target(2, 3, 5, prompt=1)
    nodes = attribution_graph(frozen, [root], prompt=1).nodes
    lines = nodes[(nodes["kind"] == "feature") & (nodes["layer"] == 1)].iloc[:5]
    for line, value in zip(lines.itertuples(), ablated_values(frozen, lines, root), strict=True):
        removed = torch.zeros_like(frozen.cache.mlp_out[1][1])
        removed[line.pos] = line.activation * frozen.transcoders[1].decoder_direction(line.feature)
        with lm.override_mlp(1, lambda _x, y, removed=removed: y - removed):
            expected = target_values(lm.cache(frozen.cache.tokens[[1]]), root)
        assert value == pytest.approx(float(expected), rel=1e-5)


def test_predictions_are_told_apart_by_layer() -> None:
    """Exact at layer 0; too large and in another order at layer 1."""
    exact, half = np.array([1.0, -2.0, 3.0, 0.5]), np.array([1.0, 4.0, 3.0, 2.0])
    table = pd.DataFrame({"layer": [0] * 4 + [1] * 4, "actual": [*exact, *half[::-1]]})
    for column in PREDICTIONS.values():
        table[column] = [*exact, *(2 * half)]
    found = prediction_table(table).set_index(["layer", "follows"])
    first, second = found.loc[("0", "everything")], found.loc[("1", "everything")]
    assert first[["rank_correlation", "slope", "median_miss"]].tolist() == [1.0, 1.0, 0.0]
    assert second[["n_features", "slope"]].tolist() == [
        4,
        3 / 8,
    ]  # ratios 1, 3/8, 4/6, 1/4 by weight
    assert second["rank_correlation"] == pytest.approx(0.6)
    assert found.loc[("all", "frozen norms")]["n_features"] == 8


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
    table = compare_connections(lm, later, [3, 7], earlier, rows, torch.Generator())
    assert table["feature"].tolist() == [3, 7]
    z = later.encode(lm.read(rows.long(), {later.config.input_site})[later.config.input_site])
    z = z[:, 1:, 3].flatten()
    minimum = float(z[z > 0].double().quantile(0.2))
    mean = mean_pullbacks(lm, later, [3], earlier, rows, [minimum])[0]
    assert table.iloc[0]["n_candidates"] == int((mean != 0).sum())
    assert "overlap_10" not in table  # forty features are too few for a top ten to say anything
    invariant = pullback(lm, later, 3, earlier)
    assert top_k_overlap(invariant, invariant, 10) == 1.0


def test_overlaps_stand_beside_those_of_random_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "OVERLAP_KS", (4,))
    frozen = freeze("gpt2", "relu", n_prompts=1)
    lm, (earlier, _, later) = frozen.lm, frozen.transcoders.values()
    rows = random_rows(6)
    features = live_features(lm, later, rows, 20, torch.Generator().manual_seed(0))

    def table(seed: int) -> pd.DataFrame:
        generator = torch.Generator().manual_seed(seed)
        return compare_connections(lm, later, features, earlier, rows, generator)

    one, again, other = table(0), table(0), table(1)
    pd.testing.assert_frame_equal(one, again)
    assert (one["overlap_4"] == other["overlap_4"]).all()
    assert (one["random_overlap_4"] != other["random_overlap_4"]).any()
    minima = activation_quantiles(lm, later, features, rows, 0.2)
    means = mean_pullbacks(lm, later, features, earlier, rows, minima)
    for feature, mean, line in zip(features, means, one.itertuples(), strict=True):
        invariant, is_active = pullback(lm, later, feature, earlier), mean != 0
        assert line.overlap_4 == top_k_overlap(invariant, mean, 4)
        assert line.active_overlap_4 == top_k_overlap(invariant[is_active], mean[is_active], 4)
    # The transcoder itself is random here: its overlap is that of random decoders.
    columns = ["overlap_4", "random_overlap_4"]
    assert abs(np.diff(one[columns].mean())[0]) < 0.15
    drawn = random_directions(2 * earlier.W_dec, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.norm(dim=1), 2 * earlier.W_dec.norm(dim=1))


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
