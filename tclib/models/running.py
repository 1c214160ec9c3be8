"""Running a model: reading sites, overriding parts, stopping early, going on from the middle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import model_validator
from pydantic_core import ArgsKwargs
from torch import Tensor, nn

from tclib.models.architectures import without_extras
from tclib.models.checks import check_logits
from tclib.models.interop import hook_of, site_of
from tclib.models.overrides import Overrides, attached, forwarding, in_rows, mlp_entry
from tclib.support.checked import checked
from tclib.support.declared import Natural, declared, shown
from tclib.support.errors import InputError

TOKENS_AT_ONCE = 16_384
ID_TYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
SiteName = Literal["mlp_in", "mlp_out", "resid_mid"]
ReadPart = Literal["attention", "mlp", "resid_mid", "final"]


@declared(frozen=True)
class Site:
    """A place where activations are read: the input or the output of one layer's MLP, or the stream in front of its norm.

    `Site("mlp_in", 8)`, or by its name in TransformerLens, `Site("blocks.8.ln2.hook_normalized")`.
    """

    name: SiteName
    layer: Natural

    if TYPE_CHECKING:

        def __init__(self, name: str, layer: int = ...) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _by_hook_name(cls, given: Any) -> Any:
        if isinstance(given, ArgsKwargs) and not given.kwargs and len(given.args) == 1:
            (name,) = given.args
            if isinstance(name, str) and "." in name:
                return ArgsKwargs(site_of(name))
        return given

    @property
    def hook_name(self) -> str:
        """What TransformerLens calls it."""
        return hook_of(self.name, self.layer)


@dataclass(frozen=True)
class LowerRun:
    """One forward pass up to an MLP, and everything that the layers above it read but that MLP's output.

    `base` is the stream above the layer without mlp_out (as stored, not centred), so that the model
    goes on from base + any other output; `resid_mid` is the stream in front of the norm; `neuron_acts` are the activations of its neurons, None for an MLP of experts.
    """

    layer: int
    base: Float[Tensor, "batch pos d_model"]
    resid_mid: Float[Tensor, "batch pos d_model"]
    mlp_in: Float[Tensor, "batch pos d_model"]
    mlp_out: Float[Tensor, "batch pos d_model"]
    neuron_acts: Float[Tensor, "batch pos d_mlp"] | None

    def at(self, name: SiteName) -> Float[Tensor, "batch pos d_model"]:
        """What was read at a site of the layer."""
        return {"mlp_in": self.mlp_in, "mlp_out": self.mlp_out, "resid_mid": self.resid_mid}[name]


@dataclass(frozen=True)
class ForwardCache:
    """One forward pass, with everything that attribution freezes. Lists are by layer.

    Streams are centred for LayerNorm models; `*_scale` is the σ of the norm in front of the part. Where a norm follows
    the attention, `pattern` is the pattern over its σ, which `attention_out_scale` holds; `logits` are those in
    front of a cap.
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
    attention_out_scale: list[Float[Tensor, "batch pos"]] | None = None

    def at(self, site: Site) -> Float[Tensor, "batch pos d_model"]:
        """Activations at a site."""
        if site.name == "mlp_out":
            return self.mlp_out[site.layer]
        mlp_in = self.mlp_in[site.layer]
        return mlp_in if site.name == "mlp_in" else mlp_in * self.mlp_scale[site.layer][..., None]


class _StopForward(Exception):
    """Ends a forward pass as soon as everything asked for has been read."""


