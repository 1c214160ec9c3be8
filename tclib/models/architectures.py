"""How transformers lays out a model: which part is where, and how weights are stored.

A family is a line in `ARCHITECTURES` and a function that takes its value and output weights apart. What families
differ in:

    blocks       sequential, or parallel: attention and MLP read the same stream (Pythia), some through one norm (Phi)
    norms        LayerNorm or RMSNorm in front of each part; Gemma's gain is 1 + w; OLMo 2 has none there: its parts
                 read the stream itself, so that mlp_in is the stream
    behind       a norm of what a part puts out (Gemma 2 and 3, OLMo 2): mlp_out is what is added, behind that norm
    multipliers  of embeddings, of what parts add, of logits (Gemma, Granite, Cohere)
    patterns     windows, soft caps, norms of queries and keys, rotary positions, ALiBi: all frozen with the pattern
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tclib.support.errors import InputError

NormKind = Literal["layer", "rms", "none"]
NORM_NAMES: dict[NormKind, str] = {"layer": "LayerNorm", "rms": "RMSNorm", "none": "none"}


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm, split into its scale and its (folded) gain and bias; "none" changes nothing."""

    kind: NormKind
    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"] | None
    eps: float

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """σ(x) = √(var x + eps) for LayerNorm, √(mean x² + eps) for RMSNorm; 1 without a norm."""
        if self.kind == "none":
            return torch.ones_like(x[..., :1])
        centred = self.centre(x)
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """P x: minus its mean over d_model for LayerNorm, unchanged for RMSNorm."""
        return x - x.mean(-1, keepdim=True) if self.kind == "layer" else x

    def normalise(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """P x / σ(x), without gain and bias."""
        if self.kind == "layer":
            return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)
        return x if self.kind == "none" else x / self.scale(x)

    def affine(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What comes behind the division: x · gain + bias."""
        return x * self.gain if self.bias is None else x * self.gain + self.bias


@dataclass(frozen=True)
class Block:
    """The parts of a block, whatever the architecture calls them; None for a norm that is not there.

    `mlp_reader` is the module that takes in what the MLP reads, `mlp_writer` the one that puts out what is added to
    the stream: one and the same, but where a norm follows, or where there is no module of the whole MLP.
    """

    attention_norm: nn.Module | None
    attention: nn.Module
    attention_behind: nn.Module | None
    mlp_norm: nn.Module | None
    mlp_reader: nn.Module
    mlp_writer: nn.Module
    mlp_behind: nn.Module | None
    neurons_out: nn.Module | None


def without_extras(output: Any) -> Tensor:
    """What a part puts out, without what some put out beside it (patterns, the scores of routers)."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@dataclass(frozen=True)
class Multipliers:
    """What a family multiplies by: token embeddings, what parts add to the stream, logits; and the cap of these."""

    embedding: float = 1.0
    added: float = 1.0
    logits: float = 1.0
    cap: float | None = None

    def check(self, name: str) -> None:
        """Raise `InputError` for one that is 0 or not finite, through which nothing can be traced."""
        for what, value in vars(self).items():
            if value is not None and not (value and math.isfinite(value)):
                raise InputError(
                    f"model {name!r}: its config multiplies by a factor of {what} that is 0 or not finite, or caps "
                    "at 0: take the config that it was released with"
                )

    def capped(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits as the model gives them: cap · tanh(logits / cap)."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


Values = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """Where one transformers class keeps its parts; names may be paths (`attn.attention`).

    An MLP of experts has no neurons of its own. `skippable` is what need not run when the MLP's output is replaced, and
    then hands on what it gets.
    """

    norm: NormKind
    backbone: str
    blocks: str
    final_norm: str
    token_embedding: str
    position_embedding: str | None
    attention_norm: str | None
    attention: str
    mlp_norm: str | None
    mlp: str
    heads_out: str  # the projection behind the heads, inside the attention
    neurons_out: str  # the projection behind the neurons, inside the block
    values: Callable[[Any, int], Values]
    run_mlp: Callable[[Any, Tensor], Tensor] | None = None
    mlp_writer: str | None = None
    attention_behind: str | None = None
    mlp_behind: str | None = None
    embedding_norm: str | None = None
    skippable: str | None = None
    mlp_parts: tuple[str, ...] = ()
    position_offset: int = 0
    gain_offset: float = 0.0
    is_parallel: bool = False
    positions: str = "rotary"  # how tables call them
    has_experts: bool = False
    is_input_first: bool = False  # weights are [in, out], as GPT-2 has them
    is_flat: bool = False  # the MLP sees all rows' positions as one list
    gives_tuples: bool = False  # a block puts out (stream, patterns)
    adds_in_place: bool = False  # a block adds to what its MLP put out
    gives_scores: bool = False  # an MLP puts out (what it adds, its router's scores)
    multipliers: Callable[[Any], Multipliers] = field(default=lambda _config: Multipliers())
    variant: Callable[[Architecture, Any], Architecture] | None = None

    def block(self, module: Any) -> Block:
        """The parts of a block."""

        def part(path: str | None) -> nn.Module | None:
            found: nn.Module | None = None if path is None else module.get_submodule(path)
            return found

        neurons_out: str | None = self.neurons_out
        if self.has_experts and not hasattr(module.get_submodule(self.mlp), "down_proj"):
            neurons_out = None  # some of such a model's layers may be plain

        reader = module.get_submodule(self.mlp)
        writer = self.mlp_behind or self.mlp_writer or self.mlp
        return Block(
            part(self.attention_norm),
            module.get_submodule(self.attention),
            part(self.attention_behind),
            part(self.mlp_norm),
            reader,
            module.get_submodule(writer),
            part(self.mlp_behind),
            part(neurons_out),
        )


def _by_head(W_O: Float[Tensor, "head_d_head d_model"], n_heads: int) -> Tensor:
    return W_O.reshape(n_heads, -1, W_O.shape[-1])


def _or_zeros(bias: Tensor | None, like: Tensor, n: int) -> Tensor:
    return like.new_zeros(n) if bias is None else bias


def _spread(
    rows: Float[Tensor, "kv_d_head d_model"], bias: Tensor | None, output: Any, n_heads: int
) -> Values:
    """W_V, b_V, W_O, b_O by head, of value rows output first, each shared by a group of heads."""
    W_O = _by_head(output.weight.T, n_heads)
    d_head, d_model = W_O.shape[1:]
    kv = rows.reshape(-1, d_head, rows.shape[-1]).mT
    group = n_heads // len(kv)
    b_V = _or_zeros(bias, rows, len(rows)).reshape(-1, d_head)
    b_O = _or_zeros(output.bias, rows, d_model)
    return kv.repeat_interleave(group, dim=0), b_V.repeat_interleave(group, dim=0), W_O, b_O


def _gpt2_values(attention: Any, n_heads: int) -> Values:
    """GPT-2 keeps q, k, v side by side, input first."""
    d_model = attention.c_proj.weight.shape[1]
    W_V = attention.c_attn.weight[:, 2 * d_model :].reshape(d_model, n_heads, -1).transpose(0, 1)
    b_V = attention.c_attn.bias[2 * d_model :].reshape(n_heads, -1)
    return W_V, b_V, _by_head(attention.c_proj.weight, n_heads), attention.c_proj.bias


def _neox_values(attention: Any, n_heads: int) -> Values:
    """GPT-NeoX and BLOOM keep q, k, v of each head together, output first."""
    joint = attention.query_key_value
    rows = joint.weight.reshape(n_heads, 3, -1, joint.weight.shape[1])[:, 2].flatten(0, 1)
    bias = None if joint.bias is None else joint.bias.reshape(n_heads, 3, -1)[:, 2].flatten()
    return _spread(rows, bias, attention.dense, n_heads)


def _falcon_values(attention: Any, n_heads: int) -> Values:
    """Falcon keeps the queries of a group, its key and its value together; there may be one group, or one a head."""
    joint, n_groups = attention.query_key_value, attention.num_kv_heads
    d_head = attention.head_dim
    rows = joint.weight.reshape(n_groups, -1, d_head, joint.weight.shape[1])[:, -1].flatten(0, 1)
    bias = None if joint.bias is None else joint.bias.reshape(n_groups, -1, d_head)[:, -1].flatten()
    return _spread(rows, bias, attention.dense, n_heads)


def _projected_values(output: str) -> Callable[[Any, int], Values]:
    """Families with a projection of the values alone, and one called `output` behind the heads."""

    def split(attention: Any, n_heads: int) -> Values:
        projection = attention.v_proj
        return _spread(projection.weight, projection.bias, getattr(attention, output), n_heads)

    return split


def _phi3_values(attention: Any, n_heads: int) -> Values:
    """Phi-3 stacks q, k, v: the value rows are the last."""
    d_head = attention.head_dim
    n_values = (attention.qkv_proj.weight.shape[0] - n_heads * d_head) // 2
    return _spread(attention.qkv_proj.weight[-n_values:], None, attention.o_proj, n_heads)


def _opt_mlp(block: Any, x: Tensor) -> Tensor:
    found: Tensor = block.fc2(block.activation_fn(block.fc1(x)))
    return found


def _bloom_mlp(block: Any, x: Tensor) -> Tensor:
    mlp = block.mlp
    found: Tensor = mlp.dense_4h_to_h(mlp.gelu_impl(mlp.dense_h_to_4h(x)))
    return found


def _experts_mlp(block: Any, x: Tensor) -> Tensor:
    found = block.mlp(x.reshape(1, -1, x.shape[-1]))
    return without_extras(found).view(x.shape)


def _neox_variant(own: Architecture, config: Any) -> Architecture:
    return replace(own, is_parallel=bool(config.use_parallel_residual))


def _stablelm_variant(own: Architecture, config: Any) -> Architecture:
    if not config.use_parallel_residual:
        return own
    return replace(own, is_parallel=True, mlp_norm=own.attention_norm)


def _falcon_variant(own: Architecture, config: Any) -> Architecture:
    """Falcon's blocks: parallel with one norm (7B) or two (40B, 180B), or sequential."""
    if config.alibi:  # seen in transformers 5.23: once in the mask, once more in the scores
        raise InputError(
            "a Falcon with ALiBi (Falcon-RW) cannot be traced: transformers adds it twice where patterns are asked for"
        )
    is_new, n_norms = config.new_decoder_architecture, config.num_ln_in_parallel_attn
    if (is_new and not config.parallel_attn) or (n_norms == 2 and not is_new):
        raise InputError(
            f"a Falcon with parallel_attn {config.parallel_attn}, new_decoder_architecture {is_new} and "
            f"num_ln_in_parallel_attn {n_norms} cannot be run by transformers: take its own config"
        )
    if not config.parallel_attn:
        return own
    if is_new and n_norms in (None, 2):
        return replace(own, is_parallel=True, attention_norm="ln_attn", mlp_norm="ln_mlp")
    return replace(own, is_parallel=True, mlp_norm=own.attention_norm)


def _opt_variant(own: Architecture, config: Any) -> Architecture:
    is_late = not config.do_layer_norm_before or config._remove_final_layer_norm
    if is_late or config.word_embed_proj_dim != config.hidden_size:
        raise InputError(
            "an OPT whose norms follow its parts, whose last norm is left out or whose embeddings are projected "
            "(OPT-350m) is not supported: take another size"
        )
    return own


def _bloom_variant(own: Architecture, config: Any) -> Architecture:
    if config.apply_residual_connection_post_layernorm:
        raise InputError(
            "a BLOOM whose residual stream is what its norms put out "
            "(apply_residual_connection_post_layernorm) is not supported"
        )
    if config.slow_but_exact and config.pretraining_tp > 1:
        raise InputError(
            "a BLOOM with slow_but_exact and pretraining_tp > 1 runs past its own projections, so that nothing can be "
            "read or replaced there: set slow_but_exact to false in its config"
        )
    return own


def _granite_multipliers(config: Any) -> Multipliers:
    scaling = config.logits_scaling
    logits = 1 / scaling if scaling else math.inf
    return Multipliers(config.embedding_multiplier, config.residual_multiplier, logits)


def _gemma_multipliers(config: Any) -> Multipliers:
    return Multipliers(cap=config.final_logit_softcapping)


def _cohere_multipliers(config: Any) -> Multipliers:
    return Multipliers(logits=config.logit_scale)


GPT2 = Architecture(
    norm="layer",
    backbone="transformer",
    blocks="h",
    final_norm="ln_f",
    token_embedding="wte",
    position_embedding="wpe",
    attention_norm="ln_1",
    attention="attn",
    mlp_norm="ln_2",
    mlp="mlp",
    heads_out="c_proj",
    neurons_out="mlp.c_proj",
    values=_gpt2_values,
    positions="learned",
    is_input_first=True,
)
NEOX = Architecture(
    norm="layer",
    backbone="gpt_neox",
    blocks="layers",
    final_norm="final_layer_norm",
    token_embedding="embed_in",
    position_embedding=None,
    attention_norm="input_layernorm",
    attention="attention",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    heads_out="dense",
    neurons_out="mlp.dense_4h_to_h",
    values=_neox_values,
    variant=_neox_variant,
)
LLAMA = Architecture(
    norm="rms",
    backbone="model",
    blocks="layers",
    final_norm="norm",
    token_embedding="embed_tokens",
    position_embedding=None,
    attention_norm="input_layernorm",
    attention="self_attn",
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    heads_out="o_proj",
    neurons_out="mlp.down_proj",
    values=_projected_values("o_proj"),
)
GEMMA = replace(LLAMA, gain_offset=1.0)
GEMMA2 = replace(
    GEMMA,
    attention_behind="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_behind="post_feedforward_layernorm",
    skippable="mlp",
    multipliers=_gemma_multipliers,
)
OLMO2 = replace(
    LLAMA,
    attention_norm=None,
    attention_behind="post_attention_layernorm",
    mlp_norm=None,
    mlp_behind="post_feedforward_layernorm",
    skippable="mlp",
)
EXPERTS = replace(LLAMA, has_experts=True, run_mlp=_experts_mlp)
GPT_NEO = replace(
    GPT2,
    attention="attn.attention",
    heads_out="out_proj",
    values=_projected_values("out_proj"),
    is_input_first=False,
    gives_tuples=True,
)
BLOOM = replace(
    GPT2,
    token_embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    position_embedding=None,
    positions="ALiBi",
    attention_norm="input_layernorm",
    attention="self_attention",
    mlp_norm="post_attention_layernorm",
    mlp_writer="mlp.dense_4h_to_h",
    run_mlp=_bloom_mlp,
    skippable="mlp.dense_h_to_4h",
    heads_out="dense",
    neurons_out="mlp.dense_4h_to_h",
    values=_neox_values,
    is_input_first=False,
    gives_tuples=True,
    variant=_bloom_variant,
)
FALCON = replace(
    BLOOM,
    embedding_norm=None,
    positions="rotary",
    mlp_writer=None,
    run_mlp=None,
    skippable=None,
    values=_falcon_values,
    adds_in_place=True,
    variant=_falcon_variant,
)
OPT = replace(
    LLAMA,
    norm="layer",
    backbone="model.decoder",
    final_norm="final_layer_norm",
    position_embedding="embed_positions",
    position_offset=2,
    positions="learned",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    mlp="fc1",
    mlp_writer="fc2",
    mlp_parts=("fc1", "fc2"),
    run_mlp=_opt_mlp,
    skippable="fc1",
    is_flat=True,
    heads_out="out_proj",
    neurons_out="fc2",
    values=_projected_values("out_proj"),
    variant=_opt_variant,
)

ARCHITECTURES = {
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": NEOX,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "SmolLM3ForCausalLM": LLAMA,
    "Phi3ForCausalLM": replace(LLAMA, values=_phi3_values),
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA2,
    "Olmo2ForCausalLM": OLMO2,
    "GraniteForCausalLM": replace(LLAMA, multipliers=_granite_multipliers),
    "CohereForCausalLM": replace(
        LLAMA,
        norm="layer",
        mlp_norm="input_layernorm",
        is_parallel=True,
        multipliers=_cohere_multipliers,
    ),
    "StableLmForCausalLM": replace(LLAMA, norm="layer", variant=_stablelm_variant),
    "PhiForCausalLM": replace(
        LLAMA,
        norm="layer",
        final_norm="final_layernorm",
        mlp_norm="input_layernorm",
        is_parallel=True,
        heads_out="dense",
        neurons_out="mlp.fc2",
        values=_projected_values("dense"),
    ),
    "GPTJForCausalLM": replace(
        GPT2,
        position_embedding=None,
        positions="rotary",
        mlp_norm="ln_1",
        is_parallel=True,
        heads_out="out_proj",
        neurons_out="mlp.fc_out",
        values=_projected_values("out_proj"),
        is_input_first=False,
        gives_tuples=True,
    ),
    "GPTNeoForCausalLM": GPT_NEO,
    "BloomForCausalLM": BLOOM,
    "FalconForCausalLM": FALCON,
    "OPTForCausalLM": OPT,
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": EXPERTS,
    "GptOssForCausalLM": replace(EXPERTS, gives_scores=True),
}


@dataclass(frozen=True)
class AttentionWeights:
    """Value and output weights of one layer, a head at a time, in the processed basis.

    head(h, t) = Σ_s A[h, t, s] (x̂_pre(s) W_V[h] + b_V[h]) W_O[h], with x̂_pre the normalised input.
    Grouped-query models repeat each value head for the query heads that share it. Where a norm follows the attention,
    A is the pattern over its σ, and `stored_W_O` what that norm reads, without its gain.
    """

    W_V: Float[Tensor, "head d_model d_head"]
    b_V: Float[Tensor, "head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, "d_model"]
    stored_W_O: Float[Tensor, "head d_head d_model"] | None = None

    @property
    def value_bias(self) -> Float[Tensor, "head d_model"]:
        """b_V[h] W_O[h]: what head h adds whatever it reads, times its pattern's sum."""
        return torch.einsum("hk,hkd->hd", self.b_V, self.W_O)


@dataclass(frozen=True)
class NeuronWeights:
    """What an MLP's neurons write: mlp_out = neuron activations · W_out + b_out, processed basis.

    Where a norm follows the MLP (Gemma 2 and 3, OLMo 2), this is what that norm reads.
    """

    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, "d_model"]


def n_ctx_of(config: Any) -> int:
    """Tokens of context, by a config; 2,048 where ALiBi stands for positions and no length is named."""
    named = ("max_position_embeddings", "seq_length")
    return next((n for name in named if (n := getattr(config, name, None))), 2_048)


def architecture_of(class_name: str, name: str, config: Any) -> Architecture:
    """The layout of a transformers class. Errors: `InputError` for one, or a variant of it, that is not known."""
    if class_name in ("TransformerBridge", "HookedTransformer"):
        raise InputError(
            f"model {name!r} is a {class_name} of TransformerLens, which has taken its weights apart: take "
            "LanguageModel.from_transformer_lens(bridge), or load the model that it was made from "
            "(LanguageModel.load takes its hub id or folder)"
        )
    if class_name not in ARCHITECTURES:
        raise InputError(
            f"model {name!r} is a {class_name}; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    found = ARCHITECTURES[class_name]
    try:
        return found if found.variant is None else found.variant(found, config)
    except InputError as error:
        raise InputError(f"model {name!r}: {error}") from None
