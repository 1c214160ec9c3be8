"""Released sets by name, on files written here exactly as each repository has them (the source is named in each test)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_rehearsal import add_repository
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, N_FEATURES, TOLERANCE, make_lm, random_rows, random_transcoder
from torch import Tensor
from typer.testing import CliRunner

from tclib import cli
from tclib.circuits.faithfulness import features_alone
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import attribution_graph
from tclib.circuits.interventions import ablation_table
from tclib.dictionaries.bases import to_processed
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.any import load_dictionary, write_any
from tclib.dictionaries.formats.circuit_tracer import read_circuit_tracer
from tclib.dictionaries.lazy import LazyDictionary
from tclib.dictionaries.published import load_published, published_table
from tclib.dictionaries.released_sets import SETS, released_set
from tclib.evaluation import released
from tclib.evaluation.released import check_released
from tclib.evaluation.replace import replace_mlp
from tclib.models.running import Site
from tclib.support.errors import InputError

Write = Callable[[Path], None]
ROWS = random_rows(2, 7).long()


def tensors_of(kind: str, layer: int) -> dict[str, Tensor]:
    return dict(random_transcoder(layer, kind, torch.float32).parameters())


def tracer_file(kind: str, layer: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """As circuit-tracer saves a layer (v0.5.0, single_layer_transcoder.py): W_enc [F, d], W_dec [F, d], W_skip [d, d]."""
    held = tensors_of(kind, layer)
    held["W_enc"] = held["W_enc"].T
    if "W_skip" in held:
        held["W_skip"] = held["W_skip"].T
    if "threshold" in held:
        held["activation_function.threshold"] = held.pop("threshold")
    return {name: tensor.to(dtype).contiguous() for name, tensor in held.items()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Write], Path]:
    """A local cache of the hub to which repositories are added; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def add(repository: str, write: Write, revision: str = "main") -> Path:
        return add_repository(tmp_path / "hub", "model", repository, write, revision=revision)

    return add


def same(found: Dictionary, expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found.parameters()[name], weight, rtol=1e-6, atol=1e-6)


# -- each layout --------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_gemma_scope_is_found_by_its_lowest_l0(hub: Any, lazy: bool) -> None:
    """google/gemma-scope-2b-pt-transcoders; the L0s are those of circuit-tracer's gemmascope-l0-0.yaml."""
    held = tensors_of("jumprelu", 12)

    def write(folder: Path) -> None:
        place = folder / "layer_12/width_16k/average_l0_6"
        place.mkdir(parents=True)
        np.savez(place / "params.npz", **{name: weight.numpy() for name, weight in held.items()})

    hub("google/gemma-scope-2b-pt-transcoders", write)
    (one,) = load_published("gemma-scope-2b", [12], lazy=lazy).values()
    same(one, held)
    assert (one.config.model, one.config.basis) == ("google/gemma-2-2b", "processed")
    assert isinstance(one, LazyDictionary) == lazy
    with pytest.raises(InputError, match="layer_13/width_16k/average_l0_8/params.npz is not in"):
        load_published("gemma-scope-2b", [12, 13])


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("variant", [None, "width_262k_l0_big_affine"])
def test_gemma_scope_2_has_variants(hub: Any, variant: str | None, lazy: bool) -> None:
    """google/gemma-scope-2-270m-pt, folder transcoder_all."""
    held = tensors_of("jumprelu", 3)
    named = {{"W_enc": "w_enc", "W_dec": "w_dec"}.get(n, n): w for n, w in held.items()}
    if variant:
        named["affine_skip_connection"] = torch.eye(D_MODEL)

    def write(folder: Path) -> None:
        place = folder / f"transcoder_all/layer_3_{variant or 'width_16k_l0_small'}"
        place.mkdir(parents=True)
        save_file({n: w.contiguous() for n, w in named.items()}, place / "params.safetensors")

    hub("google/gemma-scope-2-270m-pt", write)
    (one,) = load_published("gemma-scope-2-270m-pt", [3], variant=variant, lazy=lazy).values()
    same(one, held)
    assert (one.config.model, one.config.skip) == ("google/gemma-3-270m", variant is not None)
    with pytest.raises(InputError, match="variant 'wide': gemma-scope-2-270m-pt has width_16k_l0"):
        load_published("gemma-scope-2-270m-pt", [3], variant="wide")