@contextmanager
def recording(
    shape: tuple[int, ...],
    inputs: Mapping[Any, nn.Module],
    outputs: Mapping[Any, nn.Module],
    last: Any = None,
    is_copied: bool = False,
) -> Iterator[dict[Any, Tensor]]:
    """Notes what enters and what leaves modules, by name, for tokens of a shape; ends once `last` is noted."""
    found: dict[Any, Tensor] = {}

    def note(name: Any, value: Any) -> None:
        noted = in_rows(without_extras(value), shape)
        found[name] = noted.clone() if is_copied else noted
        if name == last:
            raise _StopForward

    hooks: list[tuple[Any, Any]] = [
        (module.register_forward_pre_hook, lambda _m, args, name=name: note(name, args[0]))
        for name, module in inputs.items()
    ]
    hooks += [
        (module.register_forward_hook, lambda _m, _args, output, name=name: note(name, output))
        for name, module in outputs.items()
    ]
    with attached(*hooks), suppress(_StopForward):
        yield found


class Running(Overrides):
    """Forward passes of the model, whole or in part; whatever a hook changes is put back afterwards."""

    def check_tokens(self, tokens: Tensor) -> Tensor:
        """`tokens`, if they are rows of ids that the model takes.

        Errors: `InputError` unless they are whole numbers of the vocabulary, [row, pos], not empty and
        not longer than the context.
        """
        are_rows = isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.numel() > 0
        if not are_rows or tokens.dtype not in ID_TYPES:
            raise InputError(
                f"tokens {shown(tokens)}: expected a tensor of whole numbers [row, pos], not empty"
            )
        if tokens.shape[1] > self.n_ctx:
            raise InputError(
                f"rows of {tokens.shape[1]} tokens: {self.name} takes at most {self.n_ctx}; shorten them"
            )
        low, high = (int(one) for one in torch.aminmax(tokens))
        if low < 0 or high >= self.d_vocab:
            raise InputError(
                f"token ids from {low} to {high}: {self.name} has ids from 0 to {self.d_vocab - 1}"
            )
        return tokens

    def _ids(self, tokens: Tensor) -> Tensor:
        return self.check_tokens(tokens).to(self.device).long()

    @torch.no_grad()
    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits at every position."""
        logits: Tensor = self.model(self._ids(tokens), use_cache=False).logits
        return logits

    def hidden(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """What the unembedding reads at every position, behind the last norm."""
        hidden: Tensor = self._backbone(self._ids(tokens), use_cache=False).last_hidden_state
        return hidden

    def unembed(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The logits of what `hidden` gave, all of it or some positions: logits take 1 MB a token at 262,144 tokens."""
        factor = self._multipliers.logits
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return self._multipliers.capped(logits if factor == 1 else logits * factor)

    def last_logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
        """Next-token logits at the last position; the others are not unembedded."""
        read = self.model(self._ids(tokens), use_cache=False, logits_to_keep=1)
        logits: Tensor = read.logits
        return logits[:, -1]

    @checked
    @torch.no_grad()
    def read(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
    ) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """Activations at `sites`; the forward pass ends at the last of them."""
        return {
            site: self._processed(site, value) for site, value in self._raw(tokens, sites).items()
        }

    @checked
    @torch.no_grad()
    def read_with_scale(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
    ) -> tuple[dict[Site, Tensor], dict[Site, Float[Tensor, "batch pos"]]]:
        """`read`, and σ of the norm in front of each site's MLP; 1 where the site is in front of it."""
        read_by = {site: Site("mlp_in", site.layer) for site in sites}
        raw = self._raw(tokens, {*read_by, *read_by.values()})
        norms = {
            s: self.no_norm if s.name == "resid_mid" else self.mlp_norm(s.layer) for s in read_by
        }
        scales = {s: norms[s].scale(raw[by])[..., 0] for s, by in read_by.items()}
        return {site: self._processed(site, raw[site]) for site in read_by}, scales

    def _raw(
        self, tokens: Int[Tensor, "batch pos"], sites: Iterable[Site]
    ) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """What enters the norm of an MLP, and what leaves the MLP, as the model has them."""
        as_run = lambda site: (site.layer, site.name == "mlp_out", site.name)  # noqa: E731
        wanted = sorted(set(sites), key=as_run)
        blocks = {site: self._block(self.check_layer(site.layer)) for site in wanted}
        inputs = {
            site: mlp_entry(block) for site, block in blocks.items() if site.name != "mlp_out"
        }
        outputs = {
            site: block.mlp_writer for site, block in blocks.items() if site.name == "mlp_out"
        }
        if not wanted:
            raise InputError("no sites: expected at least one Site to read")
        if self.is_parallel and any(site.name == "resid_mid" for site in wanted):
            raise InputError(
                f"{self.name} runs attention and MLP side by side: it has no resid_mid between them; expected mlp_in "
                "or mlp_out"
            )
        return self._run_until(wanted[-1], tokens, inputs, outputs)

    def _processed(self, site: Site, value: Tensor) -> Tensor:
        if site.name == "mlp_out":
            return self._added(value)
        norm = self.mlp_norm(site.layer)
        return norm.normalise(value) if site.name == "mlp_in" else norm.centre(value)

    def _run_until(
        self,
        last: Any,
        tokens: Int[Tensor, "batch pos"],
        inputs: Mapping[Any, nn.Module],
        outputs: Mapping[Any, nn.Module],
    ) -> dict[Any, Tensor]:
        """What `recording` notes of one pass through the blocks that ends at `last`."""
        ids = self._ids(tokens)
        with self._recording(ids, inputs, outputs, last) as found:
            self._backbone(ids, use_cache=False)
        return found

    def _recording(
        self,
        tokens: Int[Tensor, "batch pos"],
        inputs: Mapping[Any, nn.Module],
        outputs: Mapping[Any, nn.Module],
        last: Any = None,
    ) -> AbstractContextManager[dict[Any, Tensor]]:
        is_copied = self._architecture.adds_in_place
        return recording(tuple(tokens.shape), inputs, outputs, last, is_copied)

    def run_mlp(
        self, layer: int, mlp_in: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """mlp_out of `layer` for a given mlp_in. Gradients flow unless switched off."""
        norm, behind = self.mlp_norm(self.check_layer(layer)), self.mlp_behind(layer)
        is_given = isinstance(mlp_in, Tensor) and mlp_in.dtype == self.dtype
        if not is_given or mlp_in.shape[-1:] != (self.d_model,):
            raise InputError(
                f"mlp_in {shown(mlp_in)}: expected rows of {self.d_model} numbers, in {self.dtype}"
            )
        run, block = self._architecture.run_mlp, self._block(layer)
        x = norm.affine(mlp_in)
        found = block.mlp_reader(x) if run is None else run(self._blocks[layer], x)
        return self._added(found if behind is None else behind.affine(behind.normalise(found)))

    @torch.no_grad()
    def cache(self, tokens: Int[Tensor, "batch pos"]) -> ForwardCache:
        """Run the model once and keep what attribution needs."""
        tokens = self._ids(tokens)
        blocks = [self._block(layer) for layer in range(self.n_layers)]
        inputs: dict[Any, nn.Module] = dict(enumerate(self._readers()))
        inputs |= {
            ("attention", i): block.attention_behind
            for i, block in enumerate(blocks)
            if block.attention_behind is not None
        }
        outputs: dict[Any, nn.Module] = {("mlp", i): b.mlp_writer for i, b in enumerate(blocks)}
        outputs["head"] = self.model.get_output_embeddings()
        factor = self._multipliers.logits
        with (
            self._exact_norms(),  # first, so that what is noted is exact
            self._recording(tokens, inputs, outputs) as found,
            self._eager_attention(),
        ):
            output = self.model(tokens, use_cache=False, output_attentions=True)
        found["head"] = found["head"] if factor == 1 else found["head"] * factor
        check_logits(self, self._multipliers.capped(found["head"]), output.logits)
        return self._assemble(tokens, found, list(output.attentions))

    def capped_logits(
        self, logits: Float[Tensor, "*batch d_vocab"]
    ) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of a cache as the model itself puts them out: with its cap, where the family has one."""
        return self._multipliers.capped(logits)

    def _readers(self) -> list[nn.Module]:
        """The modules that take in what every attention, every MLP and the unembedding read of the stream."""
        layers = range(self.n_layers)
        attentions = [self._attention_entry(layer) for layer in layers]
        mlps = [mlp_entry(self._block(layer)) for layer in layers]
        return [*attentions, *mlps, self._final_norm]

    def _attention_entry(self, layer: int) -> nn.Module:
        """The module that takes in the stream which the attention reads: its norm, or else the block."""
        norm = self._block(layer).attention_norm
        return self._blocks[layer] if norm is None else norm

    def _exact_norms(self) -> AbstractContextManager[None]:
        """While active, norms are computed by ours: transformers' RMSNorm falls back to float32."""

        def after(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor | None:
            if "forward" in vars(module):
                return None  # something stands in for it
            norm = self._norm(module)
            return norm.affine(norm.normalise(inputs[0]))

        if self.dtype != torch.float64:
            return attached()
        norms: list[nn.Module | None] = [self._final_norm]
        for layer in range(self.n_layers):
            block = self._block(layer)
            norms += [block.attention_norm, block.attention_behind, block.mlp_norm]
            norms.append(block.mlp_behind)
        found = dict.fromkeys(norm for norm in norms if norm is not None)  # some are shared
        # In front of other hooks, which may override what such a norm puts out.
        return attached(*((partial(m.register_forward_hook, prepend=True), after) for m in found))

    def _assemble(
        self, tokens: Tensor, found: dict[Any, Tensor], patterns: list[Tensor]
    ) -> ForwardCache:
        n, centre = self.n_layers, self.final_norm.centre
        norms = [self.attention_norm(layer) for layer in range(n)]
        norms += [*(self.mlp_norm(layer) for layer in range(n)), self.final_norm]
        streams = [found[i] for i in range(len(norms))]
        normalised = [norm.normalise(x) for norm, x in zip(norms[:-1], streams, strict=False)]
        scales = [norm.scale(x)[..., 0] for norm, x in zip(norms, streams, strict=True)]
        behind = [self.attention_behind(layer) for layer in range(n)]
        out_scales = [
            norm.scale(found["attention", layer])[..., 0]
            for layer, norm in enumerate(behind)
            if norm is not None
        ]
        if out_scales:
            pairs = zip(patterns, out_scales, strict=True)
            patterns = [pattern / scale[:, None, :, None] for pattern, scale in pairs]
        position = None
        if self.W_pos is not None:
            position = self.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)
        return ForwardCache(
            tokens=tokens,
            token_embedding=self.embedded(tokens),
            position_embedding=position,
            attention_in=normalised[:n],
            attention_scale=scales[:n],
            pattern=patterns,
            mlp_in=normalised[n:],
            mlp_scale=scales[n:-1],
            mlp_out=[self._added(found["mlp", layer]) for layer in range(n)],
            final_in=centre(streams[-1]),
            final_scale=scales[-1],
            logits=found["head"],
            attention_out_scale=out_scales or None,
        )

    @contextmanager
    def _eager_attention(self) -> Iterator[None]:
        """While active, attention patterns are computed explicitly, so that they can be returned."""
        config = self.model.config
        before = config._attn_implementation
        # Falcon's attention reads it in its config; with another one its masks would be those of that.
        is_settable = self.model._can_set_attn_implementation()
        put: Any = (
            self.model.set_attn_implementation
            if is_settable
            else partial(setattr, config, "_attn_implementation")
        )
        put("eager")
        try:
            yield
        finally:
            put(before)

    def stream_into(
        self, tokens: Int[Tensor, "batch pos"], part: ReadPart, layer: int
    ) -> Float[Tensor, "batch pos d_model"]:
        """What enters the norm in front of a part (of the unembedding, whatever the layer, for "final").

        The pass ends there. Gradients flow unless switched off.
        """
        if part == "final":
            module = self._final_norm
        else:
            block = self._block(self.check_layer(layer))
            module = self._attention_entry(layer) if part == "attention" else mlp_entry(block)
        with self._exact_norms():
            return self._run_until("read", tokens, {"read": module}, {})["read"]

    @torch.no_grad()
    def streams(
        self, tokens: Int[Tensor, "batch pos"], layers: Iterable[int]
    ) -> dict[int, Float[Tensor, "batch pos d_model"]]:
        """What enters the block of each layer, from one pass that ends at the last of them."""
        wanted = sorted({self.check_layer(layer) for layer in layers})
        inputs = {layer: self._blocks[layer] for layer in wanted}
        return self._run_until(wanted[-1], tokens, inputs, {})

    def start_at(
        self, layer: int, stream: Float[Tensor, "batch pos d_model"]
    ) -> AbstractContextManager[None]:
        """While active, nothing below the block of `layer` is computed: `stream` enters it.

        `stream` is what `streams` gave for the same tokens, so the model's results are the same.
        """
        return self._fed(self.check_layer(layer), stream)

    @contextmanager
    def _fed(self, n_below: int, stream: Tensor) -> Iterator[None]:
        """While active, `stream` comes out of the first `n_below` blocks, which are not run."""
        given: Any = (stream, None) if self._architecture.gives_tuples else stream
        with ExitStack() as fed:
            for block in self._blocks[:n_below]:
                fed.enter_context(forwarding(block, lambda *_inputs, **_options: given))
            yield

    @torch.no_grad()
    def run_below(self, tokens: Int[Tensor, "batch pos"], layer: int) -> LowerRun:
        """Run up to and including the MLP of `layer`, for `run_above` to go on from."""
        block, parts = self._blocks[self.check_layer(layer)], self._block(layer)
        inputs: dict[Any, nn.Module] = {"stream": mlp_entry(parts)}
        if parts.neurons_out is not None:
            inputs["neurons"] = parts.neurons_out
        held = self._run_until("above", tokens, inputs, {"raw": parts.mlp_writer, "above": block})
        return LowerRun(
            layer,
            held["above"] - held["raw"] * self._multipliers.added,
            self.final_norm.centre(held["stream"]),
            self.mlp_norm(layer).normalise(held["stream"]),
            self._added(held["raw"]),
            held.get("neurons"),
        )

    def run_above(
        self, layer: int, stream: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch d_model"]:
        """Run the blocks above `layer` on a stream; what the unembedding reads at the last position.

        Nothing below is computed. Gradients flow to `stream` unless switched off.
        """
        tokens = torch.zeros(stream.shape[:2], dtype=torch.long, device=stream.device)
        final = {"final": self._final_norm}
        with self._last_mlp_at_last_position(), self._fed(layer + 1, stream):
            read = self._run_until("final", tokens, final, {})
        return self.final_norm.normalise(read["final"][:, -1])

    def _last_mlp_at_last_position(self) -> AbstractContextManager[None]:
        """While active, the last block's MLP sees the last position alone; only there the stream is right.

        What the MLP adds to the other positions, nothing above reads.
        """
        if self._architecture.is_flat or self._architecture.adds_in_place:
            return attached()
        mlp = self._block(self.n_layers - 1).mlp_reader
        last = lambda _mlp, inputs: (inputs[0][:, -1:], *inputs[1:])  # noqa: E731
        return attached((mlp.register_forward_pre_hook, last))

    @property
    def extended_embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_E + MLP_0(norm(W_E)): every token alone, with what MLP 0 makes of it."""
        embedding = self.model.get_input_embeddings()

        def extend() -> Tensor:
            norm = self.mlp_norm(0)
            tokens = self.W_E.split(TOKENS_AT_ONCE)  # neurons of a large vocabulary fill the memory
            return torch.cat([some + self.run_mlp(0, norm.normalise(some)) for some in tokens])

        return self.derived("extended_embedding", extend, embedding, self._blocks[0])
