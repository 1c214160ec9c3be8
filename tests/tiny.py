"""Tiny random models, transcoders and presets that the tests share."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jaxtyping
import nbformat
import pytest
import torch
from families import D_MODEL, D_VOCAB, N_CTX, N_LAYERS, family_model  # noqa: F401
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import TAKES_K, TAKES_THRESHOLD, Dictionary, DictionaryConfig
from tclib.models.language_model import LanguageModel
from tclib.replication.presets import Preset, load_preset

# They stand for all families in most tests; test_families has every one.
GEOMETRIES = ("gpt2", "neox", "llama")


# Property tests: the same examples every time, and few of them.
FEW = settings(max_examples=25, derandomize=True, deadline=None)


@contextmanager
def unchecked_types() -> Iterator[None]:
    """While active, tclib runs as it does for users: without the test run's checks of types.

    Bad input would else never come as far as the `InputError` that users see.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<bos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, D_VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>"
    )


def tiny_hf_model(geometry: str, seed: int = 0) -> Any:
    """A random model whose norms have gains and biases far from 1 and 0."""
    return family_model(geometry, seed)


def tiny_lm(geometry: str = "gpt2", seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_hf_model(geometry, seed), tiny_tokenizer(), f"tiny-{geometry}")


def random_rows(n_rows: int, n_ctx: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, D_VOCAB, (n_rows, n_ctx), generator=generator, dtype=torch.int32)
    rows[:, 0] = 0
    return rows


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


KINDS = ("relu", "topk", "skip", "batch_topk", "jumprelu")


N_FEATURES = 40


def random_transcoder(layer: int, kind: str, dtype: torch.dtype = torch.float64) -> Dictionary:
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    config = DictionaryConfig(
        "transcoder",
        layer,
        D_MODEL,
        D_MODEL,
        N_FEATURES,
        "relu" if kind == "skip" else kind,  # type: ignore[arg-type]
        5 if kind in TAKES_K else None,
        skip=kind == "skip",
    )
    return Dictionary(
        config,
        normal(D_MODEL, N_FEATURES),
        normal(N_FEATURES),
        normal(N_FEATURES, D_MODEL),
        normal(D_MODEL),
        normal(D_MODEL, D_MODEL) if kind == "skip" else None,
        normal(N_FEATURES).abs() if kind in TAKES_THRESHOLD else None,
    )


def relu_gpt2() -> tuple[LanguageModel, list[Dictionary]]:
    """A GPT-2 whose MLPs are ReLU layers, and the transcoders that equal them, one a layer."""
    lm, exact = tiny_lm("gpt2"), []
    for layer, block in enumerate(lm.model.transformer.h):
        block.mlp.act = torch.nn.ReLU()
        weight, out = block.mlp.c_fc.weight.detach(), lm.neuron_weights(layer)
        exact.append(
            Dictionary(
                DictionaryConfig("transcoder", layer, D_MODEL, D_MODEL, weight.shape[1]),
                block.ln_2.weight.detach()[:, None] * weight,
                block.ln_2.bias.detach() @ weight + block.mlp.c_fc.bias.detach(),
                out.W_out.detach(),
                out.b_out.detach(),
            )
        )
    return lm, exact


