"""A model's weights in the processed basis in which the published transcoders live.

Norm gains are folded into the weights that read the stream, and in LayerNorm models all that writes to the
stream is centred over d_model (the component along the ones vector never reaches anything). So

    mlp_in  = (x − mean x) / σ(x)     for LayerNorm, x / rms(x) for RMSNorm: no gain, no bias
    mlp_out = P · MLP(…)              P centres over d_model for LayerNorm, is the identity for RMSNorm

The model itself runs with its own weights; only what crosses the boundary is converted.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tclib.models.architectures import AttentionWeights, Block, NeuronWeights, Norm, architecture_of
from tclib.support.declared import whole
from tclib.support.errors import InputError


class ProcessedWeights:
    """The geometry of a transformers model, and its weights in the processed basis.

    `is_parallel`: whether attention and MLP read the same stream (GPT-NeoX, Pythia).
    """

    def __init__(self, model: Any, name: str) -> None:
        self._architecture = architecture_of(type(model).__name__, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._attention_weights: dict[int, AttentionWeights] = {}
        config = model.config
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.n_ctx: int = config.max_position_embeddings
        self.d_vocab: int = config.vocab_size
        self.is_parallel = bool(getattr(config, "use_parallel_residual", False))
        self.norm_kind = self._architecture.norm

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def check_layer(self, layer: int) -> int:
        """`layer`, if the model has it; else `InputError`."""
        if not 0 <= whole("layer", layer) < self.n_layers:
            raise InputError(
                f"layer {layer} is out of range: {self.name} has layers 0 to {self.n_layers - 1}"
            )
        return layer

    def mlp_norm(self, layer: int) -> Norm:
        """The norm in front of the MLP of `layer`."""
        return self._norm(self._block(layer).mlp_norm)

    def attention_norm(self, layer: int) -> Norm:
        """The norm in front of the attention of `layer`."""
        return self._norm(self._block(layer).attention_norm)

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Value and output weights of `layer`, with the norm's gain and bias folded in (kept)."""
        if layer in self._attention_weights:
            return self._attention_weights[layer]
        block = self._block(self.check_layer(layer))
        W_V, b_V, W_O, b_O = self._architecture.values(block.attention, self.n_heads)
        norm = self.attention_norm(layer)
        folded_bias = b_V if norm.bias is None else b_V + torch.einsum("d,hdk->hk", norm.bias, W_V)
        folded = AttentionWeights(
            W_V=norm.centre((W_V * norm.gain[:, None]).mT).mT,
            b_V=folded_bias,
            W_O=norm.centre(W_O),
            b_O=norm.centre(b_O),
        )
        self._attention_weights[layer] = folded
        return folded

    def neuron_weights(self, layer: int) -> NeuronWeights:
        """Output weights and bias of an MLP's neurons."""
        mlp = self._block(self.check_layer(layer)).mlp
        projection = getattr(mlp, self._architecture.neurons_out)
        # GPT-2 keeps weights input first, the others output first.
        is_input_first = self._architecture.backbone == "transformer"
        weight = projection.weight if is_input_first else projection.weight.T
        bias = weight.new_zeros(self.d_model) if projection.bias is None else projection.bias
        return NeuronWeights(self.final_norm.centre(weight), self.final_norm.centre(bias))

    @cached_property
    def final_norm(self) -> Norm:
        """The norm in front of the unembedding."""
        return self._norm(getattr(self._backbone, self._architecture.final_norm))

    @cached_property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding, centred for LayerNorm models."""
        embedding = getattr(self._backbone, self._architecture.token_embedding)
        return self.final_norm.centre(embedding.weight)

    @cached_property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"] | None:
        """Learned positions, centred for LayerNorm models; None where positions are rotary."""
        name = self._architecture.position_embedding
        if name is None:
            return None
        return self.final_norm.centre(getattr(self._backbone, name).weight)

    @cached_property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding with the final norm's gain and centring folded in, centred over the vocabulary."""
        W_U = (self.model.get_output_embeddings().weight * self.final_norm.gain).T
        W_U = W_U - W_U.mean(-1, keepdim=True)
        return self.final_norm.centre(W_U.T).T

    @cached_property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """Logits of a stream at its mean: the final norm's bias through the unembedding, centred."""
        head = self.model.get_output_embeddings()
        b_U = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
        if self.final_norm.bias is not None:
            b_U = b_U + head.weight @ self.final_norm.bias
        return b_U - b_U.mean()

    @property
    def _backbone(self) -> Any:
        return getattr(self.model, self._architecture.backbone)

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = getattr(self._backbone, self._architecture.blocks)
        return blocks

    def _block(self, layer: int) -> Block:
        block = self._blocks[layer]
        return Block(*(getattr(block, part) for part in self._architecture.part_names))

    def _norm(self, module: nn.Module) -> Norm:
        eps = getattr(module, "eps", None) or module.variance_epsilon
        bias = getattr(module, "bias", None)
        return Norm(self._architecture.norm, module.weight, bias, float(eps))  # type: ignore[arg-type]
