"""A frozen language model behind one object: hook sites, processed weights, what the layers read.

Together with `geometry` the only module that knows transformers' models. Everything is expressed in the *processed* basis in which the published transcoders live: norm gains
are folded into the weights that read the stream, and in LayerNorm models all that writes to the
stream is centred over d_model (the component along the ones vector never reaches anything). So

    mlp_in  = (x − mean x) / σ(x)     for LayerNorm, x / rms(x) for RMSNorm: no gain, no bias
    mlp_out = P · MLP(…)              P centres over d_model for LayerNorm, is the identity for RMSNorm

The model itself runs with its own weights; only what crosses the boundary is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from tclib.models.architectures import AttentionWeights, Block, NeuronWeights, Norm, architecture_of
from tclib.models.locate import first_line, locate, quiet_transformers
from tclib.support.runs import InputError

SiteName = Literal["mlp_in", "mlp_out"]
MlpOverride = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A place where activations are read: the input or the output of one layer's MLP."""

    name: SiteName
    layer: int


@dataclass(frozen=True)
class LowerRun:
    """One forward pass up to an MLP, and everything that the layers above it read but that MLP's output.

    `base` is the stream above the layer without mlp_out (as stored, not centred), so that the model
    goes on from base + any other output; `neuron_acts` are the activations of its neurons.
    """

    layer: int
    base: Float[Tensor, "batch pos d_model"]
    mlp_in: Float[Tensor, "batch pos d_model"]
    mlp_out: Float[Tensor, "batch pos d_model"]
    neuron_acts: Float[Tensor, "batch pos d_mlp"]


