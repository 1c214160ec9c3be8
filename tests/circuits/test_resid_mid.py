"""Transcoders that read the stream itself, resid_mid: everything that holds for the others holds for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from graph_checks import check_totals_and_ablations
from tiny import TOLERANCE, make_lm, random_rows, random_transcoder

from tclib.circuits.edges import Heads
from tclib.circuits.faithfulness import features_alone
from tclib.circuits.frozen import KINDS, FrozenPrompts
from tclib.circuits.graph import attribution_graph
from tclib.circuits.paths import greedy_paths, step_back
from tclib.circuits.sources import sources
from tclib.dictionaries.bases import to_processed, to_raw
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.evaluate import evaluate
from tclib.evaluation.replace import replace_mlp
from tclib.features.from_weights import LoneTokens, mean_pullbacks, pullback
from tclib.greater_than.components import feature_contributions
from tclib.greater_than.units import dictionary_units
from tclib.models.running import Site
from tclib.support.errors import InputError

ROWS = random_rows(2, 9).long()
LAYERS = {0: "relu", 1: "topk", 2: "skip"}
each = pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "granite", "olmo2"])


def reading_stream(layer: int, kind: str, dtype: torch.dtype = torch.float64) -> Dictionary:
    made = random_transcoder(layer, kind, dtype)
    return Dictionary(replace(made.config, basis="stream"), **made.parameters())


def frozen_model(family: str, dtype: torch.dtype = torch.float64) -> FrozenPrompts:
    """The middle layer reads the norm's output, the others the stream."""
    transcoders = [reading_stream(layer, kind, dtype) for layer, kind in LAYERS.items()]
    transcoders[1] = random_transcoder(1, "topk", dtype)
    return FrozenPrompts(make_lm(family, dtype), ROWS, transcoders)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sources_and_every_node_of_graphs_add_up(family: str, dtype: torch.dtype) -> None:
    frozen = frozen_model(family, dtype)
    targets = [frozen.feature_target(layer, 3, pos, 1) for layer in LAYERS for pos in (0, 5, 8)]
    targets.append(frozen.logit_target({5: 1.0, 9: -1.0}, -1, 1))
    for target, found in zip(targets, sources(frozen, targets), strict=True):
        assert abs(found.residual) < TOLERANCE[dtype], target.name
    for layer, dictionary in frozen.transcoders.items():
        x = frozen.lm.read(ROWS, {dictionary.config.input_site})[dictionary.config.input_site]
        value = frozen.value(frozen.feature_target(layer, 3, 5, 1))
        assert value == pytest.approx(float(dictionary.pre_acts(x)[1, 5, 3]), rel=1e-4)
    ways: Sequence[Heads] = ("summed", "nodes")
    for heads in ways:
        closure = attribution_graph(frozen, prompt=1, heads=heads, max_feature_nodes=60).closure()
        assert closure["residual"].abs().max() < TOLERANCE[dtype]


@each
def test_totals_are_gradients_and_small_ablations_do_what_gradients_say(family: str) -> None:
    frozen = frozen_model(family)
    for root in (frozen.logit_target({5: 1.0}, -1, 1), frozen.feature_target(2, 3, 8, 1)):
        check_totals_and_ablations(frozen, root)


@each
def test_every_step_of_a_path_adds_up_again(family: str) -> None:
    frozen = frozen_model(family)
    root = frozen.logit_target({5: 1.0}, -1, 1)
    for path in greedy_paths(frozen, root, 2, 8)[0]:
        if path.nodes[-1].kind in ("feature", "skip"):
            behind = step_back(frozen, root, path.nodes[-1])
            (found,) = sources(frozen, [behind])
            assert abs(found.residual) < TOLERANCE[torch.float64]


