"""The sum equals the value; autograd agrees; a real intervention does what was predicted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import (
    D_VOCAB,
    GEOMETRIES,
    KINDS,
    N_CTX,
    N_FEATURES,
    N_LAYERS,
    TOLERANCE,
    freeze,
    frozen_forward,
    make_lm,
    measured_acts,
    random_rows,
    random_transcoder,
)
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.sources import Sources, sources
from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.support.errors import InputError


def all_targets(frozen: FrozenPrompts, stride: int = 1) -> list[Target]:
    targets = []
    for prompt, pos in itertools.product(range(frozen.n_prompts), range(frozen.n_pos)):
        targets.append(frozen.logit_target({5: 1.0}, pos, prompt))
        targets.append(frozen.logit_target({7: 1.0, 9: -1.0, 11: 0.5}, pos, prompt))
        for layer in frozen.transcoders:
            features = range(0, N_FEATURES, 7)
            targets += [frozen.feature_target(layer, f, pos, prompt) for f in features]
    return targets[::stride]


@pytest.mark.parametrize(
    ("geometry", "dtype", "kind"),
    list(itertools.product(GEOMETRIES, (torch.float32, torch.float64), KINDS)),
)
def test_the_sources_of_every_target_add_up_to_its_value(
    geometry: str, dtype: torch.dtype, kind: str
) -> None:
    frozen = freeze(geometry, kind, dtype)
    for found in sources(frozen, all_targets(frozen)):
        assert abs(found.residual) < TOLERANCE[dtype], found.target.name


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_they_add_up_on_a_hundred_prompts_of_every_length(geometry: str) -> None:
    lm = make_lm(geometry, torch.float32)
    transcoders = [random_transcoder(layer, "relu", torch.float32) for layer in (0, 2)]
    for i in range(100):
        n_pos = 1 + i % N_CTX
        frozen = FrozenPrompts(lm, random_rows(1, n_pos, seed=i).long(), transcoders)
        targets = [frozen.logit_target({3: 1.0}, -1), frozen.feature_target(2, i % N_FEATURES, -1)]
        for found in sources(frozen, targets):
            assert abs(found.residual) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_are_those_of_the_model(geometry: str) -> None:
    frozen = freeze(geometry)
    tokens = frozen.cache.tokens
    logits = frozen.lm.logits(tokens)
    difference = frozen.value(frozen.logit_target({5: 1.0, 9: -1.0}, 4, prompt=1))
    assert difference == pytest.approx(float(logits[1, 4, 5] - logits[1, 4, 9]), rel=1e-5)
    pre_acts = frozen.transcoders[1].pre_acts(frozen.cache.mlp_in[1])
    value = frozen.value(frozen.feature_target(1, 3, 2))
    assert value == pytest.approx(float(pre_acts[0, 2, 3]), rel=1e-9)


# -- the frozen model, written out for autograd and for interventions ---------------------------


@pytest.mark.parametrize(
    ("geometry", "kind", "layers"),
    list(itertools.product(GEOMETRIES, KINDS, ((0, 1, 2), (0, 2)))),
)
def test_feature_and_embedding_contributions_equal_autograd(
    geometry: str, kind: str, layers: tuple[int, ...]
) -> None:
    """At the target's own token, z times the gradient that does not pass through attention."""
    frozen = freeze(geometry, kind, layers=layers)
    acts = {layer: z.requires_grad_() for layer, z in measured_acts(frozen).items()}
    prompt, pos = 1, 5
    target = frozen.feature_target(2, 3, pos, prompt)
    # Only the direct path counts: heads read a stream of their own, cut off from the graph.
    stream = sum(
        (
            acts[layer] @ parts.dictionary.W_dec
            for layer, parts in frozen.parts.items()
            if layer < 2
        ),
        start=torch.zeros_like(frozen.cache.token_embedding),
    )
    mlp_in = frozen.lm.final_norm.centre(stream) / frozen.cache.mlp_scale[2][..., None]
    frozen.transcoders[2].pre_acts(mlp_in)[prompt, pos, 3].backward()
    table = sources(frozen, [target])[0].table
    features = table[table["kind"] == "feature"]
    for layer in sorted(set(layers) - {2}):
        expected = (acts[layer] * acts[layer].grad)[prompt, pos].detach()
        own = features[features["layer"] == layer]
        found = torch.zeros(N_FEATURES, dtype=torch.float64)
        found[torch.tensor(own["feature"].to_numpy())] = torch.tensor(
            own["contribution"].to_numpy()
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_head_contributions_equal_autograd(geometry: str) -> None:
    """Each head's share of each source token, by the gradient of its value."""
    frozen = freeze(geometry)
    prompt, pos, layer = 0, 6, 1
    weights, pattern = frozen.attention[layer], frozen.cache.pattern[layer]
    normalised = frozen.cache.attention_in[layer]
    values = torch.einsum("bsd,hdk->bhsk", normalised, weights.W_V).requires_grad_()
    heads = torch.einsum("bhts,bhsk,hkd->btd", pattern, values, weights.W_O)
    target = frozen.logit_target({5: 1.0, 9: -1.0}, pos, prompt)
    (heads[prompt, pos] @ target.direction * frozen.scale(target.site, prompt, pos)).backward()
    expected = (values * values.grad).sum(-1)[prompt].detach()
    table = sources(frozen, [target])[0].table
    own = table[(table["kind"] == "head") & (table["layer"] == layer)]
    found = torch.zeros_like(expected)
    found[own["head"].to_list(), own["pos"].to_list()] = torch.tensor(
        own["contribution"].to_numpy()
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_written_out_frozen_model_is_the_model(geometry: str) -> None:
    frozen = freeze(geometry, layers=(0, 2))
    pre_acts, logits = frozen_forward(frozen, frozen.cache.token_embedding, measured_acts(frozen))
    for layer, found in pre_acts.items():
        expected = frozen.transcoders[layer].pre_acts(frozen.cache.mlp_in[layer])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    model_logits = frozen.cache.logits
    centred = model_logits - model_logits.mean(-1, keepdim=True)
    torch.testing.assert_close(logits, centred, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("geometry", "kind"), list(itertools.product(GEOMETRIES, ("relu", "topk")))
)
def test_changing_an_activation_moves_targets_at_its_token_as_predicted(
    geometry: str, kind: str
) -> None:
    """Add ε to one feature of the layer below, with the freeze held."""
    frozen = freeze(geometry, kind)
    prompt, pos, epsilon = 1, 4, 0.37
    acts = measured_acts(frozen)
    feature = int(acts[1][prompt, pos].argmax())
    before, logits_before = frozen_forward(frozen, frozen.cache.token_embedding, acts)
    acts[1] = acts[1].clone()
    acts[1][prompt, pos, feature] += epsilon
    after, logits_after = frozen_forward(frozen, frozen.cache.token_embedding, acts)
    decoder = frozen.transcoders[1].decoder_direction(feature)
    if frozen.lm.is_parallel:
        # Layer 2 reads the stream before its own attention: only the direct path is open.
        moved = after[2][prompt, pos] - before[2][prompt, pos]
        for i in range(0, N_FEATURES, 5):
            table = sources(frozen, [frozen.feature_target(2, i, pos, prompt)])[0].table
            line = table[(table["kind"] == "feature") & (table["layer"] == 1)]
            line = line[line["feature"] == feature].iloc[0]
            predicted = (
                epsilon * line["contribution"] / float(acts[1][prompt, pos, feature] - epsilon)
            )
            assert predicted == pytest.approx(float(moved[i]), rel=1e-8, abs=1e-12)
    else:
        scale = 1 / frozen.cache.mlp_scale[2][prompt, pos]
        change = frozen.lm.final_norm.centre(epsilon * decoder)
        direct = scale * change @ frozen.transcoders[2].W_enc
        through_own_token = _through_heads(frozen, 2, prompt, pos, change)
        moved = after[2][prompt, pos] - before[2][prompt, pos]
        predicted = direct + scale * through_own_token @ frozen.transcoders[2].W_enc
        torch.testing.assert_close(moved, predicted, rtol=1e-8, atol=1e-10)
    unmoved = logits_after[0] - logits_before[0]
    assert unmoved.abs().max() < 1e-10
    assert (logits_after[prompt, :pos] - logits_before[prompt, :pos]).abs().max() < 1e-10
    assert (logits_after[prompt, pos:] - logits_before[prompt, pos:]).abs().max() > 1e-6


def _through_heads(
    frozen: FrozenPrompts, layer: int, prompt: int, pos: int, change: Tensor
) -> Tensor:
    """What heads of `layer` at `pos` pass on of a change of the stream at `pos`."""
    weights = frozen.attention[layer]
    read = torch.einsum(
        "d,hdk->hk", change / frozen.cache.attention_scale[layer][prompt, pos], weights.W_V
    )
    own = frozen.cache.pattern[layer][prompt, :, pos, pos]
    return torch.einsum("h,hk,hkd->d", own, read, weights.W_O)


# -- invariances ------------------------------------------------------------------------------


def assert_same(one: Sources, two: Sources) -> None:
    columns = ["kind", "layer", "head", "feature", "pos"]
    a, b = (s.table.sort_values(columns).reset_index(drop=True) for s in (one, two))
    assert a[columns].equals(b[columns])
    torch.testing.assert_close(
        torch.tensor(a["contribution"].to_numpy()),
        torch.tensor(b["contribution"].to_numpy()),
        rtol=1e-7,
        atol=1e-10,
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_nothing_depends_on_the_order_of_transcoders_or_on_the_batch(geometry: str) -> None:
    lm, tokens = make_lm(geometry), random_rows(3, 6).long()
    transcoders = [random_transcoder(layer, "relu") for layer in range(N_LAYERS)]
    together = FrozenPrompts(lm, tokens, transcoders)
    alone = FrozenPrompts(lm, tokens[1:2], reversed(transcoders))
    assert_same(
        sources(together, [together.feature_target(2, 4, 3, prompt=1)])[0],
        sources(alone, [alone.feature_target(2, 4, 3)])[0],
    )


def test_a_layer_without_a_transcoder_is_one_opaque_source_of_the_same_sum() -> None:
    with_all, without = freeze("gpt2"), freeze("gpt2", layers=(0, 2))
    tables = [sources(f, [f.feature_target(2, 4, 3)])[0].table for f in (with_all, without)]
    sums = [t[t["layer"] == 1].groupby("kind")["contribution"].sum() for t in tables]
    parts = sums[0][["feature", "decoder_bias", "error"]].sum()
    assert sums[1]["mlp"] == pytest.approx(parts, rel=1e-9)
    assert "feature" not in sums[1]


def test_both_factors_multiply_to_the_contribution_and_weights_do_not_see_the_prompt() -> None:
    frozen = freeze("gpt2", n_prompts=4)
    weights: dict[tuple[int, int], float] = {}
    for prompt in range(4):
        (found,) = sources(frozen, [frozen.feature_target(2, 4, 3, prompt)])
        table = found.table
        assert (table["activation"] * table["weight"] - table["contribution"]).abs().max() == 0
        for line in table[table["kind"] == "feature"].itertuples():
            known = weights.setdefault((line.layer, line.feature), line.weight)
            assert known == pytest.approx(line.weight, rel=1e-12)
    assert len(weights) > N_FEATURES


# -- bad input ------------------------------------------------------------------------------


def test_places_and_features_out_of_range_are_named() -> None:
    frozen = freeze("gpt2", layers=(0, 2))
    with pytest.raises(InputError, match="token index 7 is outside the prompt: expected -7 to 6"):
        frozen.feature_target(2, 0, 7)
    with pytest.raises(InputError, match="prompt 2: expected 0 to 1"):
        frozen.logit_target({3: 1.0}, 0, prompt=2)
    with pytest.raises(
        InputError, match="feature 40 is out of range: layer 2 has features 0 to 39"
    ):
        frozen.feature_target(2, 40, 0)
    with pytest.raises(
        InputError, match=r"no transcoder at layer 1: there is one at layers \[0, 2\]"
    ):
        frozen.feature_target(1, 0, 0)
    with pytest.raises(InputError, match=f"token ids from 0 to {D_VOCAB - 1}"):
        frozen.logit_target({D_VOCAB: 1.0}, 0)


def test_an_inactive_feature_is_allowed_and_shown_at_or_below_zero() -> None:
    frozen = freeze("gpt2")
    pre_acts = frozen.transcoders[2].pre_acts(frozen.cache.mlp_in[2])[0, 3]
    feature = int(pre_acts.argmin())
    (found,) = sources(frozen, [frozen.feature_target(2, feature, 3)])
    assert found.value < 0
    assert abs(found.residual) < 1e-9


def test_transcoders_that_do_not_fit_are_named() -> None:
    lm, tokens = make_lm("gpt2"), random_rows(1, 4).long()
    one = random_transcoder(1, "relu")
    with pytest.raises(InputError, match="two transcoders at layer 1"):
        FrozenPrompts(lm, tokens, [one, one])
    sae = Dictionary(replace(one.config, kind="sae_mlp_out"), **one.parameters())
    with pytest.raises(InputError, match="a sae_mlp_out at layer 1"):
        FrozenPrompts(lm, tokens, [sae])
    config = DictionaryConfig("transcoder", 1, 4, 4, 8)
    narrow = Dictionary(
        config, torch.zeros(4, 8), torch.zeros(8), torch.zeros(8, 4), torch.zeros(4)
    )
    raw = random_transcoder(0, "relu")
    raw.config = replace(raw.config, basis="raw")
    with pytest.raises(InputError, match="layer 0 was trained on unprocessed weights"):
        FrozenPrompts(lm, tokens, [raw])
    with pytest.raises(InputError, match="dictionary of width 4"):
        FrozenPrompts(lm, tokens, [narrow])


def test_prompts_that_cannot_be_run_are_named() -> None:
    lm = make_lm("gpt2")
    with pytest.raises(InputError, match="not empty"):
        FrozenPrompts(lm, torch.zeros(1, 0, dtype=torch.long), [])
    with pytest.raises(InputError, match="rows of 65 tokens: tiny-gpt2 takes at most 64"):
        FrozenPrompts(lm, random_rows(1, 65).long(), [])
    lm.model.transformer.wte.weight.data[5] = torch.inf
    with pytest.raises(InputError, match="non-finite"):
        FrozenPrompts(lm, torch.full((1, 3), 5), [])
