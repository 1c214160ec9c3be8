"""A model's weights in the processed basis in which the published transcoders live.

Norm gains are folded into the weights that read the stream, and in LayerNorm models all that writes to the
stream is centred over d_model (the component along the ones vector never reaches anything). So

    mlp_in  = (x − mean x) / σ(x)     for LayerNorm, x / rms(x) for RMSNorm: no gain, no bias
    mlp_out = P · MLP(…)              P centres over d_model for LayerNorm, is the identity for RMSNorm

The model itself runs with its own weights; only what crosses the boundary is converted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tclib.models.architectures import AttentionWeights, Block, NeuronWeights, Norm, architecture_of
from tclib.models.identity import acts_by
from tclib.support.declared import whole
from tclib.support.errors import InputError

T = TypeVar("T")
State = list[tuple[object, object, object]]


class ProcessedWeights:
    """The geometry of a transformers model, and its weights in the processed basis.

    What is derived from weights is kept until one of them is replaced, moved or edited in place; an edit
    through `.data` leaves no trace, and is found when attribution puts the model together again.
    `is_parallel`: whether attention and MLP read the same stream (GPT-NeoX, Pythia).
    """

    def __init__(self, model: Any, name: str) -> None:
        self._architecture = architecture_of(type(model).__name__, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self._derived: dict[str, tuple[State, Any]] = {}
        config = model.config
        config.return_dict = True  # what is returned is read by name
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
        """Value and output weights of `layer`, with the norm's gain and bias folded in."""
        block = self._block(self.check_layer(layer))
        norm = self.attention_norm(layer)

        def fold() -> AttentionWeights:
            W_V, b_V, W_O, b_O = self._architecture.values(block.attention, self.n_heads)
            bias = b_V if norm.bias is None else b_V + torch.einsum("d,hdk->hk", norm.bias, W_V)
            W_V = norm.centre((W_V * norm.gain[:, None]).mT).mT
            return AttentionWeights(W_V, bias, norm.centre(W_O), norm.centre(b_O))

        return self.derived(f"attention {layer}", fold, block.attention, block.attention_norm)

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
        mlp = self._block(self.check_layer(layer)).mlp
        return sum(parameter.numel() for parameter in mlp.parameters())

    def neuron_weights(self, layer: int) -> NeuronWeights:
        """Output weights and bias of an MLP's neurons."""
        projection = self._neurons_out(layer)
        weight = self.stored_W_out(layer)
        bias = weight.new_zeros(self.d_model) if projection.bias is None else projection.bias
        return NeuronWeights(self.final_norm.centre(weight), self.final_norm.centre(bias))

    def stored_W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights of an MLP's neurons as the model holds them, not centred: a view."""
        weight: Tensor = self._neurons_out(layer).weight
        # GPT-2 keeps weights input first, the others output first.
        return weight if self._architecture.backbone == "transformer" else weight.T

    def _neurons_out(self, layer: int) -> Any:
        mlp = self._block(self.check_layer(layer)).mlp
        return getattr(mlp, self._architecture.neurons_out)

    @property
    def final_norm(self) -> Norm:
        """The norm in front of the unembedding."""
        return self._norm(self._final_norm)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding, centred for LayerNorm models."""
        embedding = getattr(self._backbone, self._architecture.token_embedding)
        return self.derived("W_E", lambda: self.final_norm.centre(embedding.weight), embedding)

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"] | None:
        """Learned positions, centred for LayerNorm models; None where positions are rotary."""
        name = self._architecture.position_embedding
        if name is None:
            return None
        embedding = getattr(self._backbone, name)
        return self.derived("W_pos", lambda: self.final_norm.centre(embedding.weight), embedding)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding with the final norm's gain and centring folded in, centred over the vocabulary."""
        head, norm = self.model.get_output_embeddings(), self.final_norm

        def fold() -> Tensor:
            W_U = (head.weight * norm.gain).T
            return norm.centre((W_U - W_U.mean(-1, keepdim=True)).T).T

        return self.derived("W_U", fold, head, self._final_norm)

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        """Logits of a stream at its mean: the final norm's bias through the unembedding, centred."""
        head, norm = self.model.get_output_embeddings(), self.final_norm

        def fold() -> Tensor:
            b_U = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
            if norm.bias is not None:
                b_U = b_U + head.weight @ norm.bias
            return b_U - b_U.mean()

        return self.derived("b_U", fold, head, self._final_norm)

    @property
    def _final_norm(self) -> nn.Module:
        norm: nn.Module = getattr(self._backbone, self._architecture.final_norm)
        return norm

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
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        bias = getattr(module, "bias", None)
        return Norm(self._architecture.norm, module.weight, bias, float(eps))  # type: ignore[arg-type]


def _is_same(one: State, other: State) -> bool:
    """Whether both are the same tensors, in the same place and not edited in between."""
    return len(one) == len(other) and all(
        a is b and seen == now for (a, *seen), (b, *now) in zip(one, other, strict=True)
    )
