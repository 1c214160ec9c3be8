"""Input-invariant views against brute force, and the tables that show them."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pytest
import torch
from tiny import (
    D_VOCAB,
    GEOMETRIES,
    N_FEATURES,
    N_LAYERS,
    freeze,
    make_lm,
    random_rows,
    random_transcoder,
)

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.sources import sources
from tclib.features import from_weights as features
from tclib.features.connections import compare_connections
from tclib.features.from_weights import Head, LoneTokens
from tclib.models.running import Site
from tclib.support.errors import InputError
from tclib.support.statistics import top_k_overlap


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_views_equal_brute_force_loops(geometry: str) -> None:
    lm = make_lm(geometry)
    earlier, later = random_transcoder(0, "relu"), random_transcoder(2, "relu")
    f = lm.final_norm.centre(later.W_enc[:, 3])
    head = Head(1, 2)
    weights = lm.attention_weights(1)
    OV = weights.W_V[2] @ weights.W_O[2]
    direct = features.de_embedding(lm, later, 3)
    through = features.de_embedding(lm, later, 3, head)
    extended = features.extended_de_embedding(lm, later, 3)
    pulled, via = (features.pullback(lm, later, 3, earlier, h) for h in (None, head))
    for token in range(0, D_VOCAB, 17):
        embedding = lm.W_E[token]
        assert float(direct[token]) == pytest.approx(float(embedding @ f))
        assert float(through[token]) == pytest.approx(float(embedding @ OV @ f))
        seen = embedding + lm.run_mlp(0, lm.mlp_norm(0).normalise(embedding))
        assert float(extended[token]) == pytest.approx(float(seen @ f))
    for i in range(0, N_FEATURES, 9):
        assert float(pulled[i]) == pytest.approx(float(earlier.W_dec[i] @ f))
        assert float(via[i]) == pytest.approx(float(earlier.W_dec[i] @ OV @ f))
    norms = features.ov_norms(lm, later, 3)
    assert norms.shape == (2 if lm.is_parallel else 3, lm.n_heads)
    assert float(norms[1, 2]) == pytest.approx(float((OV @ f).norm()))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_run_mlp_is_the_models(geometry: str) -> None:
    frozen = freeze(geometry)
    for layer in range(N_LAYERS):
        found = frozen.lm.run_mlp(layer, frozen.cache.mlp_in[layer])
        torch.testing.assert_close(found, frozen.cache.mlp_out[layer], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_lone_tokens_are_features_on_prompts_of_one_token(geometry: str) -> None:
    lm = make_lm(geometry)
    transcoders = [random_transcoder(layer, "relu") for layer in range(N_LAYERS)]
    lone = LoneTokens(lm, transcoders)
    later, earlier = lone.scores(transcoders[2], 3), lone.scores(transcoders[0], 4)
    for token in range(0, D_VOCAB, 17):
        frozen = FrozenPrompts(lm, torch.tensor([[lm.bos_id, token]]), transcoders)
        for found, (layer, feature) in ((later, (2, 3)), (earlier, (0, 4))):
            expected = frozen.value(frozen.feature_target(layer, feature, 1))
            # The frozen run computes attention patterns in float32, the plain one does not.
            assert float(found[token]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    with pytest.raises(InputError, match="feature 99999 is out of range"):
        lone.scores(transcoders[1], 99999)


def test_lone_tokens_run_the_vocabulary_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm("gpt2")
    read = lm.read
    n_runs = []

    def counted(tokens: torch.Tensor, sites: Iterable[Site]) -> dict[Site, torch.Tensor]:
        n_runs.append(len(tokens))
        return read(tokens, sites)

    monkeypatch.setattr(lm, "read", counted)
    transcoders = [random_transcoder(layer, "relu") for layer in range(N_LAYERS)]
    lone = LoneTokens(lm, transcoders)
    for layer in (2, 0, 1, 2):
        lone.scores(transcoders[layer], 0)
    assert sum(n_runs) == D_VOCAB


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_direct_logit_attribution_is_what_a_feature_adds_to_the_logits(geometry: str) -> None:
    """Between the final norm's scale and the softmax, by adding the decoder direction for real."""
    frozen = freeze(geometry)
    lm, feature = frozen.lm, 5
    dictionary = frozen.transcoders[2]
    scale = frozen.cache.final_scale[0, -1]
    stream = frozen.cache.final_in[0, -1]
    head = lm.model.get_output_embeddings().weight

    def logits(x: torch.Tensor) -> torch.Tensor:
        out = (lm.final_norm.centre(x) / scale * lm.final_norm.gain) @ head.T
        return out - out.mean()

    moved = logits(stream + dictionary.decoder_direction(feature)) - logits(stream)
    found = features.direct_logit_attribution(lm, dictionary, feature) / scale
    torch.testing.assert_close(found, moved, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_mean_pullback_is_the_mean_of_exact_attributions(geometry: str) -> None:
    frozen = freeze(geometry, n_prompts=3, n_pos=6)
    later, earlier, feature = frozen.transcoders[2], frozen.transcoders[0], 7
    rows = frozen.cache.tokens.int()
    several = features.mean_pullbacks(
        frozen.lm, later, [feature, 3], earlier, rows, rows_per_forward=2
    )
    found = features.mean_pullbacks(frozen.lm, later, [feature], earlier, rows)[0]
    torch.testing.assert_close(several[0], found)
    expected = torch.zeros(N_FEATURES, dtype=torch.float64)
    n_tokens = 0
    for prompt in range(3):
        for pos in range(1, 6):
            target = frozen.feature_target(2, feature, pos, prompt)
            if frozen.value(target) > 0:
                table = sources(frozen, [target])[0].table
                own = table[(table["kind"] == "feature") & (table["layer"] == 0)]
                contribution = torch.tensor(own["contribution"].to_list(), dtype=torch.float64)
                expected[own["feature"].to_list()] += contribution
                n_tokens += 1
    assert n_tokens > 0
    # The frozen run computes attention patterns in float32, the plain one does not.
    torch.testing.assert_close(found, expected / n_tokens, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_several_earlier_transcoders_in_one_pass_are_each_by_itself(geometry: str) -> None:
    frozen = freeze(geometry)
    lm, (*several, later) = frozen.lm, frozen.transcoders.values()
    rows = random_rows(6)
    found = features.mean_inputs(lm, later, [7, 3], several, rows, [0.1, 0.0], 4)
    for one, earlier in zip(found, several, strict=True):
        (alone,) = features.mean_inputs(lm, later, [7, 3], [earlier], rows, [0.1, 0.0])
        torch.testing.assert_close(one, alone)
    seeded = torch.Generator().manual_seed
    together = compare_connections(lm, later, [7, 3], several, rows, seeded(0))
    generator = seeded(0)
    one_by_one = [
        compare_connections(lm, later, [7, 3], earlier, rows, generator) for earlier in several
    ]
    pd.testing.assert_frame_equal(together, pd.concat(one_by_one, ignore_index=True))


def test_activation_quantiles_are_of_positive_activations_without_bos() -> None:
    lm, dictionary = make_lm("gpt2"), random_transcoder(1, "relu")
    rows = random_rows(5)
    site = dictionary.config.input_site
    z = dictionary.encode(lm.read(rows.long(), {site})[site])[:, 1:, 4].flatten()
    (found,) = features.activation_quantiles(lm, dictionary, [4], rows, 0.2)
    assert found == pytest.approx(float(z[z > 0].quantile(0.2)))
    dictionary.b_enc[4] = -1e6
    assert features.activation_quantiles(lm, dictionary, [4], rows, 0.2) == [0.0]


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_feature_that_fires_once_or_always_alike_has_connections(n_rows: int) -> None:
    lm, earlier, later = make_lm("gpt2"), random_transcoder(0, "relu"), random_transcoder(2, "relu")
    rows = random_rows(1).repeat(n_rows, 1)  # copies: the same activations again
    site = later.config.input_site
    pre_acts = later.pre_acts(lm.read(rows.long(), {site})[site])[0, 1:, 4]
    highest = pre_acts.sort().values
    later.b_enc[4] -= (highest[-1] + highest[-2]) / 2  # between the two: one token a row is left
    minima = features.activation_quantiles(lm, later, [4], rows, 0.2)
    assert minima == [0.0]
    assert features.mean_pullbacks(lm, later, [4], earlier, rows, minima).abs().max() > 0
    assert len(compare_connections(lm, later, [4], earlier, rows, torch.Generator())) == 1


def test_tables_are_sorted_and_name_tokens() -> None:
    lm = make_lm("gpt2")
    scores = torch.arange(float(D_VOCAB))
    table = features.token_table(lm, scores, k=2)
    assert table["token"].tolist() == ["w99", "w98", "<unk>", "<bos>"]
    assert table["rank"].tolist() == [1, 2, -2, -1]
    strongest = features.feature_table(torch.tensor([0.5, -3.0, 1.0]), k=2)
    assert strongest["feature"].tolist() == [1, 2]
    assert strongest["score"].tolist() == [-3.0, 1.0]


def test_overlap_by_hand() -> None:
    one = torch.tensor([4.0, 3.0, 2.0, 1.0])
    other = torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert top_k_overlap(one, other, 2) == 0.5


def test_bad_input_is_named() -> None:
    lm = make_lm("gpt2")
    first, later = random_transcoder(0, "relu"), random_transcoder(2, "relu")
    with pytest.raises(InputError, match="feature 40 is out of range"):
        features.de_embedding(lm, later, 40)
    with pytest.raises(InputError, match="can read heads 0 to 3 of layers 0 to 2"):
        features.de_embedding(lm, later, 0, Head(3, 0))
    with pytest.raises(InputError, match="expected a layer below 0"):
        features.pullback(lm, first, 0, later)
    with pytest.raises(InputError, match="expected a layer below 1"):
        features.pullback(lm, later, 0, random_transcoder(1, "relu"), Head(1, 0))
    with pytest.raises(InputError, match="does not read MLP 0"):
        features.extended_de_embedding(lm, first, 0)
    with pytest.raises(InputError, match="never exceeds 1000"):
        features.mean_pullbacks(lm, later, [0], first, random_rows(2), [1000.0])
    with pytest.raises(InputError, match="k 5: expected 1 to 4"):
        top_k_overlap(torch.ones(4), torch.ones(4), 5)
