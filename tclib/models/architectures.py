"""How transformers lays out a model: which part is where, and how weights are stored.

Three geometries are known:

    GPT-2      sequential blocks, LayerNorm, learned positions
    GPT-NeoX   parallel (or sequential) blocks, LayerNorm, rotary positions   (Pythia)
    Llama      sequential blocks, RMSNorm, gated MLP, grouped-query attention (SmolLM2)

Another one is a line in `ARCHITECTURES` and a function that takes its value and output weights apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tclib.support.errors import InputError


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm, split into its scale and its (folded) gain and bias."""

    kind: Literal["layer", "rms"]
    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"] | None
    eps: float

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """σ(x) = √(var x + eps) for LayerNorm, √(mean x² + eps) for RMSNorm."""
        centred = self.centre(x)
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """P x: minus its mean over d_model for LayerNorm, unchanged for RMSNorm."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def normalise(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """P x / σ(x), without gain and bias."""
        if self.kind == "layer":
            return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x / self.scale(x)

    def affine(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What comes behind the division: x · gain + bias."""
        return x * self.gain if self.bias is None else x * self.gain + self.bias


@dataclass(frozen=True)
class Block:
    """The four parts of a block, whatever the architecture calls them."""

    attention_norm: nn.Module
    attention: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class Architecture:
    """Where one transformers class keeps its parts."""

    norm: Literal["layer", "rms"]
    backbone: str
    blocks: str
    final_norm: str
    token_embedding: str
    position_embedding: str | None
    part_names: tuple[str, str, str, str]
    heads_out: str  # the projection behind the heads, inside the attention
    neurons_out: str  # the projection behind the neurons, inside the MLP
    values: Callable[[Any, int], tuple[Tensor, Tensor, Tensor, Tensor]]


def _by_head(W_O: Float[Tensor, "head_d_head d_model"], n_heads: int) -> Tensor:
    return W_O.reshape(n_heads, -1, W_O.shape[-1])


def _gpt2_values(attention: Any, n_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_V, b_V, W_O, b_O by head, as stored: GPT-2 keeps q, k, v side by side, input first."""
    d_model = attention.c_proj.weight.shape[1]
    W_V = attention.c_attn.weight[:, 2 * d_model :].reshape(d_model, n_heads, -1).transpose(0, 1)
    b_V = attention.c_attn.bias[2 * d_model :].reshape(n_heads, -1)
    return W_V, b_V, _by_head(attention.c_proj.weight, n_heads), attention.c_proj.bias


def _neox_values(attention: Any, n_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for GPT-NeoX, which keeps q, k, v of each head together, output first."""
    joint = attention.query_key_value
    d_model = joint.weight.shape[1]
    W_V = joint.weight.reshape(n_heads, 3, -1, d_model)[:, 2].mT
    W_O, b_O = _by_head(attention.dense.weight.T, n_heads), attention.dense.bias
    bias = joint.weight.new_zeros(len(joint.weight)) if joint.bias is None else joint.bias
    b_O = W_V.new_zeros(d_model) if b_O is None else b_O
    return W_V, bias.reshape(n_heads, 3, -1)[:, 2], W_O, b_O


def _llama_values(attention: Any, n_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for Llama: fewer value heads than query heads, each shared by a group."""
    W_O = _by_head(attention.o_proj.weight.T, n_heads)
    d_head, d_model = W_O.shape[1:]
    kv = attention.v_proj.weight.reshape(-1, d_head, d_model).mT
    group = n_heads // len(kv)
    W_V = kv.repeat_interleave(group, dim=0)
    b_V, b_O = attention.v_proj.bias, attention.o_proj.bias
    b_V = W_V.new_zeros(len(kv) * d_head) if b_V is None else b_V
    b_O = W_V.new_zeros(d_model) if b_O is None else b_O
    return W_V, b_V.reshape(-1, d_head).repeat_interleave(group, dim=0), W_O, b_O


ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(
        "layer",
        "transformer",
        "h",
        "ln_f",
        "wte",
        "wpe",
        ("ln_1", "attn", "ln_2", "mlp"),
        "c_proj",
        "c_proj",
        _gpt2_values,
    ),
    "GPTNeoXForCausalLM": Architecture(
        "layer",
        "gpt_neox",
        "layers",
        "final_layer_norm",
        "embed_in",
        None,
        ("input_layernorm", "attention", "post_attention_layernorm", "mlp"),
        "dense",
        "dense_4h_to_h",
        _neox_values,
    ),
    "LlamaForCausalLM": Architecture(
        "rms",
        "model",
        "layers",
        "norm",
        "embed_tokens",
        None,
        ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
        "o_proj",
        "down_proj",
        _llama_values,
    ),
}


@dataclass(frozen=True)
class AttentionWeights:
    """Value and output weights of one layer, a head at a time, in the processed basis.

    head(h, t) = Σ_s A[h, t, s] (x̂_pre(s) W_V[h] + b_V[h]) W_O[h], with x̂_pre the normalised input.
    Grouped-query models repeat each value head for the query heads that share it.
    """

    W_V: Float[Tensor, "head d_model d_head"]
    b_V: Float[Tensor, "head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, "d_model"]

    @property
    def value_bias(self) -> Float[Tensor, "head d_model"]:
        """b_V[h] W_O[h]: what head h adds whatever it reads, times its pattern's sum."""
        return torch.einsum("hk,hkd->hd", self.b_V, self.W_O)


@dataclass(frozen=True)
class NeuronWeights:
    """What an MLP's neurons write: mlp_out = neuron activations · W_out + b_out, processed basis."""

    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, "d_model"]


def architecture_of(class_name: str, name: str) -> Architecture:
    """The layout of a transformers class. Errors: `InputError` for one that is not known."""
    if class_name in ("TransformerBridge", "HookedTransformer"):
        raise InputError(
            f"model {name!r} is a {class_name} of TransformerLens, which has taken its weights apart: load the "
            "transformers model that it was made from (LanguageModel.load takes its hub id or folder)"
        )
    if class_name not in ARCHITECTURES:
        raise InputError(
            f"model {name!r} is a {class_name}; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[class_name]
