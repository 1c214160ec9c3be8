"""The model object: sites and weights against TransformerLens, overrides, loading, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import (
    GEOMETRIES,
    N_LAYERS,
    random_rows,
    tiny_hf_model,
    tiny_lm,
    tiny_tokenizer,
    unchecked_types,
)

from tclib.models.architectures import Norm
from tclib.models.language_model import LanguageModel
from tclib.models.locate import locate
from tclib.models.pypi import dequantise
from tclib.models.running import Site
from tclib.support.errors import InputError


def save_tiny(geometry: str, folder: Path) -> Path:
    tiny_hf_model(geometry).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_sites_and_weights_equal_those_of_transformer_lens(geometry: str, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = save_tiny(geometry, tmp_path / geometry)
    lm = LanguageModel.load(str(folder), device="cpu")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    bridge.enable_compatibility_mode()
    tokens = random_rows(2).long()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
    sites = [Site(name, layer) for name in ("mlp_in", "mlp_out") for layer in range(N_LAYERS)]
    hooks = {"mlp_in": "ln2.hook_normalized", "mlp_out": "hook_mlp_out"}
    for site, acts in lm.read(tokens, sites).items():
        expected = cache[f"blocks.{site.layer}.{hooks[site.name]}"]
        torch.testing.assert_close(acts, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lm.W_E, bridge.W_E.detach(), rtol=1e-4, atol=1e-5)
    offset = lm.W_U - bridge.W_U.detach()  # a constant over the vocabulary changes no probability
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), rtol=1e-4, atol=1e-5)
    if lm.W_pos is not None:
        torch.testing.assert_close(lm.W_pos, bridge.W_pos.detach(), rtol=1e-4, atol=1e-5)


def test_geometry_is_read_from_the_model() -> None:
    parallel = {g: tiny_lm(g).is_parallel for g in GEOMETRIES}
    assert parallel == {"gpt2": False, "neox": True, "llama": False}
    assert {g: tiny_lm(g).norm_kind for g in GEOMETRIES} == {
        "gpt2": "layer",
        "neox": "layer",
        "llama": "rms",
    }


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_normalise_is_centre_over_scale(kind: str) -> None:
    norm = Norm(kind, torch.ones(8), None, 1e-5)  # type: ignore[arg-type]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm.normalise(x), norm.centre(x) / norm.scale(x))


def test_reading_stops_after_the_last_site(lm: LanguageModel) -> None:
    reached = []
    handle = lm._block(2).mlp_reader.register_forward_hook(lambda *_: reached.append(2))
    lm.read(random_rows(1).long(), [Site("mlp_out", 1)])
    handle.remove()
    assert reached == []


def test_override_with_the_identity_changes_nothing(lm: LanguageModel) -> None:
    tokens = random_rows(2).long()
    before = lm.logits(tokens).log_softmax(-1)
    with lm.override_mlp(1, lambda _x, y: y), lm.override_mlp_input(0, lambda x: x):
        during = lm.logits(tokens).log_softmax(-1)
    torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["override_mlp", "override_mlp_input"])
def test_overrides_act_and_are_removed_even_after_an_error(lm: LanguageModel, what: str) -> None:
    tokens = random_rows(2).long()
    before = lm.logits(tokens)
    zero = (lambda _x, y: 0 * y) if what == "override_mlp" else (lambda x: 0 * x)
    with pytest.raises(ZeroDivisionError), getattr(lm, what)(1, zero):
        assert not torch.allclose(lm.logits(tokens), before)
        raise ZeroDivisionError
    torch.testing.assert_close(lm.logits(tokens), before, rtol=0, atol=0)


def test_starting_at_a_layer_changes_nothing_and_is_undone(lm: LanguageModel) -> None:
    tokens = random_rows(3).long()
    with torch.no_grad():
        whole = lm.logits(tokens)
        torch.testing.assert_close(lm.last_logits(tokens), whole[:, -1])
        streams = lm.streams(tokens, range(N_LAYERS))
        for layer, stream in streams.items():
            with lm.start_at(layer, stream):
                torch.testing.assert_close(lm.logits(tokens), whole, rtol=1e-5, atol=1e-6)
            # An override above acts all the same; what is below is not run.
            with lm.override_mlp(layer, lambda _x, y: 0 * y):
                expected = lm.logits(tokens)
                with lm.start_at(layer, stream):
                    torch.testing.assert_close(lm.logits(tokens), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError), lm.start_at(1, streams[1]):
            raise RuntimeError
        torch.testing.assert_close(lm.logits(tokens), whole)


def test_above_a_layer_the_last_mlp_reads_the_last_position_alone(lm: LanguageModel) -> None:
    tokens, n_positions = random_rows(3).long(), []
    cache = lm.cache(tokens)
    expected = (cache.final_in / cache.final_scale[..., None])[:, -1]
    handle = lm._block(N_LAYERS - 1).mlp_reader.register_forward_hook(
        lambda _mlp, inputs, _output: n_positions.append(inputs[0].shape[1])
    )
    for layer in range(N_LAYERS - 1):
        with torch.no_grad():
            found = lm.run_above(layer, lm.streams(tokens, [layer + 1])[layer + 1])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert n_positions == [1] * (N_LAYERS - 1)


def test_bundled_models_load_by_name() -> None:
    for name, parallel in (("demo", False), ("demo-neox", True)):
        lm = LanguageModel.load(name, device="cpu")
        assert (lm.n_layers, lm.d_model, lm.is_parallel) == (4, 128, parallel)
        assert lm.token_strings(lm.tokenize("The war lasted")[0])[1:] == [" The", " war", " lasted"]


def test_a_cached_hub_model_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--tiny--gpt2"
    snapshot = repository / "snapshots" / ("0" * 40)
    save_tiny("gpt2", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    assert Path(locate("tiny/gpt2")) == snapshot
    assert LanguageModel.load("tiny/gpt2").n_layers == N_LAYERS


# -- bad input ------------------------------------------------------------------------------


def test_a_model_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="nobody/nothing' is not in the local .* HF_HOME"):
        LanguageModel.load("nobody/nothing")


def test_folders_that_are_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config.json"):
        locate(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        locate(str(tmp_path / "missing"))
    with pytest.raises(InputError, match="neither a folder nor a valid hub id"):
        locate("not a model")


def test_a_truncated_model_is_named(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be read"):
        LanguageModel.load(str(folder))


def test_an_unsupported_geometry_is_named_with_the_supported(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForMaskedLM"]})
    )
    with pytest.raises(
        InputError, match="BertForMaskedLM; supported: BloomForCausalLM, .*GPT2LMHeadModel"
    ):
        locate(str(folder))


def test_smollm2_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCLIB_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InputError, match="make smollm2"):
        locate("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_layers_contexts_and_words_out_of_range_are_named(gpt2_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="layer 3 is out of range: tiny-gpt2 has layers 0 to 2"):
        gpt2_lm.check_layer(3)
    with pytest.raises(InputError, match="layer -1"):
        gpt2_lm.check_layer(-1)
    with pytest.raises(InputError, match="context of 65 tokens: tiny-gpt2 takes 2 to 64"):
        gpt2_lm.check_context(65)
    with pytest.raises(InputError, match="does not know"):
        gpt2_lm.tokenize("w3 zebra")
    with pytest.raises(InputError, match="at most 64"):
        gpt2_lm.tokenize("w3 " * 80)


def test_a_failed_conversion_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a gguf")
    with pytest.raises((OSError, ValueError)):
        dequantise(broken, tmp_path / "cache" / "smollm2")
    assert not (tmp_path / "cache" / "smollm2").exists()
    shutil.rmtree(tmp_path / "cache")


def test_a_site_that_does_not_exist_is_named() -> None:
    with (
        unchecked_types(),
        pytest.raises(InputError, match="name 'mlp_inn': expected 'mlp_in'"),
    ):
        Site("mlp_inn", 2)  # type: ignore[arg-type]
