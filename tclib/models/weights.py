"""A model's weights in the processed basis in which the published transcoders live.

Norm gains are folded into the weights that read the stream, and in LayerNorm models all that writes to the
stream is centred over d_model (the component along the ones vector never reaches anything). So

    mlp_in  = (x − mean x) / σ(x)     for LayerNorm, x / rms(x) for RMSNorm: no gain, no bias
    mlp_out = P · MLP(…)              P centres over d_model for LayerNorm, is the identity for RMSNorm

What a family does besides (multipliers, norms behind its parts) is folded in as well: mlp_out is what is added to
the stream, and what attention adds is a pattern over the σ of the norm behind it, where there is one.
The model itself runs with its own weights; only what crosses the boundary is converted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tclib.models.architectures import (
    AttentionWeights,
    Block,
    NeuronWeights,
    Norm,
    architecture_of,
    n_ctx_of,
)
from tclib.models.identity import acts_by
from tclib.support.declared import whole
from tclib.support.errors import InputError

FOLDED_WHOLE = 50_000_000  # numbers of an unembedding: 200 MB a copy in float32
T = TypeVar("T")
State = list[tuple[object, object, object]]


class ProcessedWeights:
    """The geometry of a transformers model, and its weights in the processed basis.

    What is derived from weights is kept until one of them is replaced, moved or edited in place; an edit
    through `.data` leaves no trace, and is found when attribution puts the model together again.
    `is_parallel`: whether attention and MLP read the same stream (GPT-NeoX, Pythia, Phi, GPT-J, ...).

    Errors: `InputError` for a class that is not known, or biases of attention in front of a norm.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._architecture = architecture_of(
            type(model).__name__, name, getattr(model, "config", None)
        )
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._derived: dict[str, tuple[State, Any]] = {}
        config = model.config
        config.return_dict = True  # what is returned is read by name
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.n_ctx = n_ctx_of(config)
        self.d_vocab: int = config.vocab_size
        self.is_parallel = self._architecture.is_parallel
        self.norm_kind = self._architecture.norm
        self._multipliers = self._architecture.multipliers(config)
        self._multipliers.check(name)
        self._check_biases()
        is_grouped = self.dtype == torch.float32 or (
            self.device.type != "cpu" and self.dtype != torch.float64
        )
        if self._architecture.has_experts and not is_grouped:
            model.set_experts_implementation("eager")  # grouped products want float32 on a CPU

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

    def attention_behind(self, layer: int) -> Norm | None:
        """The norm of what the attention of `layer` puts out; most families have none."""
        module = self._block(layer).attention_behind
        return None if module is None else self._norm(module)

    def mlp_behind(self, layer: int) -> Norm | None:
        """The norm of what the MLP of `layer` puts out; most families have none."""
        module = self._block(layer).mlp_behind
        return None if module is None else self._norm(module)

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Value and output weights of `layer`, with gains, biases and multipliers folded in."""
        block = self._block(self.check_layer(layer))
        norm, behind = self.attention_norm(layer), self.attention_behind(layer)
        added = self._multipliers.added

        def fold() -> AttentionWeights:
            W_V, b_V, W_O, b_O = self._architecture.values(block.attention, self.n_heads)
            bias = b_V if norm.bias is None else b_V + torch.einsum("d,hdk->hk", norm.bias, W_V)
            W_V = norm.centre((W_V * norm.gain[:, None]).mT).mT
            stored = None if behind is None else W_O
            if behind is not None or added != 1:
                gain = added if behind is None else added * behind.gain
                W_O, b_O = W_O * gain, b_O * gain
            return AttentionWeights(W_V, bias, norm.centre(W_O), norm.centre(b_O), stored)

        norms = [n for n in (block.attention_norm, block.attention_behind) if n is not None]
        return self.derived(f"attention {layer}", fold, block.attention, *norms)

    def derived(self, name: str, make: Callable[[], T], *made_from: nn.Module) -> T:
        """`make()`, kept under `name` while `made_from` has the weights and does what it did."""
        parts = [part for module in made_from for part in module.modules()]
        weights = [
            w for part in parts for w in (*part._parameters.values(), *part._buffers.values())
        ]
        state: State = [
            (w, 0 if w.is_inference() else w._version, w.data_ptr())
            for w in weights
            if w is not None
        ]
        state += [(part, *acts_by(part)) for part in parts]
        if name not in self._derived or not _is_same(self._derived[name][0], state):
            self._derived[name] = (state, make())
        return cast(T, self._derived[name][1])

    def n_mlp_parameters(self, layer: int) -> int:
        """Weights and biases of one layer's MLP, its norm left out."""
        block = self._blocks[self.check_layer(layer)]
        parts = self._architecture.mlp_parts or (self._architecture.mlp,)
        return sum(p.numel() for part in parts for p in block.get_submodule(part).parameters())

    def neuron_weights(self, layer: int) -> NeuronWeights:
        """Output weights and bias of an MLP's neurons. Errors: `InputError` for an MLP of experts."""
        projection = self._neurons_out(layer)
        weight = self.stored_W_out(layer)
        bias = weight.new_zeros(self.d_model) if projection.bias is None else projection.bias
        if (added := self._multipliers.added) != 1:
            weight, bias = weight * added, bias * added
        return NeuronWeights(self.final_norm.centre(weight), self.final_norm.centre(bias))

    def stored_W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights of an MLP's neurons as the model holds them, not centred: a view."""
        weight: Tensor = self._neurons_out(layer).weight
        return weight if self._architecture.is_input_first else weight.T

    def _neurons_out(self, layer: int) -> Any:
        projection = self._block(self.check_layer(layer)).neurons_out
        if projection is None:
            raise InputError(
                f"MLP {layer} of {self.name} is made of experts, which have no neurons in common: study features "
                "of a transcoder, or heads"
            )
        return projection

    @property
    def final_norm(self) -> Norm:
        """The norm in front of the unembedding."""
        return self._norm(self._final_norm)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding, centred for LayerNorm models."""
        embedding, norm = self._embedding, self._embedding_norm
        is_plain = type(embedding) is nn.Embedding and self._multipliers.embedding == 1

        def embed() -> Tensor:
            if is_plain and norm is None:  # for RMSNorm the weights themselves, not a copy
                return self.final_norm.centre(embedding.weight)
            return self.embedded(torch.arange(self.d_vocab, device=self.device))

        return self.derived("W_E", embed, embedding, *([] if norm is None else [norm]))

    def embedded(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """The rows of W_E for some tokens: a large vocabulary is not embedded for a few."""
        norm, factor = self._embedding_norm, self._multipliers.embedding
        # By `forward`: what hangs on the module is no part of the weights, and is found by the self-check.
        rows = self._embedding.forward(ids)
        rows = rows if factor == 1 else rows * factor
        return self.final_norm.centre(rows if norm is None else norm.forward(rows))

    @property
    def _embedding(self) -> Any:
        return self._backbone.get_submodule(self._architecture.token_embedding)

    @property
    def _embedding_norm(self) -> Any:
        name = self._architecture.embedding_norm
        return None if name is None else self._backbone.get_submodule(name)

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"] | None:
        """Learned positions, centred for LayerNorm models; None where positions act in the pattern alone."""
        name = self._architecture.position_embedding
        if name is None:
            return None
        embedding, first = self._backbone.get_submodule(name), self._architecture.position_offset
        return self.derived(
            "W_pos", lambda: self.final_norm.centre(embedding.weight[first:]), embedding
        )

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding with the final norm's gain and centring folded in, centred over the vocabulary.

        Where a family caps its logits (Gemma 2), in front of the cap.
        """
        head, norm = self.model.get_output_embeddings(), self.final_norm
        factor = self._multipliers.logits

        def fold() -> Tensor:
            W_U = (head.weight * (norm.gain * factor)).T
            return norm.centre((W_U - W_U.mean(-1, keepdim=True)).T).T

        return self.derived("W_U", fold, head, self._final_norm)

    def unembedding(self, ids: Int[Tensor, "token"]) -> Float[Tensor, "d_model token"]:
        """The columns of W_U for some tokens: a large vocabulary is not folded for a few."""
        head, norm = self.model.get_output_embeddings(), self.final_norm
        if head.weight.numel() <= FOLDED_WHOLE:
            return self.W_U[:, ids]
        gain = norm.gain * self._multipliers.logits
        mean = self.derived("mean of W_U", lambda: head.weight.mean(0), head)
        return norm.centre((head.weight[ids] - mean) * gain).T

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """Logits of a stream at its mean: the final norm's bias through the unembedding, centred."""
        head, norm = self.model.get_output_embeddings(), self.final_norm
        factor = self._multipliers.logits

        def fold() -> Tensor:
            b_U = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
            if norm.bias is not None:
                b_U = b_U + head.weight @ norm.bias
            return (b_U - b_U.mean()) * factor

        return self.derived("b_U", fold, head, self._final_norm)

    @property
    def _final_norm(self) -> nn.Module:
        norm: nn.Module = self._backbone.get_submodule(self._architecture.final_norm)
        return norm

    @property
    def _backbone(self) -> Any:
        return self.model.get_submodule(self._architecture.backbone)

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self._backbone.get_submodule(self._architecture.blocks)
        return blocks

    def _block(self, layer: int) -> Block:
        return self._architecture.block(self._blocks[layer])

    @property
    def no_norm(self) -> Norm:
        """What stands where nothing is normalised."""
        return self._norm(None)

    def _norm(self, module: Any) -> Norm:
        if module is None:
            return Norm("none", self._no_gain(), None, 0.0)
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        offset = self._architecture.gain_offset
        gain = self._no_gain() if module.weight is None else module.weight
        gain = gain + offset if offset else gain
        return Norm(self._architecture.norm, gain, getattr(module, "bias", None), float(eps))

    def _no_gain(self) -> Float[Tensor, "d_model"]:
        return torch.ones(self.d_model, dtype=self.dtype, device=self.device)

    def _check_biases(self) -> None:
        """What a norm behind the attention makes of a bias hangs on the token; no known model has one."""
        if self._architecture.attention_behind is None:
            return
        for layer in range(self.n_layers):
            attention = self._block(layer).attention
            if bool(self._architecture.values(attention, self.n_heads)[3].any()):
                raise InputError(
                    f"model {self.name!r}: layer {layer} has an attention bias in front of a norm, which "
                    "attribution cannot split by token: no released model of this family has one"
                )


def _is_same(one: State, other: State) -> bool:
    """Whether both are the same tensors, in the same place and not edited in between."""
    return len(one) == len(other) and all(
        a is b and seen == now for (a, *seen), (b, *now) in zip(one, other, strict=True)
    )