def make_lm(geometry: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = tiny_hf_model(geometry).to(dtype)
    return LanguageModel(model, tiny_tokenizer(), f"tiny-{geometry}")


def freeze(
    geometry: str,
    kind: str = "relu",
    dtype: torch.dtype = torch.float64,
    n_prompts: int = 2,
    n_pos: int = 7,
    layers: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
) -> FrozenPrompts:
    transcoders = [random_transcoder(layer, kind, dtype) for layer in layers]
    tokens = random_rows(n_prompts, max(n_pos, 1), seed).long()
    return FrozenPrompts(make_lm(geometry, dtype), tokens, transcoders)


def frozen_forward(
    frozen: FrozenPrompts, embedding: Tensor, acts: dict[int, Tensor]
) -> tuple[dict[int, Tensor], Tensor]:
    """The model with patterns and scales frozen and features set to `acts`, by plain matrices.

    Returns (transcoder pre-activations by layer, centred logits).
    """
    cache, lm = frozen.cache, frozen.lm
    stream = embedding if cache.position_embedding is None else embedding + cache.position_embedding
    pre_acts = {}
    for layer in range(lm.n_layers):
        weights = frozen.attention[layer]
        normalised = lm.final_norm.centre(stream) / cache.attention_scale[layer][..., None]
        values = torch.einsum("bsd,hdk->bhsk", normalised, weights.W_V) + weights.b_V[:, None]
        heads = torch.einsum("bhts,bhsk,hkd->btd", cache.pattern[layer], values, weights.W_O)
        attended = stream + heads + weights.b_O
        read = lm.final_norm.centre(stream if lm.is_parallel else attended)
        mlp_in = read / cache.mlp_scale[layer][..., None]
        if layer in frozen.parts:
            parts = frozen.parts[layer]
            pre_acts[layer] = parts.dictionary.pre_acts(mlp_in)
            output = acts[layer] @ parts.dictionary.W_dec + parts.dictionary.b_dec + parts.error
            if parts.dictionary.W_skip is not None:
                output = output + mlp_in @ parts.dictionary.W_skip
        else:
            output = cache.mlp_out[layer]
        stream = attended + output
    return pre_acts, stream / cache.final_scale[..., None] @ lm.W_U + lm.b_U


def measured_acts(frozen: FrozenPrompts) -> dict[int, Tensor]:
    return {
        layer: parts.dictionary.encode(frozen.cache.mlp_in[layer])
        for layer, parts in frozen.parts.items()
    }


def small_preset(runs_dir: Path) -> Preset:
    """The demo preset with a hundredth of its tokens."""
    preset = load_preset("demo", runs_dir=runs_dir)
    training = replace(preset.transcoders.training, n_tokens=5_120, decay_steps=0)
    sweep = replace(
        preset.sweep,
        **dict.fromkeys(("transcoder_l1", "sae_mlp_out_l1", "sae_mlp_in_l1"), (1e-4, 1e-3)),
        token_budgets=(),
    )
    return replace(
        preset,
        companions=(),
        greater_than=replace(
            preset.greater_than, templates=preset.greater_than.templates[:1], sae_l1=()
        ),
        case_studies=replace(
            preset.case_studies, n_full=1, n_restricted=2, n_sae=1, n_rows=60, n_held_out_rows=20
        ),
        comparison=replace(
            preset.comparison, n_features=6, n_rated=4, n_rows=60, n_held_out_rows=20
        ),
        circuits=replace(
            preset.circuits,
            n_connection_features=3,
            n_connection_rows=8,
            n_prompts=2,
            n_random_circuits=2,
        ),
        corpus=replace(preset.corpus, n_train_tokens=12_800, n_eval_tokens=2_560),
        transcoders=replace(preset.transcoders, expansion=2, training=training),
        sweep=replace(sweep, expansion=2, training=training, token_budgets=(2_560,)),
    )


def edit_json(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@contextmanager
def runner_config_class() -> Iterator[type]:
    """The class that the published pickles name, in a module that only what writes them has."""
    fields = (
        "is_transcoder hook_point hook_point_layer out_hook_point out_hook_point_layer "
        "d_in d_out d_sae model_name device dtype"
    )
    made = make_dataclass("LanguageModelSAERunnerConfig", fields.split())
    made.__module__ = "sae_training.config"
    package, module = types.ModuleType("sae_training"), types.ModuleType(made.__module__)
    module.LanguageModelSAERunnerConfig = made  # type: ignore[attr-defined]
    # One by one: putting all modules back as they were would take out those that are imported meanwhile.
    with pytest.MonkeyPatch.context() as patched:
        for one in (package, module):
            patched.setitem(sys.modules, one.__name__, one)
        yield made


def authors_file(
    path: Path, config_class: type, layer: int = 1, **changed: object
) -> dict[str, Tensor]:
    """A file of the published layout; `changed` values of its configuration, and tensors."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "W_enc": (16, 40),
        "b_enc": (40,),
        "W_dec": (40, 16),
        "b_dec": (16,),
        "b_dec_out": (16,),
    }
    state = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    values = {
        "is_transcoder": True,
        "hook_point": f"blocks.{layer}.ln2.hook_normalized",
        "hook_point_layer": layer,
        "out_hook_point": f"blocks.{layer}.hook_mlp_out",
        "out_hook_point_layer": layer,
        "d_in": 16,
        "d_out": 16,
        "d_sae": 40,
        "model_name": "gpt2-small",
        "device": torch.device("cuda", 0),
        "dtype": torch.float32,
    }
    config = config_class(**{**values, **{k: v for k, v in changed.items() if k in values}})
    state |= {k: v for k, v in changed.items() if k not in values}  # type: ignore[misc]
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    # The released files were saved on a GPU, and name it.
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save({"cfg": config, "state_dict": state}, path)
    return state


def write_notebook(path: Path, code: str) -> None:
    """A notebook of one cell behind the parameters."""
    parameters = nbformat.v4.new_code_cell('preset = "demo"\nseed = 42\nruns_dir = ""')
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, path)
