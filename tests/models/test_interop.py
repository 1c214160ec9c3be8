"""TransformerLens, both ways: its models here, our dictionaries in its hooks, its names for our sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import GEOMETRIES as FIRST
from tiny import random_rows, random_transcoder, tiny_hf_model, tiny_tokenizer
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.replace import replace_mlp, replace_mlp_input
from tclib.models.interop import boot
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError

GEOMETRIES = (*FIRST, "gemma2")  # which has norms behind its parts


class Both(NamedTuple):
    """One model, ours and as TransformerLens runs it in compatibility mode."""

    lm: LanguageModel
    bridge: Any


def booted(folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.fixture(scope="module", params=GEOMETRIES)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_hf_model(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    bridge = booted(folder)
    lm = LanguageModel.from_transformer_lens(bridge)
    # In compatibility mode a second time: its weights are folded by then.
    bridge.enable_compatibility_mode()
    yield Both(lm, bridge)


def test_a_bridge_is_the_model_that_it_was_booted_from(both: Both, tmp_path: Path) -> None:
    name = str(both.bridge.cfg.model_name)
    loaded = LanguageModel.load(name, device="cpu")
    assert both.lm.content_hash == loaded.content_hash
    rows = random_rows(2).long()
    torch.testing.assert_close(both.lm.logits(rows), loaded.logits(rows), rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_bridge_shares_no_weights_with_it(tmp_path: Path) -> None:
    tiny_hf_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    bridge = booted(tmp_path)
    lm = LanguageModel.from_transformer_lens(bridge)
    before = lm.logits(random_rows(1).long())
    with torch.no_grad():
        for weight in bridge.original_model.parameters():
            weight.add_(1.0)
    assert torch.equal(lm.logits(random_rows(1).long()), before)
    assert any(weight.requires_grad for weight in bridge.original_model.parameters())


def test_what_is_no_plain_bridge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="GPT2LMHeadModel: expected a TransformerBridge"):
        LanguageModel.from_transformer_lens(tiny_hf_model("gpt2"))
    tiny_hf_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    bridge = booted(tmp_path)
    tokenizer, bridge.tokenizer = bridge.tokenizer, None
    with pytest.raises(InputError, match="has no tokenizer: boot it with one"):
        LanguageModel.from_transformer_lens(bridge)
    bridge.tokenizer = tokenizer
    bridge.enable_compatibility_mode()
    with pytest.raises(InputError, match="from_transformer_lens before that, or"):
        LanguageModel.from_transformer_lens(bridge)


def test_a_model_that_transformer_lens_runs_in_another_way_is_refused(tmp_path: Path) -> None:
    tiny_hf_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    bridge = booted(tmp_path)
    doubled = bridge.forward
    bridge.forward = lambda *args, **options: 2 * doubled(*args, **options)
    with pytest.raises(InputError, match="TransformerLens runs it in another way"):
        LanguageModel.from_transformer_lens(bridge)
    with pytest.raises(InputError, match="TransformerLens cannot boot .*nowhere"):
        boot(str(tmp_path / "nowhere"), torch.device("cpu"))


@pytest.mark.parametrize("basis", ["processed", "stream"])
@pytest.mark.parametrize("kind", ["relu", "topk", "skip", "jumprelu"])
def test_a_transcoder_in_the_hooks_of_transformer_lens_equals_replace_mlp(
    both: Both, kind: str, basis: Any
) -> None:
    if basis == "stream" and (both.lm.is_parallel or both.lm.final_norm.kind == "layer"):
        pytest.skip("no site of this model's")
    rows = random_rows(2).long()
    for layer in range(both.lm.n_layers):
        made = random_transcoder(layer, kind, torch.float32)
        made.config = replace(made.config, basis=basis)
        dictionary = made.for_model(both.lm)
        with replace_mlp(both.lm, dictionary):
            expected = both.lm.logits(rows)
        assert apart(both, rows, expected, dictionary) < 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["sae_mlp_out", "sae_mlp_in"])
def test_so_does_an_sae(both: Both, kind: Any) -> None:
    rows = random_rows(2).long()
    made = random_transcoder(1, "relu", torch.float32)
    weights = made.parameters()
    # Centred, as LayerNorm's site is: TransformerLens reads nothing else of it.
    for name in ("W_dec", "b_dec"):
        weights[name] = both.lm.final_norm.centre(weights[name])
    dictionary = Dictionary(replace(made.config, kind=kind), **weights).for_model(both.lm)
    put = replace_mlp_input if kind == "sae_mlp_in" else replace_mlp
    with put(both.lm, dictionary):
        expected = both.lm.logits(rows)
    assert apart(both, rows, expected, dictionary) < 4e-6 * float(expected.abs().max())


def apart(both: Both, rows: Tensor, expected: Tensor, dictionary: Dictionary) -> float:
    """How far TransformerLens's logits with a dictionary in its hooks are from ours, up to a constant a token."""
    with torch.no_grad():
        found = both.bridge.run_with_hooks(rows, fwd_hooks=dictionary.hooks(), prepend_bos=False)
    offset = found - expected
    return float((offset - offset.mean(-1, keepdim=True)).abs().max())


def test_features_are_read_at_a_hook_and_nothing_changes(both: Both) -> None:
    rows, found = random_rows(2).long(), list[Tensor]()
    dictionary = random_transcoder(1, "relu", torch.float32)
    with torch.no_grad():
        plain = both.bridge(rows, prepend_bos=False)
        hooked = both.bridge.run_with_hooks(
            rows, fwd_hooks=dictionary.as_features(found), prepend_bos=False
        )
    assert torch.equal(plain, hooked)
    site = dictionary.config.input_site
    expected = dictionary.encode(both.lm.read(rows, {site})[site])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_sites_go_by_the_names_of_transformer_lens() -> None:
    assert Site("blocks.8.ln2.hook_normalized") == Site("mlp_in", 8)
    assert Site("blocks.11.hook_mlp_out") == Site("mlp_out", 11)
    for site in (Site("mlp_in", 3), Site("mlp_out", 0), Site("resid_mid", 5)):
        assert Site(site.hook_name) == site


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.8.mlp.hook_in", "the norm's output with its gain and bias"),
        ("blocks.8.hook_mlp_in", "the stream in front of the norm"),
        ("blocks.8.hook_resid_pre", "expected blocks.0.ln2.hook_normalized"),
        ("blocks.8.mlp.hook_out", "in front of a norm where one follows"),
        (
            "blocks.x.hook_mlp_out",
            "expected blocks.0.ln2.hook_normalized or blocks.0.hook_mlp_out or blocks.0.hook_resid_mid",
        ),
        ("blocks.8.attn.hook_z", "expected blocks.0.ln2.hook_normalized"),
    ],
)
def test_hooks_that_are_no_site_are_named(name: str, said: str) -> None:
    with pytest.raises(InputError, match=f"{name}'.* is no site: expected") as found:
        Site(name)
    assert said in str(found.value)


def test_a_raw_dictionary_has_no_hook() -> None:
    made = random_transcoder(1, "relu", torch.float32)
    raw = Dictionary(replace(made.config, basis="raw"), **made.parameters())
    with pytest.raises(InputError, match="take tclib.to_processed"):
        raw.hooks()
    with pytest.raises(InputError, match="take tclib.to_processed"):
        raw.as_features([])
