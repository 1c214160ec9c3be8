"""Models that are damaged, quantised, or only look like a known one are named; good ones pass."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    D_MODEL,
    GEOMETRIES,
    N_CTX,
    make_lm,
    random_rows,
    random_transcoder,
    tiny_hf_model,
    tiny_lm,
    tiny_tokenizer,
    unchecked_types,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import attribution_graph
from tclib.models.identity import kept_hash
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError

Weights = dict[str, torch.Tensor]


def saved(geometry: str, folder: Path) -> Path:
    tiny_hf_model(geometry).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    kept = {key: value for key, value in config.items() if value is not Ellipsis}
    path.write_text(json.dumps(kept))


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {k: v for k, v in weights.items() if part not in k}


DAMAGES = {
    "untied head gone": ("llama", without("lm_head"), {}, "lm_head.weight missing"),
    "head of NeoX gone": ("neox", without("embed_out"), {}, "embed_out.weight missing|lm_head.weight missing"),
    "a down projection gone": ("llama", without("1.mlp.down_proj"), {}, "down_proj.weight missing"),
    "a layer gone": ("gpt2", without("h.1."), {}, r"h\.1\..* missing"),
    "positions gone": ("gpt2", without("wpe"), {}, "wpe.weight missing"),
    "names with a prefix": ("llama", lambda w: {f"net.{k}": v for k, v in w.items()}, {}, "missing.*not expected"),
    "more layers in the config": ("llama", dict, {"num_hidden_layers": 5}, r"layers\.3\..* missing"),
    "fewer layers in the config": ("llama", dict, {"num_hidden_layers": 2}, r"layers\.2\..* not expected"),
    "another architecture's norms": (
        "llama",
        lambda w: {**w, "model.layers.0.self_attn.q_norm.weight": torch.ones(4)},
        {},
        "q_norm.weight not expected",
    ),
    "whole numbers": ("gpt2", lambda w: {k: (100 * v).to(torch.int8) if k.endswith("h.1.mlp.c_fc.weight") else v for k, v in w.items()}, {}, r"h\.1\.mlp\.c_fc\.weight \(I8\) .* no plain floating-point weights"),
    "a tensor twice": ("gpt2", lambda w: {**w, "h.1.ln_1.weight": torch.zeros(D_MODEL)}, {}, r"h\.1\.ln_1\.weight .* stand there twice"),
    "NaN": ("gpt2", lambda w: {k: v * torch.nan if k.endswith("h.1.ln_1.weight") else v for k, v in w.items()}, {}, r"h\.1\.ln_1\.weight has values that are NaN"),
    "a value of another type": ("gpt2", dict, {"n_layer": "three"}, "no readable config|could not be read"),
    "no heads": ("gpt2", dict, {"n_head": 0}, "num_attention_heads is 0 in its config: expected a whole number of 1"),
    "fewer than no heads": ("gpt2", dict, {"n_head": -4}, "num_attention_heads is -4 in its config"),
    "a giant vocabulary": ("gpt2", dict, {"vocab_size": 10**6}, "config.json in .* asks for 16,.* weights, and it has "),
    "giant layers": ("llama", dict, {"intermediate_size": 10**6}, "asks for .* weights, and it has"),
    "a giant context": ("gpt2", dict, {"n_positions": 10**7}, "asks for .* weights, and it has"),
    "layers without end": ("gpt2", dict, {"n_layer": 10**6}, "asks for 1,000,000 layers, and its weights are"),
    "labels without end": ("gpt2", dict, {"num_labels": 20_000_000}, "num_labels is 20000000 in its config: expected at most 2,097,152"),
    "a rotary part beyond the whole": ("neox", dict, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3e7}}, "partial_rotary_factor is 30000000.0 in its config: expected at most 1"),
    "a context without end": ("neox", dict, {"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000"),
    "a number that is none": ("llama", dict, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "an unknown activation": ("gpt2", dict, {"activation_function": "nope"}, "no readable config|could not be read"),
    "another shape": ("llama", lambda w: {**w, "model.norm.weight": torch.ones(7)}, {}, r"norm.weight \(7,\) for \(16,\) of another shape"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_tensors_name(what: str, tmp_path: Path) -> None:
    geometry, change, config, message = DAMAGES[what]
    folder = saved(geometry, tmp_path / "model")
    change_weights(folder, change)
    change_config(folder, **config)
    with pytest.raises(InputError, match=message) as found:
        LanguageModel.load(str(folder))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_whole_folder_loads_with_the_masks_that_older_files_carry(
    geometry: str, tmp_path: Path
) -> None:
    folder = saved(geometry, tmp_path / "model")
    mask = torch.ones(1, 1, N_CTX, N_CTX, dtype=torch.bool)
    name = {"gpt2": "transformer.h.0.attn.bias", "neox": "gpt_neox.layers.0.attention.bias"}
    rotary = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}
    extra = {name[geometry]: mask} if geometry in name else {}
    extra |= rotary if geometry == "neox" else {}
    change_weights(folder, lambda weights: {**weights, **extra})
    LanguageModel.load(str(folder))


def test_what_a_folder_asks_for_is_held_against_old_files_too(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    LanguageModel.load(str(folder))
    for asked in ({"vocab_size": 10**6}, {"n_layer": 10**6, "vocab_size": 100}):
        change_config(folder, **asked)
        with pytest.raises(InputError, match="config.json in .* asks for"):
            LanguageModel.load(str(folder))


def test_a_config_that_returns_tuples_changes_nothing(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    before = LanguageModel.load(str(folder)).logits(torch.tensor([[0, 1, 2]]))
    change_config(folder, return_dict=False)
    assert torch.equal(LanguageModel.load(str(folder)).logits(torch.tensor([[0, 1, 2]])), before)


def test_a_tied_head_need_not_be_in_the_file(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    lm = LanguageModel.load(str(folder))
    assert lm.model.lm_head.weight is lm.model.transformer.wte.weight


def test_a_config_need_not_name_its_class(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    change_config(folder, architectures=...)
    assert LanguageModel.load(str(folder)).n_layers == 3


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "hqq", "torchao"])
def test_quantised_folders_are_refused_before_they_are_read(method: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model")
    change_config(folder, quantization_config={"quant_method": method, "load_in_8bit": True})
    with pytest.raises(InputError, match=rf"is quantised \({method}\)"):
        LanguageModel.load(str(folder))


def test_weights_that_are_no_floating_point_matrices_are_named() -> None:
    model = tiny_hf_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(
        weight.data.to(torch.int8), requires_grad=False
    )
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.up_proj\.weight is Tensor of torch.int8"
    ):
        LanguageModel(model, tiny_tokenizer())


def test_a_model_of_transformer_lens_is_no_model_of_transformers(tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    folder = saved("gpt2", tmp_path / "model")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    with pytest.raises(InputError, match="TransformerBridge of TransformerLens"):
        LanguageModel(bridge, tiny_tokenizer())


# ---------------------------------------------------------------------------------------------
# Tokenizers and tokens


def test_a_pipe_among_the_weights_is_named_and_not_read(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "gpt2")
    os.mkfifo(folder / "more.safetensors")
    with pytest.raises(InputError, match="more.safetensors is a pipe or a device"):
        LanguageModel.load(str(folder))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(InputError, match="has no tokenizer|could not be read") as found:
        LanguageModel.load(str(folder))
    assert "\n" not in str(found.value)


def test_tokenizers_that_are_not_the_models_are_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one more"])
    with pytest.raises(InputError, match="ids up to 100, its embedding 100 rows"):
        LanguageModel(tiny_hf_model("gpt2"), tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        LanguageModel(tiny_hf_model("gpt2"), tokenizer)
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<bos>": 0}, unk_token="<bos>")),
        bos_token="<bos>",
    )
    with pytest.raises(InputError, match="has no tokenizer"):
        LanguageModel(tiny_hf_model("gpt2"), bare)


def test_metaspace_tokens_print_their_space() -> None:
    vocabulary = {"<s>": 0, "<unk>": 1, "▁war": 2, "s": 3, "▁": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    lm = LanguageModel(tiny_hf_model("llama"), tokenizer)
    assert lm.token_strings([0, 2, 3, 4]) == ["<s>", " war", "s", " "]


BAD_TOKENS = (
    (torch.zeros(1, 3), r"tokens float32 \(1, 3\): expected a tensor of whole numbers"),
    (torch.tensor([[0, 100]]), "ids from 0 to 100: .* has ids from 0 to 99"),
    (torch.tensor([[0, -1]]), "ids from -1 to 0"),
    (torch.tensor([0, 1]), r"tokens int64 \(2\): expected a tensor of whole numbers"),
    (torch.zeros(1, 0, dtype=torch.long), "not empty"),
    (torch.zeros(1, N_CTX + 1, dtype=torch.long), "rows of 65 tokens"),
    ([[0, 1]], r"tokens \[\[0, 1\]\]: expected a tensor"),
)  # fmt: skip


@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS)
def test_rows_that_are_no_tokens_are_named_wherever_they_are_given(
    tokens: Any, message: str
) -> None:
    lm = tiny_lm()
    entries: list[Callable[[Any], object]] = [
        lm.logits,
        lm.last_logits,
        lm.cache,
        lambda rows: lm.read(rows, [Site("mlp_in", 0)]),
        lambda rows: lm.streams(rows, [0]),
        lambda rows: lm.run_below(rows, 0),
        lambda rows: FrozenPrompts(lm, rows, []),
    ]
    with unchecked_types():
        for entry in entries:
            with pytest.raises(InputError, match=message):
                entry(tokens)


@pytest.mark.parametrize("pad", [None, "<bos>", "w99"])
def test_left_padded_prompts_are_named(pad: str | None) -> None:
    lm = tiny_lm()
    lm.tokenizer.pad_token = pad
    pad_id = 99 if pad == "w99" else 0
    rows = random_rows(2, 6).long()
    FrozenPrompts(lm, rows, [])
    FrozenPrompts(lm, torch.zeros(1, 2, dtype=torch.long), [])
    rows[1] = torch.tensor([pad_id, pad_id, 0, 5, 6, 7])
    with pytest.raises(InputError, match="prompt 1 opens with padding"):
        FrozenPrompts(lm, rows, [])


# ---------------------------------------------------------------------------------------------
# The self-check


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_of_known_classes_are_put_together_again(geometry: str, dtype: torch.dtype) -> None:
    FrozenPrompts(make_lm(geometry, dtype), random_rows(3, 12).long(), [])


def scaled_logits(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _m, _args, out: out / 4)


def scaled_embedding(model: Any) -> None:
    model.get_input_embeddings().register_forward_hook(lambda _m, _args, out: out * 4)


def gain_plus_one(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda _m, args, out: out + args[0] * 0.1)


def norm_behind_the_mlp(model: Any) -> None:
    model.model.layers[2].register_forward_hook(lambda _m, args, out: args[0] + (out - args[0]) * 2)


def scaled_attention(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _m, _args, out: out * 1.01)


IMPOSTORS = {
    scaled_logits: "unembedding",
    scaled_embedding: "embedding",
    gain_plus_one: "MLP of layer 1",
    norm_behind_the_mlp: "stream above the MLP of layer 2",
    scaled_attention: "attention of layer 0",
}


@pytest.mark.parametrize("change", IMPOSTORS)
def test_a_model_that_only_looks_like_a_known_one_is_refused_with_the_part(
    change: Callable[[Any], None],
) -> None:
    lm = tiny_lm("llama")
    change(lm.model)
    with pytest.raises(InputError, match=f"its {IMPOSTORS[change]} cannot be put together"):
        FrozenPrompts(lm, random_rows(1).long(), [])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_changes_the_stream_that_an_mlp_reads_is_found(geometry: str) -> None:
    lm = tiny_lm(geometry)
    shift = 3 * torch.randn(D_MODEL)
    lm._block(2).mlp_norm.register_forward_pre_hook(lambda _module, args: (args[0] + shift,))
    with pytest.raises(InputError, match="of layer 2"):
        FrozenPrompts(lm, random_rows(2).long(), [random_transcoder(2, "relu", torch.float32)])


def test_an_adapter_is_found() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.low = base, nn.Linear(D_MODEL, D_MODEL, bias=False)
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 0.01 * self.low(x)

    lm = tiny_lm("llama")
    attention = lm.model.model.layers[1].self_attn
    attention.o_proj = Adapter(attention.o_proj)
    with pytest.raises(InputError, match="its attention of layer 1 cannot be put together"):
        FrozenPrompts(lm, random_rows(1).long(), [])


def test_a_class_that_is_merely_named_like_a_known_one_is_found() -> None:
    class Named(GPT2LMHeadModel):
        def forward(self, *args: Any, **options: Any) -> Any:
            found = super().forward(*args, **options)
            found.logits = 30 * torch.tanh(found.logits / 30)
            return found

    Named.__name__ = "GPT2LMHeadModel"
    base = tiny_hf_model("gpt2")
    model = Named(base.config).eval()
    model.load_state_dict({k: 5 * v for k, v in base.state_dict().items()})
    with pytest.raises(InputError, match="its unembedding cannot be put together"):
        FrozenPrompts(LanguageModel(model, tiny_tokenizer()), random_rows(1).long(), [])


@pytest.mark.parametrize("parallel", [True, False])
def test_neox_without_attention_bias_is_exact(parallel: bool) -> None:
    from transformers import GPTNeoXForCausalLM

    config = copy.deepcopy(tiny_hf_model("neox").config)
    config.attention_bias, config.use_parallel_residual = False, parallel
    torch.manual_seed(0)
    lm = LanguageModel(GPTNeoXForCausalLM(config).double(), tiny_tokenizer())
    frozen = FrozenPrompts(lm, random_rows(1, 6).long(), [random_transcoder(1, "relu")])
    graph = attribution_graph(frozen, [frozen.logit_target({5: 1.0}, -1)])
    assert graph.closure()["residual"].abs().max() < 1e-9


def test_attention_in_float32_within_float64_is_named() -> None:
    model = tiny_hf_model("gpt2")
    model.config.reorder_and_upcast_attn = True
    LanguageModel(model, tiny_tokenizer())
    with pytest.raises(InputError, match="reorder_and_upcast_attn"):
        LanguageModel(model.double(), tiny_tokenizer())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attribution_of_a_half_precision_model_runs_in_float32_and_says_so(
    dtype: torch.dtype,
) -> None:
    lm = tiny_lm("llama")
    lm.model.to(dtype)
    with pytest.warns(UserWarning, match="runs on a copy of it in float32"):
        frozen = FrozenPrompts(lm, random_rows(1).long(), [])
    assert (lm.dtype, frozen.lm.dtype) == (dtype, torch.float32)


# ---------------------------------------------------------------------------------------------
# Identity


def test_a_model_is_its_weights_and_how_they_act_not_its_name(tmp_path: Path) -> None:
    one = tiny_lm("llama")
    assert LanguageModel(one.model, one.tokenizer, "other").content_hash == one.content_hash
    assert tiny_lm("llama", seed=1).content_hash != one.content_hash
    changed = tiny_lm("llama")
    changed.model.model.layers[2].mlp.up_proj.weight.data[3, 3] += 1e-3
    assert changed.content_hash != one.content_hash
    wider = tiny_lm("llama")
    wider.model.config.rms_norm_eps = 1e-3
    assert wider.content_hash != one.content_hash
    half, rounded = tiny_lm("llama"), tiny_lm("llama")
    half.model.half()
    rounded.model.half().float()
    assert half.content_hash != rounded.content_hash  # of the same weights
    folder = saved("llama", tmp_path / "model")
    assert LanguageModel.load(str(folder)).content_hash == one.content_hash


def test_a_model_that_is_edited_in_memory_is_another_and_its_folder_is_not(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLIB_CACHE", str(tmp_path / "cache"))
        lm = LanguageModel.load(str(folder))
        before = lm.content_hash
        lm.model.transformer.h[0].mlp.c_proj.weight.data.mul_(1.5)
        assert lm.content_hash != before
        assert kept_hash(str(folder)) == before == LanguageModel.load(str(folder)).content_hash


EDITS: dict[str, Callable[[LanguageModel], Any]] = {
    "W_E": lambda lm: lm.W_E,
    "W_U": lambda lm: lm.W_U,
    "b_U": lambda lm: lm.b_U,
    "extended embedding": lambda lm: lm.extended_embedding,
    "attention": lambda lm: lm.attention_weights(1).W_O,
    "known hash": lambda lm: lm.known_hash,
}


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_is_derived_from_weights_follows_their_edits(geometry: str, what: str) -> None:
    read, lm = EDITS[what], LanguageModel(deepcopy(tiny_hf_model(geometry)), tiny_tokenizer())
    assert read(lm) is read(lm)
    first = deepcopy(read(lm))
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight += 0.01 * torch.randn(weight.shape)
    again = LanguageModel(lm.model, lm.tokenizer)
    if isinstance(first, str):
        assert read(lm) == read(again) != first
    else:
        torch.testing.assert_close(read(lm), read(again), rtol=0, atol=0)
        assert geometry == "llama" and what == "b_U" or not torch.equal(read(lm), first)


def test_an_edit_that_leaves_no_trace_is_found_by_attribution() -> None:
    lm, rows = (
        LanguageModel(deepcopy(tiny_hf_model("gpt2")), tiny_tokenizer()),
        random_rows(1).long(),
    )
    FrozenPrompts(lm, rows, [])
    lm.model.transformer.wte.weight.data *= 1.5
    with pytest.raises(InputError, match="or was edited through .data"):
        FrozenPrompts(lm, rows, [])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_acts_in_memory_is_part_of_the_identity(geometry: str) -> None:
    lm = LanguageModel(deepcopy(tiny_hf_model(geometry)), tiny_tokenizer())
    first = lm.content_hash
    lm.cache(random_rows(1, 5))  # transformers leaves hooks of its own, which read
    assert lm.content_hash == first
    norm = lm._block(1).mlp_norm
    norm.eps, norm.variance_epsilon = 0.1, 0.1  # type: ignore[assignment]
    assert lm.content_hash != first


IN_MEMORY: dict[str, Callable[[Any], None]] = {
    "another activation": lambda model: setattr(model.transformer.h[0].mlp, "act", nn.ReLU()),
    "another class": lambda model: setattr(model.transformer.h[0].ln_2, "__class__", Doubled),
    "causality": lambda model: setattr(model.transformer.h[0].attn, "is_causal", False),
    "scaling": lambda model: setattr(model.transformer.h[0].attn, "scaling", 3.0),
}


class Doubled(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("what", IN_MEMORY)
def test_a_part_that_was_exchanged_makes_another_model(what: str) -> None:
    lm = LanguageModel(deepcopy(tiny_hf_model("gpt2")), tiny_tokenizer())
    first, extended = lm.content_hash, lm.extended_embedding.clone()
    IN_MEMORY[what](lm.model)
    assert lm.content_hash != first and lm.known_hash == lm.content_hash
    if what == "another activation":
        again = LanguageModel(lm.model, lm.tokenizer).extended_embedding
        assert torch.equal(lm.extended_embedding, again) and not torch.equal(again, extended)


def test_other_rotary_frequencies_make_another_model() -> None:
    lm = LanguageModel(deepcopy(tiny_hf_model("neox")), tiny_tokenizer())
    first = lm.content_hash
    lm.model.gpt_neox.rotary_emb.inv_freq.mul_(3)
    assert lm.content_hash != first


def test_a_model_that_is_halved_in_memory_knows_it() -> None:
    lm = LanguageModel(deepcopy(tiny_hf_model("gpt2")), tiny_tokenizer())
    assert lm.known_hash and not lm.is_rounded
    lm.model.half()
    assert lm.is_rounded and not lm.known_hash


def test_no_folder_runs_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("gpt2", tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(folder, model_type="foo", auto_map={"AutoConfig": "evil.C"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match="no readable config"):
        LanguageModel.load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_hooks_on_every_module_are_refused_too() -> None:
    lm = LanguageModel(deepcopy(tiny_hf_model("gpt2")), tiny_tokenizer())
    hook = nn.modules.module.register_module_forward_hook(lambda _m, _i, _o: None)
    try:
        with pytest.raises(InputError, match="attached to every module of torch"):
            _ = lm.content_hash
    finally:
        hook.remove()


def test_hooks_on_a_model_are_no_part_of_what_is_kept_for_it() -> None:
    lm = LanguageModel(deepcopy(tiny_hf_model("gpt2")), tiny_tokenizer(), "mine")
    hook = lm.model.transformer.h[1].mlp.register_forward_hook(lambda _m, _i, out: 2 * out)
    with pytest.raises(InputError, match=r"attached to transformer\.h\.1\.mlp .* remove it first"):
        _ = lm.content_hash
    hook.remove()
    with (
        lm.stand_in_for_mlp(0, lambda x: x),
        pytest.raises(InputError, match="mine: something is attached"),
    ):
        _ = lm.content_hash
    assert lm.content_hash


def test_the_hash_of_a_folder_is_computed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCLIB_CACHE", str(tmp_path / "cache"))
    folder = saved("gpt2", tmp_path / "model")
    first = LanguageModel.load(str(folder)).content_hash
    assert kept_hash(str(folder)) == first

    def never(_tensors: object) -> str:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr("tclib.models.identity.tensors_hash", never)
        LanguageModel.load(str(folder))
        assert kept_hash(str(folder)) == first
    times = (folder / "model.safetensors").stat()
    change_weights(folder, lambda w: {k: v * 1.01 for k, v in w.items()})
    os.utime(folder / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert kept_hash(str(folder)) is None  # of the size and time that it had
    second = LanguageModel.load(str(folder)).content_hash
    assert kept_hash(str(folder)) == second != first
    (tmp_path / "cache" / "model_hashes.json").write_text("[not json")
    assert kept_hash(str(folder)) is None
    LanguageModel.load(str(folder))
    assert kept_hash(str(folder)) == second
