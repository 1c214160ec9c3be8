"""Every family, on a tiny random model of it: sums close, autograd agrees, interventions do what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EXPERTS, FAMILIES, family_model
from graph_checks import check_totals_and_ablations
from tiny import TOLERANCE, make_lm, random_rows, random_transcoder, tiny_tokenizer

from tclib.circuits.derivatives import root_gradients
from tclib.circuits.edges import Heads
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import attribution_graph
from tclib.circuits.sources import sources
from tclib.evaluation.evaluate import evaluate
from tclib.evaluation.replace import replace_mlp
from tclib.greater_than.units import neuron_units
from tclib.models.architectures import ARCHITECTURES
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError

ROWS = random_rows(2, 9).long()
each = pytest.mark.parametrize("family", FAMILIES)


def frozen_model(family: str, dtype: torch.dtype = torch.float64) -> FrozenPrompts:
    kinds = {0: "relu", 1: "topk", 2: "skip"}
    transcoders = [random_transcoder(layer, kind, dtype) for layer, kind in kinds.items()]
    return FrozenPrompts(make_lm(family, dtype), ROWS, transcoders)


def test_every_class_that_is_known_is_tested() -> None:
    assert {type(family_model(family)).__name__ for family in FAMILIES} == set(ARCHITECTURES)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sources_and_every_node_of_graphs_add_up(family: str, dtype: torch.dtype) -> None:
    frozen = frozen_model(family, dtype)
    targets = [frozen.feature_target(layer, 3, pos, 1) for layer in range(3) for pos in (0, 5, 8)]
    targets.append(frozen.logit_target({5: 1.0, 9: -1.0}, -1, 1))
    for found in sources(frozen, targets):
        assert abs(found.residual) < TOLERANCE[dtype], found.target.name
    ways: tuple[Heads, ...] = ("summed", "nodes")
    for heads in ways:
        closure = attribution_graph(frozen, prompt=1, heads=heads, max_feature_nodes=60).closure()
        assert closure["residual"].abs().max() < TOLERANCE[dtype]


@each
def test_totals_are_gradients_and_small_ablations_do_what_gradients_say(family: str) -> None:
    frozen = frozen_model(family)
    root = frozen.logit_target({5: 1.0}, -1, 1)
    check_totals_and_ablations(frozen, root)


@each
def test_norms_and_mlps_that_follow_are_the_model_itself_at_one_token(family: str) -> None:
    if family == "gpt_oss":
        pytest.skip("its sinks take a share of the pattern even at one token")
    lm = make_lm(family)
    transcoders = [random_transcoder(layer, "relu") for layer in range(3)]
    frozen = FrozenPrompts(lm, ROWS[:1, :1], transcoders)
    root = frozen.logit_target({5: 1.0}, -1)
    mlps, everything = (root_gradients(frozen, root, how) for how in ("MLPs follow", "everything"))
    torch.testing.assert_close(mlps, everything, rtol=1e-5, atol=1e-7)


@each
def test_overrides_that_change_nothing_leave_the_logits_and_those_that_do_agree(
    family: str,
) -> None:
    lm = make_lm(family)
    logits, cache = lm.logits(ROWS), lm.cache(ROWS)
    close: Any = {"rtol": 1e-5, "atol": 5e-6}  # norms of queries and keys are in float32
    if family != "gemma2":  # which caps them
        torch.testing.assert_close(cache.logits, logits, **close)
    for layer in range(lm.n_layers):
        same = [
            lm.override_mlp(layer, lambda _x, y: y),
            lm.override_heads(layer, lambda z: z),
            lm.override_mlp_input(layer, lambda x: x),
            lm.stand_in_for_mlp(layer, lambda _x, y=cache.mlp_out[layer]: y),
            lm.start_at(layer, lm.streams(ROWS, [layer])[layer]),
        ]
        if family not in EXPERTS:
            same.append(lm.override_neurons(layer, lambda acts: acts))
        for change in same:
            with change:
                torch.testing.assert_close(lm.logits(ROWS), logits, **close)
        with lm.override_mlp(layer, lambda _x, y: torch.zeros_like(y)):
            without = lm.logits(ROWS)
        assert not torch.allclose(without, logits, rtol=1e-3)
        with lm.stand_in_for_mlp(layer, torch.zeros_like):
            torch.testing.assert_close(lm.logits(ROWS), without, **close)


@each
def test_a_pass_that_is_cut_at_an_mlp_goes_on_to_the_same_end(family: str) -> None:
    lm = make_lm(family)
    cache = lm.cache(ROWS)
    final = cache.final_in[:, -1] / cache.final_scale[:, -1, None]
    for layer in range(lm.n_layers):
        below = lm.run_below(ROWS, layer)
        torch.testing.assert_close(below.mlp_out, cache.mlp_out[layer], rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            read = lm.run_above(layer, below.base + below.mlp_out)
        torch.testing.assert_close(read, final, rtol=1e-5, atol=1e-6)
        sites = {Site("mlp_in", layer), Site("mlp_out", layer)}
        read_at = lm.read(ROWS, sites)
        made = lm.run_mlp(layer, read_at[Site("mlp_in", layer)])
        torch.testing.assert_close(made, read_at[Site("mlp_out", layer)], rtol=1e-5, atol=1e-6)
        if family in EXPERTS:
            with pytest.raises(InputError, match="is made of experts, which have no neurons"):
                neuron_units(lm, below)
            continue
        units = neuron_units(lm, below)
        torch.testing.assert_close(units.output(), cache.mlp_out[layer], rtol=1e-5, atol=1e-6)
        silent = units.without(3)
        with lm.override_neurons(layer, without_third), torch.no_grad():
            expected = lm.read(ROWS, {Site("mlp_out", layer)})[Site("mlp_out", layer)]
        torch.testing.assert_close(silent.output(), expected, rtol=1e-5, atol=1e-6)


@each
def test_what_is_unembedded_some_positions_at_a_time_are_the_logits(family: str) -> None:
    lm = make_lm(family, torch.float32)
    with torch.no_grad():
        hidden = lm.hidden(ROWS)
        parts = [lm.unembed(hidden[:, [pos]]) for pos in range(ROWS.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), lm.logits(ROWS), rtol=1e-5, atol=1e-5)


@each
def test_a_large_vocabulary_is_not_folded_for_a_few_tokens(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(family)
    ids = torch.tensor([0, 5, 99, 5])
    expected = lm.W_U[:, ids]
    assert torch.equal(lm.unembedding(ids), expected)
    monkeypatch.setattr("tclib.models.weights.FOLDED_WHOLE", 0)
    torch.testing.assert_close(lm.unembedding(ids), expected, rtol=1e-9, atol=1e-9)


def without_third(acts: torch.Tensor) -> torch.Tensor:
    acts = acts.clone()
    acts[..., 3] = 0.0
    return acts


@each
def test_a_folder_of_it_is_loaded_evaluated_and_known_by_its_content(
    family: str, tmp_path: Path
) -> None:
    # Qwen2's own class of tokenizer has a token more.
    model = family_model(family, **({"vocab_size": 101} if family == "qwen2" else {}))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = LanguageModel.load(str(tmp_path), device="cpu")
    own = LanguageModel(model, tiny_tokenizer(), family)
    assert lm.content_hash == own.content_hash
    torch.testing.assert_close(lm.logits(ROWS), own.logits(ROWS))
    dictionary = random_transcoder(1, "relu", torch.float32)
    with replace_mlp(lm, dictionary):
        replaced = lm.logits(ROWS)
    assert not torch.allclose(replaced, lm.logits(ROWS), rtol=1e-3)
    found = evaluate(lm, {"it": dictionary}, random_rows(6, 9))
    assert np.isfinite(found.table["fvu"]).all()
    assert lm.extended_embedding.shape == (lm.d_vocab, lm.d_model)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "original_max_position_embeddings": 8,
}
LONG = {
    "rope_parameters": LONGROPE,
    "original_max_position_embeddings": 8,
    "sliding_window": None,
}


@pytest.mark.parametrize(
    ("family", "one", "other"),
    [
        ("granite", {}, {"residual_multiplier": 0.5}),
        ("cohere", {}, {"logit_scale": 0.5}),
        ("gemma2", {}, {"final_logit_softcapping": 6.0}),
        ("gemma2", {}, {"attn_logit_softcapping": 3.0}),
        ("gemma2", {}, {"query_pre_attn_scalar": 8}),
        ("gpt_neo", {}, {"attention_types": [[["global", "global", "local"], 1]]}),
        ("smollm3", {}, {"no_rope_layers": [1, 1, 1]}),
        ("falcon", {}, {"activation": "relu"}),
        ("gpt_oss", {}, {"swiglu_alpha": 1.0}),
        ("phi3", LONG, {**LONG, "max_position_embeddings": 4096}),
    ],
)
def test_what_acts_besides_the_weights_is_part_of_the_hash(
    family: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    weights = family_model(family, **one).state_dict()

    def hash_of(**values: Any) -> str:
        model = family_model(family, **values)
        model.load_state_dict(weights)
        return LanguageModel(model, tiny_tokenizer(), family).content_hash

    assert hash_of(**one) == hash_of(**one) != hash_of(**other)


def test_what_modules_hold_besides_the_weights_is_part_of_the_hash() -> None:
    for family, path in {
        "gemma": "model.embed_tokens.embed_scale",
        "gptj": "transformer.h.0.attn.embed_positions",
        "gpt_neo": "transformer.h.1.attn.attention.bias",
    }.items():
        lm = make_lm(family, torch.float32)
        before = lm.content_hash
        lm.model.get_buffer(path).fill_(1)
        assert lm.content_hash != before, family


def test_a_hash_does_not_hang_on_the_rows_that_were_run_or_on_rounding() -> None:
    lm = LanguageModel(family_model("phi3", **LONG), tiny_tokenizer(), "long")
    before = lm.content_hash
    lm.logits(random_rows(1, 12).long())
    assert lm.content_hash == before
    exact = make_lm("gpt2")
    before = exact.content_hash
    exact.model.transformer.wte.weight.mul_(1 + 1e-9)
    assert exact.content_hash != before
    exact.model.train()
    with pytest.raises(InputError, match=r"is in training mode.*call its eval\(\) first"):
        _ = exact.content_hash


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"word_embed_proj_dim": 8}, "take another size"),
        ("opt", {"_remove_final_layer_norm": True}, "whose last norm is left out"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "is not supported"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "set slow_but_exact to false"),
        ("falcon", {"alibi": True}, "Falcon-RW.* cannot be traced"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "cannot be run by transformers"),
        ("falcon-new", {"parallel_attn": False}, "cannot be run by transformers"),
        ("gemma2", {"attention_bias": True}, "an attention bias in front of a norm"),
        ("gemma", {"use_bidirectional_attention": True}, "take a causal model"),
        ("gemma3", {"use_bidirectional_attention": True}, "take a causal model"),
        ("llama", {"is_causal": False}, "take a causal model"),
        ("bloom", {"is_causal": False}, "take a causal model"),
        ("granite", {"residual_multiplier": 0.0}, "a factor of added that is 0"),
        ("granite", {"logits_scaling": 0.0}, "a factor of logits that is 0 or not finite"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "caps at 0"),
    ],
)
def test_variants_that_cannot_be_split_are_refused(
    family: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        LanguageModel(family_model(family, **changed), tiny_tokenizer(), family)


def test_patterns_of_another_run_than_the_logits_are_refused() -> None:
    lm = make_lm("llama")
    usual = lm.model.config._attn_implementation
    with pytest.raises(InputError, match="those of a run that gives patterns"):
        # As Falcon's masks were, asked for by one implementation and used by another.
        lm.model.register_forward_hook(
            lambda model, _args, out: (
                setattr(out, "logits", out.logits.flip(1))
                if model.config._attn_implementation == usual
                else None
            )
        )
        FrozenPrompts(lm, ROWS, [])


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon", "granite", "bloom"])
def test_what_an_override_gives_may_be_broadcast(family: str) -> None:
    lm = make_lm(family)
    with lm.override_mlp(1, lambda _x, y: torch.zeros_like(y)):
        expected = lm.logits(ROWS)
    for change in (
        lm.override_mlp(1, lambda _x, y: y.new_zeros(y.shape[-1])),
        lm.stand_in_for_mlp(1, lambda x: x.new_zeros(1, 1, x.shape[-1])),
    ):
        with change:
            torch.testing.assert_close(lm.logits(ROWS), expected)


def test_norms_without_weights_and_plain_layers_among_experts() -> None:
    model = family_model("opt", layer_norm_elementwise_affine=False).double()
    lm = LanguageModel(model, tiny_tokenizer(), "bare")
    frozen = FrozenPrompts(lm, ROWS, [random_transcoder(1, "relu")])
    (found,) = sources(frozen, [frozen.logit_target({5: 1.0}, -1)])
    assert abs(found.residual) < 1e-9
    mixed = LanguageModel(family_model("qwen3_moe", mlp_only_layers=[1]), tiny_tokenizer(), "mixed")
    assert neuron_units(mixed, mixed.run_below(ROWS, 1)).n_units == 24
    with pytest.raises(InputError, match="MLP 0 of mixed is made of experts"):
        neuron_units(mixed, mixed.run_below(ROWS, 0))


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "granite", "phi"])
def test_half_precision_is_traced_in_a_copy(family: str) -> None:
    lm = make_lm(family, torch.bfloat16)
    assert lm.logits(ROWS).isfinite().all()
    with pytest.warns(UserWarning, match="runs on a copy of it in float32"):
        frozen = FrozenPrompts(lm, ROWS, [random_transcoder(1, "relu", torch.float32)])
    (found,) = sources(frozen, [frozen.logit_target({5: 1.0}, -1)])
    assert abs(found.residual) < 1e-4


def test_gemmas_logits_are_traced_in_front_of_their_cap() -> None:
    frozen = frozen_model("gemma2", torch.float32)
    value = frozen.value(frozen.logit_target({5: 1.0, 9: -1.0}, -1, 1))
    raw = frozen.cache.logits
    assert value == pytest.approx(float(raw[1, -1, 5] - raw[1, -1, 9]), rel=1e-4)
    capped = 5.0 * torch.tanh(raw / 5.0)
    torch.testing.assert_close(frozen.lm.logits(ROWS), capped, rtol=1e-5, atol=1e-5)
