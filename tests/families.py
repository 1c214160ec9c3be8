"""A tiny random model of every family, with what its members may have: odd sizes of heads, biases, short windows.

A line is a model type of transformers and what its config says besides the common sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

D_MODEL, N_LAYERS, D_VOCAB, N_CTX = 16, 3, 100, 64

_COMMON = {"vocab_size": D_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_SIZES = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
}
_GATED = {**_SIZES, "intermediate_size": 24, "num_key_value_heads": 2}
_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": N_CTX}
_BLOOM = {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}
_FALCON = {**_SIZES, "ffn_hidden_size": 40}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
_PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "neox": ("gpt_neox", {**_SIZES, "intermediate_size": 32}),
    "llama": ("llama", _GATED),
    "llama-biased": (
        "llama",
        {**_GATED, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
    ),
    "mistral": ("mistral", {**_GATED, "sliding_window": 3, "head_dim": 6}),
    "qwen2": ("qwen2", {**_GATED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 10, "attention_bias": True}),
    "smollm3": ("smollm3", {**_GATED, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "phi3": ("phi3", {**_GATED, "sliding_window": 3, "rope_parameters": _PARTIAL}),
    "gemma": ("gemma", {**_GATED, "num_key_value_heads": 1, "head_dim": 6}),
    "gemma2": (
        "gemma2",
        {
            **_GATED,
            "head_dim": 6,
            "query_pre_attn_scalar": 7,
            "sliding_window": 3,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**_GATED, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 3},
    ),
    "phi": ("phi", {**_SIZES, "intermediate_size": 24, "rope_parameters": _PARTIAL}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 2}),
    "falcon": ("falcon", _FALCON),
    "falcon-new": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-sequential": (
        "falcon",
        {**_FALCON, "parallel_attn": False, "multi_query": False, "bias": True},
    ),
    "opt": (
        "opt",
        {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": D_MODEL},
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 3,
        },
    ),
    "bloom": ("bloom", _BLOOM),
    "stablelm": ("stablelm", {**_GATED, "use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {**_GATED, "use_parallel_residual": True}),
    "cohere": (
        "cohere",
        {**_GATED, "logit_scale": 0.4, "use_qk_norm": True, "attention_bias": True},
    ),
    "granite": (
        "granite",
        {
            **_GATED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
            "mlp_bias": True,
        },
    ),
    "olmo2": ("olmo2", _GATED),
    "mixtral": ("mixtral", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_GATED,
            "head_dim": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_GATED,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 3,
            "layer_types": _WINDOWED,
        },
    ),
}
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def family_model(family: str, seed: int = 0, **changed: Any) -> Any:
    """A random model whose norms have gains and biases far from 1 and 0."""
    kind, values = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_COMMON, **values, **changed})
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
