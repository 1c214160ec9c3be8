"""Running a model: reading sites, overriding parts, stopping early, going on from the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tclib.models.weights import ProcessedWeights

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


class _Feed(nn.Module):
    """Stands in for lower blocks: whatever comes in, `stream` goes out."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, *_inputs: Any, **_options: Any) -> Tensor:
        return self.stream


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


class Running(ProcessedWeights):
    """Forward passes of the model, whole or in part; whatever a hook changes is put back afterwards."""

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits at every position."""
        logits: Tensor = self.model(tokens.to(self.device), use_cache=False).logits
        return logits

    def last_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits at the last position; the others are not unembedded."""
        read = self.model(tokens.to(self.device), use_cache=False, logits_to_keep=1)
        logits: Tensor = read.logits
        return logits[:, -1]

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

    @torch.no_grad()
    def streams(
        self, tokens: Int[Tensor, "batch pos"], layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """What enters the block of each layer, from one pass that ends at the last of them."""
        wanted = sorted({self.check_layer(layer) for layer in layers})
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
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

    @cached_property
    def extended_embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_E + MLP_0(norm(W_E)): every token alone, with what MLP 0 makes of it."""
        return self.W_E + self.run_mlp(0, self.mlp_norm(0).normalise(self.W_E))
