"""Replacing an MLP does what the equations say, and undoes it."""

from __future__ import annotations

import pytest
import torch
from tiny import D_MODEL, random_rows

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig, new_dictionary
from tclib.evaluation.replace import replace_mlp, replace_mlp_input, replace_site, set_mlp_out
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError

TOKENS = random_rows(3).long()


def log_probs(lm: LanguageModel) -> torch.Tensor:
    return lm.logits(TOKENS).log_softmax(-1)


def exact_sae(kind: str) -> Dictionary:
    """An SAE that reproduces its input: x = relu(x) − relu(−x)."""
    eye = torch.eye(D_MODEL)
    config = DictionaryConfig(kind, 1, D_MODEL, D_MODEL, 2 * D_MODEL)  # type: ignore[arg-type]
    zeros = torch.zeros(2 * D_MODEL)
    return Dictionary(
        config, torch.cat([eye, -eye], 1), zeros, torch.cat([eye, -eye]), torch.zeros(D_MODEL)
    )


@pytest.mark.parametrize("kind", ["sae_mlp_out", "sae_mlp_in"])
def test_an_exact_sae_changes_nothing(lm: LanguageModel, kind: str) -> None:
    before = log_probs(lm)
    with replace_site(lm, exact_sae(kind)):
        during = log_probs(lm)
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)


def test_the_transcoders_output_is_what_the_stream_receives(lm: LanguageModel) -> None:
    config = DictionaryConfig("transcoder", 1, D_MODEL, D_MODEL, 32)
    transcoder = new_dictionary(config, torch.Generator().manual_seed(0))
    mlp_in = lm.read(TOKENS, [Site("mlp_in", 1)])[Site("mlp_in", 1)]
    with lm.override_mlp(1, lambda _x, _y: transcoder(mlp_in).reconstruction):
        expected = log_probs(lm)
    with replace_mlp(lm, transcoder):
        found = log_probs(lm)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with lm.override_mlp(1, lambda x, _y: transcoder(x).reconstruction):
        assert torch.equal(log_probs(lm), found)
    assert not torch.allclose(found, log_probs(lm), atol=1e-3)


def test_keeping_no_feature_leaves_the_bias_and_keeping_all_is_the_transcoder(
    lm: LanguageModel,
) -> None:
    config = DictionaryConfig("transcoder", 1, D_MODEL, D_MODEL, 32)
    bias = torch.linspace(-1, 1, D_MODEL)
    transcoder = new_dictionary(config, torch.Generator().manual_seed(0), mean_out=bias)
    with replace_mlp(lm, transcoder, kept_features=torch.tensor([], dtype=torch.long)):
        nothing_kept = log_probs(lm)
    with set_mlp_out(lm, 1, bias):
        torch.testing.assert_close(log_probs(lm), nothing_kept)
    with replace_mlp(lm, transcoder, kept_features=torch.arange(32)):
        all_kept = log_probs(lm)
    with replace_mlp(lm, transcoder):
        torch.testing.assert_close(log_probs(lm), all_kept)


def test_an_mlp_is_run_only_where_its_output_is_used(lm: LanguageModel) -> None:
    reached: list[str] = []
    neurons = lm._block(1).neurons_out
    config = DictionaryConfig("transcoder", 1, D_MODEL, D_MODEL, 32)
    transcoder = new_dictionary(config, torch.Generator().manual_seed(0))
    changes = {
        "transcoder": replace_site(lm, transcoder),
        "mean": set_mlp_out(lm, 1, torch.ones(D_MODEL)),
        "zero": set_mlp_out(lm, 1),
        "sae_mlp_out": replace_site(lm, exact_sae("sae_mlp_out")),
        "sae_mlp_in": replace_site(lm, exact_sae("sae_mlp_in")),
    }
    for name, change in changes.items():
        handle = neurons.register_forward_hook(lambda *_, name=name: reached.append(name))
        with change:
            lm.logits(TOKENS)
        handle.remove()
    assert reached == ["sae_mlp_out", "sae_mlp_in"]


def test_the_last_of_two_stand_ins_acts_and_the_first_comes_back(lm: LanguageModel) -> None:
    bias = torch.linspace(-1, 1, D_MODEL)
    with set_mlp_out(lm, 1, bias):
        alone = log_probs(lm)
        with set_mlp_out(lm, 1):
            zero = log_probs(lm)
        assert torch.equal(log_probs(lm), alone)
    with set_mlp_out(lm, 1):
        assert torch.equal(log_probs(lm), zero)
    assert "forward" not in vars(lm._block(1).mlp_reader)


def test_zero_ablation_silences_the_mlp(gpt2_lm: LanguageModel) -> None:
    with set_mlp_out(gpt2_lm, 1):
        found = log_probs(gpt2_lm)
    projection = gpt2_lm.model.transformer.h[1].mlp.c_proj
    projection.weight.data.zero_()
    projection.bias.data.zero_()
    torch.testing.assert_close(found, log_probs(gpt2_lm), rtol=1e-5, atol=1e-5)


def test_everything_is_restored(lm: LanguageModel) -> None:
    before = lm.logits(TOKENS)
    for kind in ("sae_mlp_out", "sae_mlp_in"):
        with pytest.raises(KeyError), replace_site(lm, exact_sae(kind)):
            raise KeyError
    assert torch.equal(lm.logits(TOKENS), before)


def test_dictionaries_that_do_not_fit_are_named(lm: LanguageModel) -> None:
    with (
        pytest.raises(InputError, match="cannot replace its output"),
        replace_mlp(lm, exact_sae("sae_mlp_in")),
    ):
        pass
    with (
        pytest.raises(InputError, match="does not reconstruct the MLP's input"),
        replace_mlp_input(lm, exact_sae("sae_mlp_out")),
    ):
        pass
    wide = new_dictionary(
        DictionaryConfig("transcoder", 1, 8, 8, 32), torch.Generator().manual_seed(0)
    )
    with pytest.raises(InputError, match="dictionary of width 8"), replace_mlp(lm, wide):
        pass
