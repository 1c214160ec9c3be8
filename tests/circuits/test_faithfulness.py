"""Circuits kept alone in the running model: what stays is what was said to stay."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import GEOMETRIES, freeze

from tclib.circuits.faithfulness import (
    circuit_readings,
    faithfulness_curves,
    faithfulness_summary,
    features_alone,
    neurons_alone,
)
from tclib.circuits.frozen import FrozenPrompts, Target, target_values
from tclib.circuits.graph import AttributionGraph, attribution_graph
from tclib.circuits.prune import prune
from tclib.support.errors import InputError

PROMPT = 1
EACH_KIND = (
    ("gpt2", "relu"),
    ("gpt2", "topk"),
    ("neox", "batch_topk"),
    ("llama", "jumprelu"),
    ("llama", "skip"),
)


def explained(frozen: FrozenPrompts) -> tuple[Target, AttributionGraph, pd.DataFrame]:
    root = frozen.logit_target({5: 1.0, 9: -1.0}, -1, prompt=PROMPT)
    graph = attribution_graph(frozen, [root], prompt=PROMPT)
    return root, graph, graph.nodes[graph.nodes["kind"] == "feature"]


def values_alone(
    frozen: FrozenPrompts, root: Target, features: pd.DataFrame, keep: torch.Tensor, errors: bool
) -> np.ndarray:
    def alone(batch: torch.Tensor) -> object:
        return features_alone(frozen, features, batch, errors, root.prompt)

    readings = circuit_readings(frozen, root, alone, keep)
    return (root.constant + readings @ root.direction).numpy()


@pytest.mark.parametrize(("geometry", "kind"), EACH_KIND)
def test_all_features_alone_with_errors_are_the_model(geometry: str, kind: str) -> None:
    frozen = freeze(geometry, kind, layers=(0, 2) if kind == "skip" else (0, 1, 2))
    root, _, features = explained(frozen)
    everything = torch.ones(1, len(features), dtype=torch.bool)
    (value,) = values_alone(frozen, root, features, everything, True)
    assert value == pytest.approx(frozen.value(root), rel=1e-5)
    (without,) = values_alone(frozen, root, features, everything, False)
    assert abs(without - value) > 1e-3


@pytest.mark.parametrize(
    ("geometry", "kind", "errors"),
    [
        ("gpt2", "relu", True),
        ("neox", "relu", False),
        ("llama", "skip", True),
        ("gpt2", "jumprelu", True),
    ],
)
def test_circuits_are_run_as_each_would_be_by_itself(
    geometry: str, kind: str, errors: bool
) -> None:
    """By hand: all features encoded, those outside the circuit set to zero; an MLP without one runs."""
    frozen = freeze(geometry, kind, layers=(0, 2))
    root, _, features = explained(frozen)
    keep = torch.rand(40, len(features), generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0] = False
    found = values_alone(frozen, root, features, keep, errors)
    for row in (0, 1, 39):
        kept = features[keep[row].numpy()]

        def by_hand(layer: int, kept: pd.DataFrame, x: torch.Tensor) -> torch.Tensor:
            parts = frozen.parts[layer]
            z, lines = parts.dictionary.encode(x), kept[kept["layer"] == layer]
            masked = torch.zeros_like(z)
            places = (0, lines["pos"].tolist(), lines["feature"].tolist())
            masked[places] = z[places]
            output = parts.dictionary.decode(masked, x)
            return output + parts.error[PROMPT] if errors else output

        with (
            frozen.lm.stand_in_for_mlp(0, partial(by_hand, 0, kept)),
            frozen.lm.stand_in_for_mlp(2, partial(by_hand, 2, kept)),
        ):
            expected = target_values(frozen.lm.cache(frozen.cache.tokens[[PROMPT]]), root)
        assert found[row] == pytest.approx(float(expected), rel=1e-5)
    assert np.ptp(found) > 1e-2


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_all_neurons_are_the_model_and_none_their_output_bias(geometry: str) -> None:
    frozen = freeze(geometry, layers=(0, 2))
    lm, (root, _, _) = frozen.lm, explained(frozen)
    n_neurons = lm.neuron_weights(0).W_out.shape[0]
    keep = torch.zeros(2, 2, frozen.n_pos, n_neurons, dtype=torch.bool)
    keep[1] = True

    def alone(batch: torch.Tensor) -> object:
        return neurons_alone(lm, [0, 2], batch)

    readings = circuit_readings(frozen, root, alone, keep)
    none, everything = (root.constant + readings @ root.direction).tolist()
    assert everything == pytest.approx(frozen.value(root), rel=1e-5)

    def bias(layer: int, _x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return lm.neuron_weights(layer).b_out.expand_as(y)

    with lm.override_mlp(0, partial(bias, 0)), lm.override_mlp(2, partial(bias, 2)):
        expected = target_values(lm.cache(frozen.cache.tokens[[PROMPT]]), root)
    assert none == pytest.approx(float(expected), rel=1e-5)


def curves_of(frozen: FrozenPrompts, n_draws: int = 3) -> pd.DataFrame:
    root, graph, _ = explained(frozen)

    def value(readings: torch.Tensor) -> torch.Tensor:
        return root.constant + readings @ root.direction

    metrics = {"value": value, "doubled": lambda readings: 2 * value(readings) + 1}
    curves = faithfulness_curves(frozen, graph, prune(graph, 0.5), root, metrics, n_draws, 0)
    return curves.assign(score=curves["gain"] / curves["whole"])


def test_curves_run_from_the_empty_circuit_to_the_full_one() -> None:
    frozen = freeze("gpt2", "relu")
    root, graph, features = explained(frozen)
    table = curves_of(frozen)
    ends = table[(table["kind"] == "all") & (table["metric"] == "value")]
    full = ends[ends["k"] > 0].set_index("errors")
    assert full.loc["kept", "value"] == pytest.approx(frozen.value(root), rel=1e-5)
    assert full.loc["none", "value"] == pytest.approx(frozen.value(root), rel=1e-5)
    assert (ends["score"] == (ends["k"] > 0)).all()
    value, doubled = (table[table["metric"] == name] for name in ("value", "doubled"))
    np.testing.assert_allclose(doubled["score"], value["score"], rtol=1e-6)
    own = value[(value["kind"] == "pruned graph") & (value["errors"] == "kept")]
    assert set(own["direction"]) == {"keep", "remove"} and own["k"].nunique() == 1
    equal = value[value["is_pruned_size"]]
    assert set(equal["k"]) == set(own["k"])
    assert set(equal["kind"]) == {"graph", "gradient", "pruned graph", "random", "neurons"}
    assert 0 < own["k"].iloc[0] < len(features)
    assert set(value[value["kind"] == "random"]["draw"]) == {0, 1, 2}
    pd.testing.assert_frame_equal(table, curves_of(frozen))


def test_what_is_taken_out_and_the_rest_kept_alone_are_one_circuit() -> None:
    frozen = freeze("llama", "relu")
    root, graph, features = explained(frozen)
    strongest = np.argsort(-features["influence"].to_numpy(), kind="stable")[:10]
    keep = torch.ones(1, len(features), dtype=torch.bool)
    keep[0, strongest.tolist()] = False
    (expected,) = values_alone(frozen, root, features, keep, True)
    found = curves_of(frozen).query(
        "kind == 'graph' and direction == 'remove' and k == 10 and metric == 'value' and errors == 'kept' and not is_pruned_size"
    )
    assert found["value"].item() == pytest.approx(expected, rel=1e-9)


def test_a_planted_circuit_is_enough_and_is_needed() -> None:
    """Three features of each layer write anything at all: the graph finds them, a random order does not."""
    frozen = freeze("gpt2", "relu")
    for layer, dictionary in frozen.transcoders.items():
        dictionary.W_dec[3:] = 0.0
        frozen.parts[layer] = frozen._split(layer, dictionary)
    root, graph, features = explained(frozen)
    n_planted = int((features["influence"] > 0).sum())
    assert 10 < n_planted < 50 < len(features)
    scores = curves_of(frozen).query(
        "metric == 'value' and errors == 'kept' and k == 50 and not is_pruned_size"
    )
    kept, removed = (
        scores[scores["direction"] == d].set_index("kind")["score"] for d in ("keep", "remove")
    )
    assert kept["graph"] == pytest.approx(1.0) and removed["graph"] == pytest.approx(0.0, abs=1e-9)
    assert kept["gradient"] == pytest.approx(1.0)
    assert (kept["random"] - 1).abs().min() > 0.05 and removed["random"].abs().min() > 0.05


def test_the_summary_is_over_prompts_and_draws() -> None:
    lines = [  # over both prompts the first order gains 2 of 4, the second 4 of 4
        ("random", "keep", 1, False, prompt, draw, gain, whole)
        for prompt, draw, gain, whole in (
            (0, 0, 0.0, 1.0),
            (0, 1, 1.0, 1.0),
            (1, 0, 2.0, 3.0),
            (1, 1, 3.0, 3.0),
        )
    ]
    lines += [("graph", "keep", k, False, 0, 0, 1.0, 1.0) for k in (1, 2)]
    lines += [("graph", "keep", 1, False, 1, 0, 0.0, 3.0)]
    lines += [("pruned graph", "keep", k, True, p, 0, 0.5, 1.0) for p, k in ((0, 3), (1, 6))]
    lines += [("all", "keep", k, False, 0, 0, k, 1.0) for k in (0, 1)]
    names = ["kind", "direction", "k", "is_pruned_size", "prompt", "draw", "gain", "whole"]
    curves = pd.DataFrame(lines, columns=names).assign(errors="kept", metric="value")
    found = faithfulness_summary(curves.assign(value=curves["gain"])).set_index("kind")
    spread = ["score", "low", "high"]
    assert found.loc["random", spread].tolist() == pytest.approx([0.75, 0.5125, 0.9875])
    assert found.loc["graph", ["k", "value", "score", "n_prompts"]].tolist() == [1, 0.5, 0.25, 2]
    assert found.loc["graph", ["low", "high"]].tolist() == [0.0, 1.0]
    assert found.loc["pruned graph", spread].tolist() == [0.5, 0.5, 0.5]
    assert found.loc["pruned graph", "k"] == 4 and "all" not in found.index


def test_without_features_there_is_no_circuit() -> None:
    frozen = freeze("gpt2", "relu", layers=())
    root, graph, _ = explained(frozen)
    with pytest.raises(InputError, match="no feature is active on the prompt"):
        faithfulness_curves(frozen, graph, graph, root, {}, 1, 0)
