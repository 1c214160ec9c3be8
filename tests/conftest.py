"""Tiny random models of every geometry, and a tokenizer of a hundred words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tclib.corpus import Corpus
from tclib.lm import LanguageModel

D_MODEL, N_LAYERS, D_VOCAB, N_CTX = 16, 3, 100, 64
GEOMETRIES = ("gpt2", "neox", "llama")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<bos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, D_VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>", unk_token="<unk>"
    )


def tiny_hf_model(geometry: str, seed: int = 0) -> Any:
    """A random model whose norms have gains and biases far from 1 and 0."""
    torch.manual_seed(seed)
    if geometry == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=D_VOCAB,
                n_positions=N_CTX,
                n_embd=D_MODEL,
                n_layer=N_LAYERS,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )  # fmt: skip
        )
    elif geometry == "neox":
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=D_VOCAB,
                hidden_size=D_MODEL,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=4,
                intermediate_size=32,
                max_position_embeddings=N_CTX,
                bos_token_id=0,
                eos_token_id=0,
            )  # fmt: skip
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=D_VOCAB,
                hidden_size=D_MODEL,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=24,
                max_position_embeddings=N_CTX,
                bos_token_id=0,
                eos_token_id=0,
            )  # fmt: skip
        )
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_lm(geometry: str = "gpt2", seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_hf_model(geometry, seed), tiny_tokenizer(), f"tiny-{geometry}")


def random_rows(n_rows: int, n_ctx: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, D_VOCAB, (n_rows, n_ctx), generator=generator, dtype=torch.int32)
    rows[:, 0] = 0
    return rows


@pytest.fixture(params=GEOMETRIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture
def gpt2_lm() -> LanguageModel:
    return tiny_lm("gpt2")


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(random_rows(64), random_rows(16, seed=1), bos_id=0)
