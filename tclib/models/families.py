"""Which families of models can be traced, as a table, and what each was checked on."""

from __future__ import annotations

import pandas as pd

from tclib.models.architectures import ARCHITECTURES, NORM_NAMES

# What goes by a class, and which real weights have been traced here.
MEMBERS = {
    "GPT2LMHeadModel": ("GPT-2; demo", "demo"),
    "GPTNeoXForCausalLM": ("Pythia; demo-neox", "demo-neox"),
    "LlamaForCausalLM": ("Llama 3.2, SmolLM2", "SmolLM2-135M"),
    "MistralForCausalLM": ("Mistral", ""),
    "Qwen2ForCausalLM": ("Qwen 2, Qwen 2.5", ""),
    "Qwen3ForCausalLM": ("Qwen 3", ""),
    "SmolLM3ForCausalLM": ("SmolLM3", ""),
    "Phi3ForCausalLM": ("Phi-3, Phi-4", ""),
    "GemmaForCausalLM": ("Gemma", ""),
    "Gemma2ForCausalLM": ("Gemma 2", ""),
    "Gemma3ForCausalLM": ("Gemma 3 (text)", "Gemma 3 270M"),
    "Olmo2ForCausalLM": ("OLMo 2", ""),
    "GraniteForCausalLM": ("Granite 3", ""),
    "CohereForCausalLM": ("Command R", ""),
    "StableLmForCausalLM": ("StableLM", ""),
    "PhiForCausalLM": ("Phi-1, Phi-2", ""),
    "GPTJForCausalLM": ("GPT-J", ""),
    "GPTNeoForCausalLM": ("GPT-Neo, TinyStories", ""),
    "BloomForCausalLM": ("BLOOM", ""),
    "FalconForCausalLM": ("Falcon, without ALiBi", ""),
    "OPTForCausalLM": ("OPT, but 350m", ""),
    "MixtralForCausalLM": ("Mixtral", ""),
    "Qwen3MoeForCausalLM": ("Qwen 3 MoE", ""),
    "GptOssForCausalLM": ("GPT-OSS", ""),
}
EITHER = ("GPTNeoXForCausalLM", "StableLmForCausalLM", "FalconForCausalLM")  # by config
EVERYWHERE = "random weights"  # tests/models/test_families.py


def families() -> pd.DataFrame:
    """A line a class of transformers.

    Columns: models, class, blocks, norm, mlp_in, mlp_out, mlps, checked (on which weights sums, gradients and
    interventions were).
    """
    return pd.DataFrame([_line(name, *MEMBERS[name]) for name in ARCHITECTURES])


def _line(name: str, members: str, traced: str) -> dict[str, str]:
    own = ARCHITECTURES[name]
    return {
        "models": members,
        "class": name,
        "blocks": "either" if name in EITHER else "parallel" if own.is_parallel else "sequential",
        "norm": NORM_NAMES[own.norm],
        "mlp_in": "the stream" if own.mlp_norm is None else "normalised",
        "mlp_out": "behind a norm" if own.mlp_behind else "the MLP's output",
        "mlps": "experts, opaque" if own.has_experts else "neurons",
        "checked": f"{EVERYWHERE}, {traced}" if traced else EVERYWHERE,
    }