@each
def test_it_stands_in_for_the_mlp_and_its_circuit_alone_is_the_model(family: str) -> None:
    lm, transcoder = make_lm(family), reading_stream(1, "relu")
    sites = {Site("resid_mid", 1), Site("mlp_in", 1)}
    read = lm.read(ROWS, sites)
    scale = lm.mlp_norm(1).scale(read[Site("resid_mid", 1)])
    torch.testing.assert_close(read[Site("mlp_in", 1)], read[Site("resid_mid", 1)] / scale)
    made = transcoder(read[Site("resid_mid", 1)]).reconstruction
    with replace_mlp(lm, transcoder):
        replaced = lm.logits(ROWS)
    with lm.override_mlp(1, lambda _x, _y: made):
        torch.testing.assert_close(lm.logits(ROWS), replaced, rtol=1e-6, atol=1e-8)
    units = dictionary_units(transcoder, lm.run_below(ROWS, 1))
    torch.testing.assert_close(units.output(), made)
    frozen = frozen_model(family)
    graph = attribution_graph(frozen, prompt=1)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    keep = torch.ones(1, len(features), dtype=torch.bool)
    with features_alone(frozen, features, keep, with_errors=True, prompt=1):
        torch.testing.assert_close(lm.logits(ROWS[1:]), lm.logits(ROWS)[1:], rtol=1e-6, atol=1e-6)
    # Evaluated at its own site: a dictionary of the norm's output would be another.
    table = evaluate(
        make_lm(family, torch.float32), {"it": transcoder.to(dtype=torch.float32)}, ROWS
    ).table
    z = transcoder.encode(read[Site("resid_mid", 1)])[:, 1:]
    assert table["l0"].iloc[0] == pytest.approx(float((z > 0).sum(-1).float().mean()), rel=1e-6)


def test_what_a_feature_reads_of_weights_goes_without_the_norm() -> None:
    lm = make_lm("llama")
    earlier, later = random_transcoder(0, "relu"), reading_stream(2, "relu")
    weights = pullback(lm, later, 3, earlier)
    torch.testing.assert_close(weights, earlier.W_dec @ later.W_enc[:, 3])
    mean = mean_pullbacks(lm, later, [3], earlier, ROWS)[0]
    acts = lm.read(ROWS, {earlier.config.input_site, later.config.input_site})
    fires = later.encode(acts[later.config.input_site])[..., 3] > 0
    fires &= lm.bos_id != ROWS
    z = earlier.encode(acts[earlier.config.input_site])[fires]
    torch.testing.assert_close(mean, (z.mean(0) * weights).to(mean), rtol=1e-5, atol=1e-7)
    prompt = torch.tensor([[lm.bos_id, 7]])
    lone = later.pre_acts(lm.read(prompt, {later.config.input_site})[later.config.input_site])
    scores = LoneTokens(lm, [later]).scores(later, 3)
    assert float(scores[7]) == pytest.approx(float(lone[0, 1, 3]), rel=1e-6)


def test_what_heads_bring_to_it_is_what_sources_say() -> None:
    frozen = frozen_model("llama")
    later = frozen.transcoders[2]
    (found,) = sources(frozen, [frozen.feature_target(2, 3, -1, 1)])
    heads = found.contribution[np.array(KINDS)[found.kind] == "head"].sum()
    values = feature_contributions(frozen, later, 3)[1]
    biases = found.contribution[np.array(KINDS)[found.kind] == "attention_bias"].sum()
    assert float(values.sum()) == pytest.approx(float(heads + biases), rel=1e-6)


def test_bases_and_models_that_it_cannot_be_of() -> None:
    stream = reading_stream(1, "relu")
    assert to_processed(stream, make_lm("llama")) is stream
    with pytest.raises(InputError, match="reads the stream, from which no norm's output follows"):
        to_raw(stream, make_lm("llama"))
    for family, why in {
        "gpt2": "has LayerNorms",
        "neox": "runs the two side by side",
        "cohere": "side by side",
    }.items():
        with pytest.raises(InputError, match=f"{why}.*expected a model with RMSNorms"):
            FrozenPrompts(make_lm(family), ROWS, [stream])
    for family in ("gpt2", "llama"):
        frozen = FrozenPrompts(make_lm(family), ROWS, [])
        with pytest.raises(InputError, match="for layer 0: expected the same|has LayerNorms"):
            frozen.feature_target(0 if family == "llama" else 1, 3, 5, dictionary=stream)
    with pytest.raises(InputError, match="has no resid_mid between them"):
        make_lm("neox").read(ROWS, [Site("resid_mid", 1)])
    sae = random_transcoder(1, "relu").config
    with pytest.raises(InputError, match="only a transcoder reads resid_mid, not an sae_mlp_in"):
        replace(sae, kind="sae_mlp_in", basis="stream")