def a_set(config: dict[str, Any], kind: str, layer: int, dtype: torch.dtype) -> Write:
    def write(folder: Path) -> None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        save_file(tracer_file(kind, layer, dtype), folder / f"layer_{layer}.safetensors")

    return write


def hooks(model: str, reads: str, writes: str = "mlp.hook_out", **more: Any) -> dict[str, Any]:
    return {
        "model_name": model,
        "model_kind": "transcoder_set",
        "feature_input_hook": reads,
        "feature_output_hook": writes,
        **more,
    }


@pytest.mark.parametrize(
    ("name", "repository", "config", "kind", "basis"),
    [
        (
            "llama-3.2-1b",
            "mntss/transcoder-Llama-3.2-1B",
            hooks("meta-llama/Llama-3.2-1B", "hook_resid_mid"),
            "skip",
            "stream",
        ),
        (
            "llama-3.2-1b",
            "mntss/transcoder-Llama-3.2-1B",
            hooks("meta-llama/Llama-3.2-1B", "mlp.hook_in"),
            "relu",
            "raw",
        ),
        (
            "qwen3-0.6b",
            "mwhanna/qwen3-0.6b-transcoders-lowl0",
            hooks("Qwen/Qwen3-0.6B", "mlp.hook_in", "hook_mlp_out"),
            "relu",
            "raw",
        ),
        (
            "llama-3.1-8b-instruct",
            "facebook/crv-8b-instruct-transcoders",
            hooks("meta-llama/Llama-3.1-8B-Instruct", "mlp.hook_in", activation="topk"),
            "relu",
            "raw",
        ),
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_sets_of_circuit_tracer(
    hub: Any, name: str, repository: str, config: Any, kind: str, basis: str, lazy: bool
) -> None:
    """Configurations as in each repository's config.yaml; weights in bfloat16, as the newer ones are."""
    hub(repository, a_set(config, kind, 5, torch.bfloat16))
    if config.get("activation") == "topk":
        with pytest.raises(InputError, match="k 128: topk expects 1 to n_features"):
            load_published(name, [5], lazy=lazy)
        return
    (one,) = load_published(name, [5], lazy=lazy).values()
    same(one, {n: w.bfloat16().float() for n, w in tensors_of(kind, 5).items()})
    assert (one.config.basis, one.config.model) == (basis, config["model_name"])


def test_a_top_k_without_its_k_is_asked_for_it(tmp_path: Path) -> None:
    """circuit-tracer hard-codes 128 for facebook/crv-8b-instruct-transcoders alone; files may hold k as a tensor."""
    config = hooks("m", "mlp.hook_in", activation="topk")
    a_set(config, "relu", 0, torch.float32)(tmp_path)
    with pytest.raises(InputError, match=r"activation topk without a k: say it in config.yaml"):
        load_dictionary(tmp_path)
    held = {**tracer_file("relu", 0), "k": torch.tensor(3)}
    save_file(held, tmp_path / "layer_0.safetensors")
    assert load_dictionary(tmp_path).config.k == 3
    for wrong in (torch.tensor(3.7), torch.tensor(float("nan")), torch.tensor([3, 4])):
        save_file({**held, "k": wrong}, tmp_path / "layer_0.safetensors")
        with pytest.raises(InputError, match="expected one whole number from 1"):
            load_dictionary(tmp_path)


@pytest.mark.parametrize("dicts", [False, True])
def test_lists_of_files_on_the_hub(hub: Any, tmp_path: Path, dicts: bool) -> None:
    """mntss/gemma-scope-transcoders lists files of Gemma Scope; its first version had dictionaries in its list."""
    held = tensors_of("jumprelu", 0)

    def write(folder: Path) -> None:
        for layer in (0, 1):
            place = folder / f"layer_{layer}/width_16k/average_l0_76"
            place.mkdir(parents=True)
            arrays = {name: weight.numpy() for name, weight in held.items()}
            np.savez(place / "params.npz", **arrays)

    hub("google/gemma-scope-2b-pt-transcoders", write)
    hub("someone/set", a_set({}, "relu", 1, torch.float32), "new-training")
    files = [
        "hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz",
        "hf://someone/set/layer_1.safetensors?revision=new-training",
        "hf://someone/set/layer_2.safetensors?revision=new-training",
    ]
    given: Any = [{"layer": i, "filepath": f} for i, f in enumerate(files)] if dicts else files
    config = hooks("google/gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out", transcoders=given)
    if dicts:
        del config["model_kind"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    found = read_circuit_tracer(tmp_path, [0, 1])
    same(found[0], held)
    same(found[1], tensors_of("relu", 1))
    assert {one.config.model for one in found.values()} == {"google/gemma-2-2b"}
    with pytest.raises(InputError, match=r"layer_2.safetensors of someone/set is not in the local"):
        read_circuit_tracer(tmp_path)
    with pytest.raises(InputError, match=r"layers \[7\]: the set has 0 to 2"):
        load_dictionary(tmp_path, layer=7)
    for wrong, message in (
        ("hf://someone", "expected hf://owner/repository/path"),
        ("hf://a b/c d/e", "expected hf://owner/repository/path"),
        ("hf://[/a/b/c", "expected hf://owner/repository/path"),
        (files[0].replace("layer_0", "layer_1"), "is of layer 1 and in the processed basis"),
        ("other.safetensors", "files are read by their names"),
        (3, "expected a file's name"),
    ):
        config["transcoders"] = [wrong]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(InputError, match=message):
            load_dictionary(tmp_path, layer=0)


def test_skip_transcoders_of_eleutherai(hub: Any) -> None:
    """EleutherAI/skip-transcoder-SmolLM2-135M-128x: a folder a layer, and a cfg.json that says no `transcode` yet."""
    held = tensors_of("skip", 4)
    named = {
        "encoder.weight": held["W_enc"].T,
        "encoder.bias": held["b_enc"],
        "W_dec": held["W_dec"],
        "b_dec": held["b_dec"],
        "W_skip": held["W_skip"].T,
    }
    config = {"expansion_factor": 1, "normalize_decoder": True, "num_latents": N_FEATURES, "k": 5}
    config |= {"multi_topk": False, "skip_connection": True, "d_in": D_MODEL}

    def write(folder: Path) -> None:
        place = folder / "model.layers.4.mlp"
        place.mkdir()
        (place / "cfg.json").write_text(json.dumps(config))
        save_file({n: w.contiguous() for n, w in named.items()}, place / "sae.safetensors")

    hub("EleutherAI/skip-transcoder-SmolLM2-135M-128x", write)
    for lazy in (False, True):
        (one,) = load_published("smollm2-135m-skip", [4], lazy=lazy).values()
        same(one, held)
        assert (one.config.k, one.config.basis) == (5, "raw")
        assert one.config.model == "HuggingFaceTB/SmolLM2-135M"


# -- Llama Scope --------------------------------------------------------------------------------


def llama_scope_hyperparams(**changed: Any) -> dict[str, Any]:
    return {
        "hook_point_in": "blocks.2.ln2.hook_normalized",
        "hook_point_out": "blocks.2.hook_mlp_out",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 7.0, "out": 0.5},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
        **changed,
    }


def write_llama_scope(folder: Path, config: dict[str, Any]) -> None:
    held = tensors_of("relu", 2)
    place = folder / "Llama3_1-8B-Base-L2TC-8x"
    (place / "checkpoints").mkdir(parents=True)
    (place / "hyperparams.json").write_text(json.dumps(config))
    named = {
        "encoder.weight": held["W_enc"].T,
        "encoder.bias": held["b_enc"],
        "decoder.weight": held["W_dec"].T,
        "decoder.bias": held["b_dec"],
    }
    weights = {n: w.contiguous() for n, w in named.items()}
    save_file(weights, place / "checkpoints/final.safetensors")


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_llama_scope_scales_what_it_reads_and_writes(hub: Any, activation: str) -> None:
    """fnlp/Llama3_1-8B-Base-LXTC-8x; the forward pass is that of Language-Model-SAEs of October 2024 (sae.py)."""
    config = llama_scope_hyperparams(act_fn=activation, top_k=4)
    hub("fnlp/Llama3_1-8B-Base-LXTC-8x", lambda folder: write_llama_scope(folder, config))
    (one,) = load_published("llama-scope-8x", [2]).values()
    held = tensors_of("relu", 2)
    x = 3.0 * torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    root = D_MODEL**0.5
    hidden = (x * root / 7.0) @ held["W_enc"] + held["b_enc"]
    if activation == "jumprelu":
        z = torch.where(hidden > 0.4, hidden, 0.0)
    else:
        gate = hidden * held["W_dec"].norm(dim=1)
        z = torch.zeros_like(hidden).scatter(-1, gate.topk(4).indices, 1.0) * hidden.relu()
    expected = (z @ held["W_dec"] + held["b_dec"]) * 0.5 / root
    torch.testing.assert_close(one(x).reconstruction, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.encode(x) > 0, z > 0)
    assert (one.config.layer, one.config.model) == (2, "meta-llama/Llama-3.1-8B")


def test_tensors_that_llama_scope_does_not_have_are_refused(tmp_path: Path) -> None:
    write_llama_scope(tmp_path, llama_scope_hyperparams())
    place = tmp_path / "Llama3_1-8B-Base-L2TC-8x/checkpoints/final.safetensors"
    held = load_file(place)
    for changed, message in (
        ({"W_skip": torch.eye(D_MODEL)}, r"not expected \[W_skip\]"),
        ({"decoder.bias": torch.zeros(D_MODEL, dtype=torch.int8)}, "tensors of torch.int8"),
    ):
        save_file({**held, **changed}, place)
        with pytest.raises(InputError, match=message):
            load_dictionary(place.parents[1])


def test_what_its_library_saves_today(tmp_path: Path) -> None:
    """llamascopium (May 2026): config.json and sae_weights.safetensors, as save_pretrained writes them."""
    held = tensors_of("jumprelu", 2)
    norms = {"blocks.2.mlp.hook_in": 3.0, "blocks.2.hook_mlp_out": 2.0}
    config = llama_scope_hyperparams(hook_point_in="blocks.2.mlp.hook_in", top_k=50)
    for name in ("jump_relu_threshold", "dataset_average_activation_norm"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = {"W_E": held["W_enc"], "b_E": held["b_enc"], "W_D": held["W_dec"], "b_D": held["b_dec"]}
    named["activation_function.log_jumprelu_threshold"] = held["threshold"].log()
    named |= {
        f"dataset_average_activation_norm.{hook}": torch.tensor(norm)
        for hook, norm in norms.items()
    }
    save_file({n: w.contiguous() for n, w in named.items()}, tmp_path / "sae_weights.safetensors")
    one = load_dictionary(tmp_path)
    assert one.config.basis == "raw"
    x = 3.0 * torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    root = D_MODEL**0.5
    hidden = (x * root / 3.0) @ held["W_enc"] + held["b_enc"]
    is_open = hidden * held["W_dec"].norm(dim=1) > held["threshold"]
    expected = (torch.where(is_open, hidden, 0.0) @ held["W_dec"] + held["b_dec"]) * 2.0 / root
    torch.testing.assert_close(one(x).reconstruction, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn 'gelu'; expected jumprelu or topk"),
        ({"norm_activation": "token-wise"}, "scales every token by itself"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        (
            {"dataset_average_activation_norm": {"in": 0.0, "out": 1.0}},
            "expected two norms above 0",
        ),
        ({"jump_relu_threshold": None}, "jump_relu_threshold is None"),
        ({"jump_relu_threshold": 10**400}, "jump_relu_threshold is"),
        ({"dataset_average_activation_norm": 5}, "dataset_average_activation_norm is a int"),
        ({"dataset_average_activation_norm": {"in": "x", "out": None}}, "two norms above 0"),
        ({"hook_point_out": "blocks.2.hook_resid_post"}, "is no MLP output"),
    ],
)
def test_what_llama_scope_may_not_hold(tmp_path: Path, changed: Any, message: str) -> None:
    write_llama_scope(tmp_path, llama_scope_hyperparams(**changed))
    with pytest.raises(InputError, match=message):
        load_dictionary(tmp_path / "Llama3_1-8B-Base-L2TC-8x")


# -- lazily read --------------------------------------------------------------------------------


def lazily(folder: Path, kind: str, layer: int) -> Dictionary:
    """A raw-basis dictionary of circuit-tracer's layout that stays in its file."""
    place = folder / str(layer)
    place.mkdir()
    a_set(hooks("", "mlp.hook_in", "hook_mlp_out"), kind, layer, torch.float32)(place)
    return read_circuit_tracer(place, [layer], lazy=True)[layer]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_graphs_of_lazily_read_transcoders_are_the_same_and_close(
    family: str, tmp_path: Path
) -> None:
    lm = make_lm(family, torch.float32)
    kinds = {0: "relu", 1: "jumprelu", 2: "skip"}
    lazy = [to_processed(lazily(tmp_path, kind, n), lm) for n, kind in kinds.items()]
    whole = [to_processed(read_circuit_tracer(tmp_path / str(n), [n])[n], lm) for n in kinds]
    assert any(isinstance(one, LazyDictionary) for one in lazy) == (family != "gpt2")
    found = [
        attribution_graph(FrozenPrompts(lm, ROWS, several), prompt=1) for several in (lazy, whole)
    ]
    assert found[0].nodes["name"].tolist() == found[1].nodes["name"].tolist()
    torch.testing.assert_close(found[0].edges, found[1].edges, rtol=1e-5, atol=1e-6)
    assert found[0].closure()["residual"].abs().max() < TOLERANCE[torch.float32]
    for one, other in zip(lazy, whole, strict=True):
        x = lm.read(ROWS, {one.config.input_site})[one.config.input_site]
        torch.testing.assert_close(
            one(x).reconstruction, other(x).reconstruction, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(one.encoder_direction(3), other.encoder_direction(3))
        with replace_mlp(lm, one):
            replaced = lm.logits(ROWS)
        with replace_mlp(lm, other):
            torch.testing.assert_close(lm.logits(ROWS), replaced, rtol=1e-4, atol=1e-5)
    frozen = FrozenPrompts(lm, ROWS, lazy)
    features = found[0].nodes[found[0].nodes["kind"] == "feature"]
    keep = torch.ones(1, len(features), dtype=torch.bool)
    with features_alone(frozen, features, keep, with_errors=True, prompt=1):
        torch.testing.assert_close(lm.logits(ROWS[1:]), lm.logits(ROWS)[1:], rtol=1e-4, atol=1e-5)


def test_a_lazy_dictionary_is_what_it_is_whole(tmp_path: Path) -> None:
    one = lazily(tmp_path, "relu", 0)
    assert isinstance(one, LazyDictionary)
    whole = one.to(dtype=torch.float64)
    assert not isinstance(whole, LazyDictionary)
    assert whole.W_enc.dtype == torch.float64
    assert one.to(dtype=torch.float32) is one
    one.save(tmp_path / "kept.safetensors")
    same(Dictionary.load(tmp_path / "kept.safetensors"), tensors_of("relu", 0))
    one.keep(torch.tensor([1, 4]))
    torch.testing.assert_close(one.decoder_rows(torch.tensor([4, 1])), whole.W_dec[[4, 1]].float())
    torch.testing.assert_close(one.decoder_rows(torch.tensor([2])), whole.W_dec[[2]].float())


def test_a_lazy_dictionary_that_is_not_finite_is_found_when_it_is_read(tmp_path: Path) -> None:
    held = tracer_file("jumprelu", 0)
    held["W_enc"][3, 2] = float("nan")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(hooks("", "mlp.hook_in", "hook_mlp_out")))
    save_file(held, tmp_path / "layer_0.safetensors")
    one = load_dictionary(tmp_path, lazy=True)
    for use in (
        lambda: one.encode(torch.ones(2, D_MODEL)),
        lambda: one.encoder_direction(3),
        lambda: one.save(tmp_path / "kept.safetensors"),
        lambda: write_any({0: one}, tmp_path / "out", "saelens"),
    ):
        with pytest.raises(InputError, match="layer_0.safetensors: rows that are NaN or infinite"):
            use()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "layer_0.safetensors",
    ]


def test_gradients_single_tokens_and_models_that_change(tmp_path: Path) -> None:
    lm = make_lm("llama", torch.float32)
    raw = lazily(tmp_path, "relu", 1)
    one, whole = to_processed(raw, lm), to_processed(raw.to(dtype=torch.float64), make_lm("llama"))
    x = torch.randn(2, D_MODEL, requires_grad=True)
    (grad,) = torch.autograd.grad(one(x).reconstruction.sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(whole(exact).reconstruction.sum(), exact)
    torch.testing.assert_close(grad, expected.float(), rtol=1e-4, atol=1e-5)
    assert one(x[0].detach()).reconstruction.shape == (D_MODEL,)
    frozen = FrozenPrompts(lm, ROWS, [one])
    root = frozen.logit_target({5: 1.0}, -1)
    table = ablation_table(frozen, attribution_graph(frozen, [root]), root)
    assert np.isfinite(table["predicted_gradient"]).all()
    before = one.encoder_direction(3)
    lm.mlp_norm(1).gain.mul_(2)  # the model's own parameter
    assert torch.equal(one.encoder_direction(3), before)
    with pytest.raises(InputError, match="nonsense"):
        one.to("nonsense")  # type: ignore[arg-type]


MEMORY = """
import sys, torch
from pathlib import Path
from tclib.dictionaries.formats.circuit_tracer import read_circuit_tracer
def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
torch.set_num_threads(1)
x = torch.ones(4, 256)
x @ torch.ones(256, 8192)
before = own()
(one,) = read_circuit_tracer(Path(sys.argv[1]), [1], lazy=True).values()
z = one.encode(x)
one.keep(torch.arange(50))
print((own() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_rows_of_active_features_come_into_memory(tmp_path: Path) -> None:
    n_features, d_model = 150_000, 256  # 2 × 77 MB in bfloat16, 300 MB in float32
    weights = {
        "W_enc": torch.zeros(n_features, d_model, dtype=torch.bfloat16),
        "W_dec": torch.zeros(n_features, d_model, dtype=torch.bfloat16),
        "b_enc": torch.zeros(n_features),
        "b_dec": torch.zeros(d_model),
    }
    save_file(weights, tmp_path / "layer_1.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(hooks("", "mlp.hook_in", "hook_mlp_out")))
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60  # MB: a piece of the encoder, activations, fifty rows


# -- the table, the check, the command ----------------------------------------------------------


def test_the_table_lists_every_set() -> None:
    table = published_table()
    assert table["name"].is_unique
    assert set(table["name"]) == set(SETS)
    for one in SETS.values():
        files = [one.names(layer, one.variants[0], (one.file,))[0] for layer in range(one.n_layers)]
        assert len(set(files)) == one.n_layers
        assert "None" not in "".join(files)
    with pytest.raises(InputError, match=r"released set 'gemma-scope-2B'.*gemma-scope-2b"):
        released_set("gemma-scope-2B")
    with pytest.raises(InputError, match=r"layers \[26\]: expected at least one, of 0 to 25"):
        load_published("gemma-scope-2b", [26])


def test_files_of_another_model_or_layer_are_refused(hub: Any) -> None:
    wrong = hooks("meta-llama/Llama-3.2-3B", "mlp.hook_in")
    hub("mntss/transcoder-Llama-3.2-1B", a_set(wrong, "relu", 5, torch.float32))
    with pytest.raises(InputError, match=r"is of meta-llama/Llama-3.2-3B, and llama-3.2-1b is of"):
        load_published("llama-3.2-1b", [5])


def test_a_matrix_on_its_side_and_a_missing_threshold_are_named(hub: Any) -> None:
    """The older revisions of mntss/transcoder-Llama-3.2-1B have W_dec [d, F]."""

    def older(folder: Path) -> None:
        a_set(hooks("meta-llama/Llama-3.2-1B", "mlp.hook_in"), "relu", 5, torch.float32)(folder)
        held = tracer_file("relu", 5)
        held["W_dec"] = held["W_dec"].T.contiguous()
        save_file(held, folder / "layer_5.safetensors")

    hub("mntss/transcoder-Llama-3.2-1B", older)
    for lazy in (False, True):
        with pytest.raises(InputError, match=r"W_dec has shape .* \(transposed\?.*expected"):
            load_published("llama-3.2-1b", [5], lazy=lazy)

    def without(folder: Path) -> None:
        place = folder / "layer_12/width_16k/average_l0_6"
        place.mkdir(parents=True)
        held = {n: w.numpy() for n, w in tensors_of("jumprelu", 12).items() if n != "threshold"}
        np.savez(place / "params.npz", **held)

    hub("google/gemma-scope-2b-pt-transcoders", without)
    for lazy in (False, True):
        with pytest.raises(InputError, match=r"tensors missing \[threshold\]"):
            load_published("gemma-scope-2b", [12], lazy=lazy)


def exact_set(folder: Path, lm: Any, turned: bool) -> None:
    """A set whose middle layer reads mlp_in as it should, or turned in the space of features it reads."""
    transcoder = random_transcoder(1, "relu", torch.float32)
    rows = torch.cat([lm.tokenize(text) for text in released.TEXT][:1])
    site = transcoder.config.input_site
    acts = lm.read(rows, {site, Site("mlp_out", 1)})
    z = transcoder.encode(acts[site][0])
    y = acts[Site("mlp_out", 1)][0]
    centred = torch.cat([z, torch.ones(len(z), 1)], 1)
    fitted = torch.linalg.lstsq(centred, y, driver="gelsd").solution
    held = dict(transcoder.parameters()) | {"W_dec": fitted[:-1], "b_dec": fitted[-1]}
    if turned:
        held["W_enc"] = held["W_enc"].roll(5, 0)
    place = folder / "layer_1/width_16k/average_l0_6"
    place.mkdir(parents=True)
    held["threshold"] = torch.zeros(N_FEATURES)
    np.savez(place / "params.npz", **{n: w.numpy() for n, w in held.items()})


@pytest.mark.parametrize("turned", [False, True])
def test_the_check_tells_a_set_that_is_read_wrongly(
    hub: Any, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    lm = make_lm("gemma2", torch.float32)
    own = replace(
        SETS["gemma-scope-2b"], repository="tiny/set", n_layers=3, l0=(0, 6, 0), model="gemma2"
    )
    monkeypatch.setitem(SETS, "gemma-scope-2b", own)
    monkeypatch.setattr(released, "TEXT", released.TEXT[:1])
    monkeypatch.setattr(lm, "tokenize", lambda _text: random_rows(1, 60, 3).long())
    monkeypatch.setattr(type(lm), "load", lambda _name: lm)
    hub("tiny/set", lambda folder: exact_set(folder, lm, turned))
    found = check_released("gemma-scope-2b", lm)
    assert found.layer == 1
    if turned:
        assert found.verdict == "not as released: FVU at or above 0.7"
    else:
        assert found.fvu < 0.7
        assert found.verdict == "not as released: L0 not within a factor of 2"
        monkeypatch.setitem(
            SETS,
            "gemma-scope-2b",
            replace(own, l0=(0, round(found.l0), 0), file=own.file.replace("{l0}", "6")),
        )
        assert check_released("gemma-scope-2b", lm).verdict == "as released"
    run = CliRunner().invoke(cli.app, ["published", "gemma-scope-2b", "--check"])
    assert run.exit_code == (1 if turned else 0), run.output
    assert "gemma-scope-2b: layer 1, L0" in run.output


def test_the_command_lists_and_says_what_is_not_there(hub: Any) -> None:
    runner = CliRunner()
    listed = runner.invoke(cli.app, ["published"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in SETS)
    checked = runner.invoke(cli.app, ["published", "--check", "qwen3-4b"])
    assert checked.exit_code == 0
    assert "qwen3-4b: not checked: the released transcoders lie at mwhanna" in checked.output