class _Feed(nn.Module):
    """Stands in for lower blocks: whatever comes in, `stream` goes out."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, *_inputs: Any, **_options: Any) -> Tensor:
        return self.stream


@dataclass(frozen=True)
class ForwardCache:
    """One forward pass, with everything that attribution freezes. Lists are by layer.

    Streams are centred for LayerNorm models; `*_scale` is the σ of the norm in front of the part.
    """

    tokens: Int[Tensor, "batch pos"]
    token_embedding: Float[Tensor, "batch pos d_model"]
    position_embedding: Float[Tensor, "batch pos d_model"] | None
    attention_in: list[Float[Tensor, "batch pos d_model"]]
    attention_scale: list[Float[Tensor, "batch pos"]]
    pattern: list[Float[Tensor, "batch head dst src"]]
    mlp_in: list[Float[Tensor, "batch pos d_model"]]
    mlp_scale: list[Float[Tensor, "batch pos"]]
    mlp_out: list[Float[Tensor, "batch pos d_model"]]
    final_in: Float[Tensor, "batch pos d_model"]
    final_scale: Float[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos d_vocab"]


class _StopForward(Exception):
    """Ends a forward pass as soon as everything asked for has been read."""


@contextmanager
def _attached(handles: Iterable[Any]) -> Iterator[None]:
    """While active, hooks are on; afterwards they are off, whatever happened."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class LanguageModel:
    """A frozen transformers model with named MLP sites and processed weights.

    Args:
        model: a `GPT2LMHeadModel`, `GPTNeoXForCausalLM` or `LlamaForCausalLM`.
        tokenizer: its fast tokenizer.
        name: how messages and manifests call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "model") -> None:
        self._architecture = architecture_of(type(model).__name__, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._attention_weights: dict[int, AttentionWeights] = {}

    @classmethod
    def load(
        cls, name: str, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> LanguageModel:
        """Load `demo`, `demo-neox`, `smollm2`, a local Hugging Face folder or a hub id.

        Errors: `InputError` if the model is nowhere to be had, or of an unsupported geometry.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        location = locate(name)
        quiet_transformers()
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(location)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"model {name!r} could not be read from {location} ({first_line(error)}): "
                "is the folder a complete Hugging Face model?"
            ) from error
        return cls(model.to(device or default_device()), tokenizer, name)

    # -- geometry ---------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def n_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def n_heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @property
    def n_ctx(self) -> int:
        return int(self.model.config.max_position_embeddings)

    @property
    def d_vocab(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def is_parallel(self) -> bool:
        """Whether attention and MLP read the same stream (GPT-NeoX, Pythia)."""
        return bool(getattr(self.model.config, "use_parallel_residual", False))

    @property
    def norm_kind(self) -> Literal["layer", "rms"]:
        return self._architecture.norm

    def summary(self) -> dict[str, object]:
        """The geometry, for a table."""
        return {
            "model": self.name,
            "layers": self.n_layers,
            "d_model": self.d_model,
            "heads": self.n_heads,
            "context (tokens)": self.n_ctx,
            "vocabulary": self.d_vocab,
            "blocks": "parallel" if self.is_parallel else "sequential",
            "norm": {"layer": "LayerNorm", "rms": "RMSNorm"}[self.norm_kind],
            "positions": "learned" if self._architecture.position_embedding else "rotary",
        }

    @property
    def bos_id(self) -> int:
        """The token that opens every row: the tokenizer's BOS, else its EOS."""
        token_id = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if token_id is None else token_id)

    def check_layer(self, layer: int) -> int:
        """`layer`, if the model has it; else `InputError`."""
        if not 0 <= layer < self.n_layers:
            raise InputError(
                f"layer {layer} is out of range: {self.name} has layers 0 to {self.n_layers - 1}"
            )
        return layer

    def check_context(self, n_ctx: int) -> int:
        """`n_ctx`, if the model's context is that long; else `InputError`."""
        if not 2 <= n_ctx <= self.n_ctx:
            raise InputError(
                f"context of {n_ctx} tokens: {self.name} takes 2 to {self.n_ctx}; set n_ctx accordingly"
            )
        return n_ctx

    # -- tokens -----------------------------------------------------------------------------

    def tokenize(self, text: str) -> Int[Tensor, "1 pos"]:
        """Token ids of `text` with BOS in front.

        Errors: `InputError` for a text with words outside a closed vocabulary, or longer than
        the context.
        """
        ids = [self.bos_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        unknown_id = self.tokenizer.unk_token_id
        if unknown_id is not None and unknown_id != self.bos_id and unknown_id in ids:
            raise InputError(
                f"{text!r} has words that {self.name} does not know; "
                "use words of its vocabulary (lm.tokenizer.get_vocab())"
            )
        if len(ids) > self.n_ctx:
            raise InputError(
                f"{len(ids)} tokens with BOS, but {self.name} takes at most {self.n_ctx}: shorten it"
            )
        return torch.tensor([ids], device=self.device)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The text of each token by itself."""
        return [self.tokenizer.decode([int(i)]) for i in ids]

    # -- running ----------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits at every position."""
        return self.model(tokens.to(self.device), use_cache=False).logits

    def last_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits at the last position; the others are not unembedded."""
        read = self.model(tokens.to(self.device), use_cache=False, logits_to_keep=1)
        return read.logits[:, -1]

    @torch.no_grad()
    def read(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
    ) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """Activations at `sites`; the forward pass ends at the last of them."""
        wanted = set(sites)
        last = max(site.layer for site in wanted)
        found: dict[Site, Tensor] = {}

        def keep(layer: int) -> MlpOverride:
            """Note what is wanted of `layer`, and end the pass at the last one."""

            def hook(mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
                for name, value in (("mlp_in", mlp_in), ("mlp_out", mlp_out)):
                    if (site := Site(name, layer)) in wanted:  # type: ignore[arg-type]
                        found[site] = value
                if layer == last:
                    raise _StopForward
                return mlp_out

            return hook

        with ExitStack() as stack:
            for layer in sorted({site.layer for site in wanted}):
                stack.enter_context(self.override_mlp(layer, keep(layer), read_only=True))
            self._run_hooked(tokens, [])
        return found

    @torch.no_grad()
    def read_with_scale(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
    ) -> tuple[dict[Site, Tensor], dict[Site, Float[Tensor, "batch pos"]]]:
        """`read`, and σ of the norm in front of each site's MLP."""
        wanted = list(sites)
        scales: dict[Site, Tensor] = {}

        def hook(site: Site) -> Any:
            norm = self.mlp_norm(site.layer)

            def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                scales[site] = norm.scale(inputs[0])[..., 0]

            return self._block(site.layer).mlp_norm.register_forward_pre_hook(before)

        handles = [hook(site) for site in wanted]
        with _attached(handles):
            return self.read(tokens, wanted), scales

    @torch.no_grad()
    def run_mlp(
        self, layer: int, mlp_in: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """mlp_out of `layer` for a given mlp_in."""
        norm = self.mlp_norm(self.check_layer(layer))
        scaled = mlp_in * norm.gain if norm.bias is None else mlp_in * norm.gain + norm.bias
        return norm.centre(self._block(layer).mlp(scaled))

    @torch.no_grad()
    def cache(self, tokens: Int[Tensor, "batch pos"]) -> ForwardCache:
        """Run the model once and keep what attribution needs."""
        tokens = tokens.to(self.device)
        norms = [self._block(layer).attention_norm for layer in range(self.n_layers)]
        norms += [self._block(layer).mlp_norm for layer in range(self.n_layers)]
        norms.append(getattr(self._backbone, self._architecture.final_norm))
        streams: dict[int, Tensor] = {}
        mlp_out: dict[int, Tensor] = {}
        handles = [
            norm.register_forward_pre_hook(lambda _m, args, i=i: streams.__setitem__(i, args[0]))
            for i, norm in enumerate(norms)
        ]
        handles += [
            self._block(layer).mlp.register_forward_hook(
                lambda _m, _args, output, layer=layer: mlp_out.__setitem__(layer, output)
            )
            for layer in range(self.n_layers)
        ]
        if self.dtype == torch.float64:
            handles += [self._exact_norm(norm) for norm in norms]
        with _attached(handles), self._eager_attention():
            output = self.model(tokens, use_cache=False, output_attentions=True)
        return self._assemble(tokens, streams, mlp_out, output)

    def _exact_norm(self, module: nn.Module) -> Any:
        """Normalise in the stream's own precision: transformers' RMSNorm falls back to float32."""
        norm = self._norm(module)

        def after(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            scaled = norm.normalise(inputs[0]) * norm.gain
            return scaled if norm.bias is None else scaled + norm.bias

        return module.register_forward_hook(after)

    def _assemble(
        self, tokens: Tensor, streams: dict[int, Tensor], mlp_out: dict[int, Tensor], output: Any
    ) -> ForwardCache:
        layers = range(self.n_layers)
        before_attention = [streams[layer] for layer in layers]
        before_mlp = [streams[self.n_layers + layer] for layer in layers]
        attention_norms = [self.attention_norm(layer) for layer in layers]
        mlp_norms = [self.mlp_norm(layer) for layer in layers]
        final = streams[2 * self.n_layers]
        pairs = list(zip(attention_norms, before_attention, strict=True))
        mlp_pairs = list(zip(mlp_norms, before_mlp, strict=True))
        n_pos = tokens.shape[1]
        return ForwardCache(
            tokens=tokens,
            token_embedding=self.W_E[tokens],
            position_embedding=None
            if self.W_pos is None
            else self.W_pos[:n_pos].expand(len(tokens), -1, -1),
            attention_in=[norm.normalise(x) for norm, x in pairs],
            attention_scale=[norm.scale(x)[..., 0] for norm, x in pairs],
            pattern=list(output.attentions),
            mlp_in=[norm.normalise(x) for norm, x in mlp_pairs],
            mlp_scale=[norm.scale(x)[..., 0] for norm, x in mlp_pairs],
            mlp_out=[self.final_norm.centre(mlp_out[layer]) for layer in layers],
            final_in=self.final_norm.centre(final),
            final_scale=self.final_norm.scale(final)[..., 0],
            logits=output.logits,
        )

    @contextmanager
    def frozen_norms(self, cache: ForwardCache, prompt: int) -> Iterator[None]:
        """While active, every norm divides by the scale that it had on `prompt` of `cache`."""
        norms = [self._block(layer).attention_norm for layer in range(self.n_layers)]
        norms += [self._block(layer).mlp_norm for layer in range(self.n_layers)]
        norms.append(getattr(self._backbone, self._architecture.final_norm))
        scales = [*cache.attention_scale, *cache.mlp_scale, cache.final_scale]
        handles = [
            module.register_forward_hook(partial(self._divide_by, scale[prompt, :, None]))
            for module, scale in zip(norms, scales, strict=True)
        ]
        with _attached(handles):
            yield

    def _divide_by(
        self, scale: Tensor, module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor
    ) -> Tensor:
        norm = self._norm(module)
        scaled = norm.centre(inputs[0]) / scale * norm.gain
        return scaled if norm.bias is None else scaled + norm.bias

    @contextmanager
    def _eager_attention(self) -> Iterator[None]:
        """While active, attention patterns are computed explicitly, so that they can be returned."""
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    @contextmanager
    def override_mlp(
        self, layer: int, override: MlpOverride, read_only: bool = False
    ) -> Iterator[None]:
        """While active, the MLP of `layer` returns `override(mlp_in, mlp_out)`.

        Both arguments and the result are in the processed basis, [batch, pos, d_model]. With
        `read_only` the result is ignored and the model runs unchanged.
        """
        block = self._block(self.check_layer(layer))
        norm = self.mlp_norm(layer)
        mlp_in: list[Tensor] = []

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            mlp_in[:] = [norm.normalise(inputs[0])]

        def after(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            replaced = override(mlp_in.pop(), norm.centre(output))
            return None if read_only else replaced.to(output.dtype)

        handles = [
            block.mlp_norm.register_forward_pre_hook(before),
            block.mlp.register_forward_hook(after),
        ]
        with _attached(handles):
            yield

    @contextmanager
    def override_heads(self, layer: int, override: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While active, the heads of `layer` put out `override(z)`, z of shape [batch, pos, head, d_head].

        z is each head's weighted mean of values, before W_O.
        """
        attention = self._block(self.check_layer(layer)).attention
        n_heads = self.n_heads

        def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            z = inputs[0].unflatten(-1, (n_heads, -1))
            return (override(z).flatten(-2).to(inputs[0]),)

        projection = getattr(attention, self._architecture.heads_out)
        handle = projection.register_forward_pre_hook(before)
        with _attached([handle]):
            yield

    @contextmanager
    def override_mlp_input(
        self, layer: int, override: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        """While active, the MLP of `layer` runs on `override(mlp_in)` instead of mlp_in.

        The norm's gain and bias are applied behind the override, as the model does.
        """
        block = self._block(self.check_layer(layer))
        norm = self.mlp_norm(layer)

        def after(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            replaced = override(norm.normalise(inputs[0])) * norm.gain
            return (replaced if norm.bias is None else replaced + norm.bias).to(output.dtype)

        handle = block.mlp_norm.register_forward_hook(after)
        with _attached([handle]):
            yield

    # -- parts of the model ---------------------------------------------------------------------

    @torch.no_grad()
    def streams(
        self, tokens: Int[Tensor, "batch pos"], layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """What enters the block of each layer, from one pass that ends at the last of them."""
        wanted = sorted({self.check_layer(layer) for layer in layers})
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found[layer] = inputs[0]
                if layer == wanted[-1]:
                    raise _StopForward

            return note

        handles = [self._blocks[i].register_forward_pre_hook(keep(i)) for i in wanted]
        self._run_hooked(tokens, handles)
        return found

    def _run_hooked(self, tokens: Int[Tensor, "batch pos"], handles: Iterable[Any]) -> None:
        """Run the blocks until a hook raises `_StopForward`, then take the hooks off."""
        with _attached(handles), suppress(_StopForward):
            self._backbone(tokens.to(self.device), use_cache=False)

    @contextmanager
    def start_at(self, layer: int, stream: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
        """While active, nothing below the block of `layer` is computed: `stream` enters it.

        `stream` is what `streams` gave for the same tokens, so the model's results are the same.
        """
        backbone, name = self._backbone, self._architecture.blocks
        blocks = self._blocks
        below = [_Feed(stream) for _ in range(self.check_layer(layer))]
        setattr(backbone, name, nn.ModuleList([*below, *blocks[layer:]]))
        try:
            yield
        finally:
            setattr(backbone, name, blocks)

    @torch.no_grad()
    def run_below(self, tokens: Int[Tensor, "batch pos"], layer: int) -> LowerRun:
        """Run up to and including the MLP of `layer`, for `run_above` to go on from."""
        block = self._blocks[self.check_layer(layer)]
        parts = self._block(layer)
        norm = self.mlp_norm(layer)
        held: dict[str, Tensor] = {}

        def keep_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            held["above"] = output
            raise _StopForward

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, inputs: held.__setitem__(name, inputs[0])

        neurons_out = getattr(parts.mlp, self._architecture.neurons_out)
        handles = [
            parts.mlp_norm.register_forward_pre_hook(keep("stream")),
            neurons_out.register_forward_pre_hook(keep("neurons")),
            parts.mlp.register_forward_hook(
                lambda _module, _inputs, output: held.__setitem__("raw", output)
            ),
            block.register_forward_hook(keep_output),
        ]
        self._run_hooked(tokens, handles)
        return LowerRun(
            layer,
            held["above"] - held["raw"],
            norm.normalise(held["stream"]),
            norm.centre(held["raw"]),
            held["neurons"],
        )

    def run_above(
        self, layer: int, stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch d_model"]:
        """Run the blocks above `layer` on a stream; what the unembedding reads at the last position.

        Nothing below is computed. Gradients flow to `stream` unless switched off.
        """
        backbone, name = self._backbone, self._architecture.blocks
        blocks = self._blocks
        final: list[Tensor] = []
        norm_module = getattr(backbone, self._architecture.final_norm)
        handle = norm_module.register_forward_pre_hook(lambda _m, inputs: final.append(inputs[0]))
        tokens = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        setattr(backbone, name, nn.ModuleList([_Feed(stream), *blocks[layer + 1 :]]))
        try:
            with _attached([handle]):
                backbone(tokens, use_cache=False)
        finally:
            setattr(backbone, name, blocks)
        return self.final_norm.normalise(final[0][:, -1])

    # -- weights in the processed basis --------------------------------------------------------

    def mlp_norm(self, layer: int) -> Norm:
        """The norm in front of the MLP of `layer`."""
        return self._norm(self._block(layer).mlp_norm)

    def attention_norm(self, layer: int) -> Norm:
        """The norm in front of the attention of `layer`."""
        return self._norm(self._block(layer).attention_norm)

    def attention_weights(self, layer: int) -> AttentionWeights:
        """Value and output weights of `layer`, with the norm's gain and bias folded in (kept)."""
        if layer not in self._attention_weights:
            self._attention_weights[layer] = self._folded_attention(layer)
        return self._attention_weights[layer]

    def _folded_attention(self, layer: int) -> AttentionWeights:
        block = self._block(self.check_layer(layer))
        W_V, b_V, W_O, b_O = self._architecture.values(block.attention, self.n_heads)
        norm = self.attention_norm(layer)
        folded_bias = b_V if norm.bias is None else b_V + torch.einsum("d,hdk->hk", norm.bias, W_V)
        return AttentionWeights(
            W_V=norm.centre((W_V * norm.gain[:, None]).mT).mT,
            b_V=folded_bias,
            W_O=norm.centre(W_O),
            b_O=norm.centre(b_O),
        )

    def neuron_weights(self, layer: int) -> NeuronWeights:
        """Output weights and bias of an MLP's neurons."""
        projection = getattr(
            self._block(self.check_layer(layer)).mlp, self._architecture.neurons_out
        )
        # GPT-2 keeps weights input first, the others output first.
        is_input_first = self._architecture.backbone == "transformer"
        weight = projection.weight if is_input_first else projection.weight.T
        bias = weight.new_zeros(self.d_model) if projection.bias is None else projection.bias
        centre = self.final_norm.centre
        return NeuronWeights(centre(weight), centre(bias))

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

    @cached_property
    def extended_embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_E + MLP_0(norm(W_E)): every token alone, with what MLP 0 makes of it."""
        return self.W_E + self.run_mlp(0, self.mlp_norm(0).normalise(self.W_E))

    # -- internals ----------------------------------------------------------------------------

    @property
    def _backbone(self) -> Any:
        return getattr(self.model, self._architecture.backbone)

    @property
    def _blocks(self) -> nn.ModuleList:
        return getattr(self._backbone, self._architecture.blocks)

    def _block(self, layer: int) -> Block:
        block = self._blocks[layer]
        return Block(*(getattr(block, part) for part in self._architecture.part_names))

    def _norm(self, module: nn.Module) -> Norm:
        eps = getattr(module, "eps", None) or module.variance_epsilon
        bias = getattr(module, "bias", None)
        return Norm(self._architecture.norm, module.weight, bias, float(eps))  # type: ignore[arg-type]
