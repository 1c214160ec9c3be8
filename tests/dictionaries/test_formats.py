"""Round trips bit for bit, the same output on the same model through every format, traps refused by name."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import (
    D_MODEL,
    FEW,
    GEOMETRIES,
    authors_file,
    edit_json,
    random_rows,
    random_transcoder,
    tiny_lm,
)
from torch import Tensor
from typer.testing import CliRunner

from tclib.cli import app
from tclib.dictionaries.bases import to_processed, to_raw
from tclib.dictionaries.dictionary import (
    TAKES_K,
    TAKES_THRESHOLD,
    Dictionary,
    DictionaryConfig,
)
from tclib.dictionaries.formats.any import Format, load_dictionary, read_any, write_any
from tclib.dictionaries.formats.authors import read_authors
from tclib.dictionaries.formats.circuit_tracer import (
    TRACER_THRESHOLD,
    read_circuit_tracer,
    write_circuit_tracer,
)
from tclib.dictionaries.formats.saelens import read_saelens, write_saelens
from tclib.dictionaries.formats.sparsify import read_sparsify, write_sparsify
from tclib.evaluation.replace import replace_mlp
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError


def transcoder(layer: int = 1, kind: str = "relu", basis: str = "processed") -> Dictionary:
    one = random_transcoder(layer, kind, torch.float32)
    one.config = replace(one.config, basis=basis, model="tiny")  # type: ignore[arg-type]
    return one


def assert_same(one: Dictionary, other: Dictionary) -> None:
    assert one.config == other.config
    theirs = other.parameters()
    for name, weight in one.parameters().items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("kind", ["relu", "skip", "jumprelu"])
@pytest.mark.parametrize("basis", ["processed", "raw"])
def test_saelens_and_back_is_bit_exact(tmp_path: Path, kind: str, basis: str) -> None:
    one = transcoder(1, kind, basis)
    write_saelens(one, tmp_path / "out")
    assert_same(one, read_saelens(tmp_path / "out"))
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["apply_b_dec_to_input"] is False
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    if kind == "skip":
        W_skip = load_file(tmp_path / "out" / "sae_weights.safetensors")["W_skip"]
        torch.testing.assert_close(W_skip.T, one.W_skip)


@pytest.mark.parametrize("kind", ["relu", "skip", "jumprelu"])
def test_circuit_tracer_and_back_is_bit_exact(tmp_path: Path, kind: str) -> None:
    several = {layer: transcoder(layer, kind) for layer in range(3)}
    write_circuit_tracer(several, tmp_path / "set")
    found = read_circuit_tracer(tmp_path / "set")
    for layer, one in several.items():
        assert_same(one, found[layer])
    shape = load_file(tmp_path / "set" / "layer_0.safetensors")["W_enc"].shape
    assert shape == (40, D_MODEL)  # features first, as there


def test_a_trained_batch_topk_dictionary_is_written_as_the_jumprelu_one_that_it_is(
    tmp_path: Path,
) -> None:
    one = transcoder(0, "batch_topk")
    x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    write_saelens(one, tmp_path / "lens")
    write_circuit_tracer({0: one}, tmp_path / "set")
    for found in (
        read_saelens(tmp_path / "lens"),
        read_circuit_tracer(tmp_path / "set")[0],
    ):
        assert (found.config.activation, found.config.k) == ("jumprelu", None)
        for name, weight in one.parameters().items():
            assert torch.equal(found.parameters()[name], weight)
        torch.testing.assert_close(found.encode(x), one.encode(x))


def test_thresholds_below_zero_are_cut_where_a_relu_stands_before_them_and_else_refused(
    tmp_path: Path,
) -> None:
    one = transcoder(0, "jumprelu")
    write_saelens(one, tmp_path / "lens")
    write_circuit_tracer({0: one}, tmp_path / "set")
    for path, name in (
        (tmp_path / "lens" / "sae_weights.safetensors", "threshold"),
        (tmp_path / "set" / "layer_0.safetensors", TRACER_THRESHOLD),
    ):
        tensors = load_file(path)
        tensors[name][3] = -1.0
        save_file(tensors, path)
    threshold = read_saelens(tmp_path / "lens").threshold
    assert threshold is not None and threshold[3] == 0
    with pytest.raises(InputError, match="threshold -1: expected 0 or more"):
        read_circuit_tracer(tmp_path / "set")


def test_sparsify_and_back_is_bit_exact(tmp_path: Path) -> None:
    one = transcoder(1, "topk", "raw")
    one.config = replace(one.config, model="")
    folder = tmp_path / "layers.1.mlp"
    write_sparsify(one, folder)
    assert_same(one, read_sparsify(folder))


HELD = {  # kinds of dictionary that come back as they were
    "tclib": ("relu", "topk", "skip", "batch_topk", "jumprelu"),
    "saelens": ("relu", "skip", "jumprelu"),
    "circuit-tracer": ("relu", "skip", "jumprelu"),
    "sparsify": ("topk",),
}
WIDTHS = st.integers(1, 40)


@FEW
@given(st.sampled_from(sorted(HELD)), st.data(), WIDTHS, WIDTHS, st.integers(0, 1000))
def test_any_width_and_kind_comes_back_bit_for_bit(
    form: Format, data: st.DataObject, width: int, n_features: int, seed: int
) -> None:
    kind = data.draw(st.sampled_from(HELD[form]))
    generator = torch.Generator().manual_seed(seed)
    takes_k, skip = kind in TAKES_K, kind == "skip"
    config = DictionaryConfig(
        *("transcoder", 0, width, width, n_features),
        activation="relu" if skip else kind,
        k=data.draw(st.integers(1, n_features)) if takes_k else None,
        skip=skip,
        basis="raw" if form == "sparsify" else "processed",
    )
    shapes = {"W_enc": (width, n_features), "b_enc": (n_features,)}
    shapes |= {"W_dec": (n_features, width), "b_dec": (width,)}
    shapes |= {"W_skip": (width, width)} if skip else {}
    shapes |= {"threshold": (n_features,)} if kind in TAKES_THRESHOLD else {}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if "threshold" in weights:
        weights["threshold"].abs_()
    one = Dictionary(config, **weights)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / ("layers.0.mlp" + (".safetensors" if form == "tclib" else ""))
        write_any({0: one}, out, form)
        found = read_any(out)
    assert found.format == form
    assert_same(one, found.dictionaries[0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", ["relu", "topk", "skip", "batch_topk", "jumprelu"])
def test_raw_and_processed_do_the_same_to_the_model(geometry: str, kind: str) -> None:
    """A raw transcoder, applied by hand to the MLP's own input, and its processed form in replace_mlp."""
    lm, raw = tiny_lm(geometry), transcoder(1, kind, "raw")
    rows = random_rows(4).long()
    processed = to_processed(raw, lm)
    norm = lm.mlp_norm(1)

    def by_hand(mlp_in: Tensor, _mlp_out: Tensor) -> Tensor:
        x = mlp_in * norm.gain + (0.0 if norm.bias is None else norm.bias)
        return raw(x).reconstruction

    with lm.override_mlp(1, by_hand):
        expected = lm.logits(rows)
    with replace_mlp(lm, processed):
        found = lm.logits(rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    back = to_processed(to_raw(processed, lm), lm)
    for name, weight in processed.parameters().items():
        torch.testing.assert_close(back.parameters()[name], weight, rtol=1e-5, atol=1e-6)
    assert to_processed(processed, lm) is processed


# -- the authors' checkpoints ---------------------------------------------------------------------


def test_the_authors_file_is_read_with_its_input_bias_folded(
    tmp_path: Path, runner_config: type
) -> None:
    path = tmp_path / "one.pt"
    state = authors_file(path, runner_config)
    del sys.modules["sae_training.config"], sys.modules["sae_training"]  # a reader has neither
    found = read_authors(path)
    assert (found.config.layer, found.config.model) == (1, "gpt2-small")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    z = torch.relu((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    torch.testing.assert_close(found.encode(x), z, rtol=1e-5, atol=1e-5)
    expected = z @ state["W_dec"] + state["b_dec_out"]
    torch.testing.assert_close(found(x).reconstruction, expected, rtol=1e-5, atol=1e-5)


class _Payload:
    """Unpickled by an ordinary reader, this would make a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, runner_config: type
) -> None:
    proof = tmp_path / "it_ran"
    path = tmp_path / "evil.pt"
    torch.save({"cfg": _Payload(str(proof)), "state_dict": {}}, path)
    with pytest.raises(InputError, match="asks for .*mkdir.*nothing else is ever run"):
        read_authors(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the payload is real: an ordinary reader runs it
    assert proof.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="truncated or no torch file"):
        read_authors(tmp_path / "plain.pt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"b_dec_out": None}, r"missing \[b_dec_out\]"),
        ({"more": torch.zeros(1)}, r"not expected \[more\]"),
        ({"W_enc": torch.zeros(40, 16)}, r"W_enc has shape \(40, 16\) \(transposed\?\)"),
        ({"W_dec": torch.zeros(40, 8)}, r"W_dec has shape \(40, 8\), expected \(40, 16\)"),
        ({"is_transcoder": False}, "is_transcoder is not set"),
        ({"hook_point_layer": 3}, "name different layers"),
        ({"hook_point": "blocks.1.hook_resid_post"}, "is no MLP input"),
        ({"hook_point": "somewhere"}, "expected one like blocks.8"),
        ({"W_enc": torch.zeros(16, 40, dtype=torch.int64)}, "expected floating point"),
    ],
)
def test_authors_files_that_do_not_fit_are_named(
    tmp_path: Path, runner_config: type, changed: dict[str, object], message: str
) -> None:
    authors_file(tmp_path / "one.pt", runner_config, **changed)
    with pytest.raises(InputError, match=message):
        read_authors(tmp_path / "one.pt")


def test_weights_are_read_in_float32_and_whole_numbers_are_none(
    tmp_path: Path, runner_config: type
) -> None:
    write_saelens(transcoder(), tmp_path / "s")
    path = tmp_path / "s" / "sae_weights.safetensors"
    tensors = load_file(path)
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, path)
    assert torch.equal(read_saelens(tmp_path / "s").W_dec, halves["W_dec"].float())
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
        with pytest.raises(InputError, match=f"is {dtype}, expected floating point"):
            read_saelens(tmp_path / "s")
    state = authors_file(tmp_path / "one.pt", runner_config)
    authors_file(tmp_path / "half.pt", runner_config, **{n: t.half() for n, t in state.items()})
    one, half = read_authors(tmp_path / "one.pt"), read_authors(tmp_path / "half.pt")
    torch.testing.assert_close(half.b_enc, one.b_enc, rtol=0, atol=0.05)


def test_truncated_files_are_named(tmp_path: Path, runner_config: type) -> None:
    authors_file(tmp_path / "one.pt", runner_config)
    content = (tmp_path / "one.pt").read_bytes()
    (tmp_path / "one.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"one.pt is truncated or no torch file"):
        read_authors(tmp_path / "one.pt")
    with pytest.raises(InputError, match="does not exist: give a .pt"):
        read_authors(tmp_path / "none.pt")
    write_saelens(transcoder(), tmp_path / "s")
    weights = tmp_path / "s" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(InputError, match="truncated or damaged"):
        read_saelens(tmp_path / "s")
    weights.unlink()
    with pytest.raises(InputError, match="sae_weights.safetensors does not exist"):
        read_saelens(tmp_path / "s")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": ["transcoder"]}, "architecture is a list; expected a text"),
        ({"architecture": "gated_transcoder"}, "architecture 'gated_transcoder'"),
        ({"architecture": "jumprelu_transcoder"}, r"missing \[threshold\]"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input is True"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ({"d_sae": 41}, r"W_enc has shape \(16, 40\), expected \(16, 41\)"),
        ({"architecture": "skip_transcoder"}, r"missing \[W_skip\]"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post"}}, "is no MLP input"),
        ({"metadata": {}}, "hook_name is missing; expected a text"),
        ({"metadata": None}, "metadata is missing; expected names and values"),
        ({"d_in": 16.0}, "d_in is a float; expected a whole number"),
        ({"d_sae": True}, "d_sae is a bool; expected a whole number"),
        ({"d_out": 10**30}, "d_out has 100 bits; expected a width"),
        (
            {"rescale_acts_by_decoder_norm": True},
            "rescale_acts_by_decoder_norm is True; only False",
        ),
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu'; only 'relu'"),
        ({"scaling_factor": 2.0}, "scaling_factor is 2.0; only 1.0"),
        (
            {
                "metadata": {
                    "hook_name": "blocks.1.ln2.hook_normalized",
                    "normalize_activations": "layer_norm",
                }
            },
            "normalize_activations is 'layer_norm'",
        ),
        (
            {
                "metadata": {
                    "hook_name": "blocks.1.ln2.hook_normalized",
                    "model_from_pretrained_kwargs": {"fold_ln": False},
                }
            },
            "fold_ln is False; only True",
        ),
        ({"hook_layer": 2}, "hook_layer is 2; only 1 can be read"),
        ({"hook_head_index": 3}, "hook_head_index is 3; only None"),
        ({"apply_b_dec_to_input": 0}, "apply_b_dec_to_input is 0; only False"),
    ],
)
def test_saelens_folders_that_do_not_fit_are_named(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    write_saelens(transcoder(), tmp_path / "s")
    edit_json(tmp_path / "s" / "cfg.json", **changed)
    with pytest.raises(InputError, match=message):
        read_saelens(tmp_path / "s")


def test_circuit_tracer_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_circuit_tracer({0: transcoder(0), 1: transcoder(1)}, folder)
    config = (folder / "config.yaml").read_text()
    tensors = load_file(folder / "layer_1.safetensors")

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_circuit_tracer(folder)

    files = ["hf://someone/set/layer_1.safetensors", "hf://someone/set/layer_0.safetensors"]
    (folder / "config.yaml").write_text(config + yaml.safe_dump({"transcoders": files[::-1]}))
    assert list(read_circuit_tracer(folder)) == [0, 1]
    (folder / "config.yaml").write_text(config + yaml.safe_dump({"transcoders": files}))
    refused("transcoder 0 of its list is 'hf://someone/set/layer_1.safetensors'")
    more = [*files[::-1], "layer_2.safetensors"]
    (folder / "config.yaml").write_text(config + yaml.safe_dump({"transcoders": more}))
    refused("its list names 3 transcoders, and it holds 2")
    for said in (
        {"skip_connection": True},
        {"activation_function": "topk"},
        {"scaling_factor": 2.0},
    ):
        (folder / "config.yaml").write_text(config + yaml.safe_dump(said))
        refused(f"{next(iter(said))} is .*; only")
    (folder / "config.yaml").write_text(config)

    save_file(
        {**tensors, "activation_function.threshold": torch.ones(41)}, folder / "layer_1.safetensors"
    )
    refused(r"threshold has shape \(41,\), expected \(40,\)")
    save_file({**tensors, "W_enc": tensors["W_enc"].T.contiguous()}, folder / "layer_1.safetensors")
    refused(r"layer_1.safetensors: ")
    save_file({"b_enc": tensors["b_enc"]}, folder / "layer_1.safetensors")
    refused("no matrix W_enc")
    (folder / "layer_1.safetensors").rename(folder / "layer_2.safetensors")
    refused("no gap")
    for layer in range(2, 1_100):
        (folder / f"layer_{layer}.safetensors").touch()
    refused("1,099 layers; expected at most 1,000")
    (folder / "config.yaml").write_text(config.replace("transcoder_set", "cross_layer_transcoder"))
    refused("model_kind 'cross_layer_transcoder'")
    (folder / "config.yaml").write_text(": [")
    refused("is not YAML")
    for bad, message in (
        ({1: transcoder(1)}, "0 upwards"),
        ({0: transcoder(0, "topk")}, "cannot hold"),
    ):
        with pytest.raises(InputError, match=message):
            write_circuit_tracer(bad, tmp_path / "bad")
    mixed = {0: transcoder(0), 1: transcoder(1, basis="raw")}
    with pytest.raises(InputError, match="one basis"):
        write_circuit_tracer(mixed, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_sparsify_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "h.1.mlp"
    write_sparsify(transcoder(1, "topk", "raw"), folder)
    original = (folder / "cfg.json").read_text()
    for changed, message in (
        ({"transcode": False}, "an autoencoder"),
        ({"activation": "groupmax"}, "activation is 'groupmax'"),
        ({"num_latents": 80}, "expected"),
        ({"normalize": "rms"}, "normalize is 'rms'; only None"),
        ({"hookpoint": "h.5.mlp"}, "hookpoint is 'h.5.mlp'; only 'h.1.mlp'"),
        ({"signed": True}, "signed is True; only False"),
        ({"transcode": "false"}, "transcode is a str; expected true or false"),
        ({"skip_connection": "no"}, "skip_connection is a str; expected true or false"),
        ({"skip_connection": True}, r"missing \[W_skip\]"),
    ):
        (folder / "cfg.json").write_text(original)
        edit_json(folder / "cfg.json", **changed)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            read_sparsify(folder)
    folder.rename(tmp_path / "embed")
    with pytest.raises(InputError, match="expected one like h.8.mlp"):
        read_sparsify(tmp_path / "embed")
    with pytest.raises(InputError, match="convert with to_raw"):
        write_sparsify(transcoder(1, "topk"), tmp_path / "bad")
    with pytest.raises(InputError, match="cannot hold a relu"):
        write_sparsify(transcoder(1, "relu", "raw"), tmp_path / "bad")


@pytest.mark.parametrize("kind", ["tclib", "saelens", "circuit-tracer", "sparsify"])
def test_weights_that_became_nan_are_written_in_no_format(tmp_path: Path, kind: Format) -> None:
    topk = kind == "sparsify"
    one = transcoder(0, "topk" if topk else "relu", "raw" if topk else "processed")
    one.W_dec[3, 2] = torch.nan
    with pytest.raises(InputError, match="W_dec has 1 values that are NaN"):
        write_any({0: one}, tmp_path / "h.0.mlp", kind)
    assert not any(tmp_path.iterdir())


def test_convert_and_inspect_on_the_command_line(tmp_path: Path) -> None:
    lm = LanguageModel.load("demo")
    site = Site("mlp_in", 1)
    width = lm.read(torch.tensor([[lm.bos_id, 5]]), {site})[site].shape[-1]
    generator = torch.Generator().manual_seed(0)
    config = replace(transcoder().config, d_in=width, d_out=width, n_features=32, model="demo")
    weights = [torch.randn(width, 32, generator=generator), torch.zeros(32)]
    weights += [torch.randn(32, width, generator=generator), torch.zeros(width)]
    one = Dictionary(config, *weights)
    one.save(tmp_path / "one.safetensors")
    runner = CliRunner()

    def run(*arguments: object) -> str:
        result = runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        return result.output

    assert "layers [1]" in run(
        "convert", tmp_path / "one.safetensors", tmp_path / "s", "--to", "saelens"
    )
    told = run("inspect", tmp_path / "s")
    assert "format saelens" in told and f"{width} → 32 → {width}, relu, processed basis" in told
    run("convert", tmp_path / "s", tmp_path / "two.safetensors")
    assert_same(one, Dictionary.load(tmp_path / "two.safetensors"))
    raw = ("--to", "saelens", "--basis", "raw", "--model", "demo")
    run("convert", tmp_path / "s", tmp_path / "raw", *raw)
    assert read_saelens(tmp_path / "raw").config.basis == "raw"
    for arguments, message in (
        (("convert", tmp_path / "s", tmp_path / "x", "--to", "onnx"), "format 'onnx'"),
        (("convert", tmp_path / "s", tmp_path / "raw"), "is there already"),
        (("convert", tmp_path / "s", tmp_path / "x", "--basis", "raw"), "give --model"),
        (("convert", tmp_path / "s", tmp_path / "x", "--to", "authors"), "read only"),
        (("inspect", tmp_path), "no known dictionary"),
    ):
        with pytest.raises(InputError, match=message):
            run(*arguments)
    assert not (tmp_path / "x").exists()


def test_one_dictionary_is_loaded_from_any_format_and_of_several_the_layer_is_asked(
    tmp_path: Path,
) -> None:
    write_saelens(transcoder(1), tmp_path / "one")
    assert_same(load_dictionary(tmp_path / "one"), transcoder(1))
    write_circuit_tracer({layer: transcoder(layer) for layer in range(2)}, tmp_path / "set")
    assert load_dictionary(str(tmp_path / "set"), layer=1).config.layer == 1
    for layer in (None, 7):
        with pytest.raises(InputError, match=rf"holds layers \[0, 1\]: give one.* not {layer}"):
            load_dictionary(tmp_path / "set", layer)
