"""Direct effects of everything in a prompt on many targets at once: the edges of attribution graphs.

With attention patterns and norm scales frozen, a target reads the stream at its token, and through the
attention of lower layers the stream at earlier tokens. Its *direct* effect from a source passes no
transcoder feature on the way:

    edge(source → target) = z · d · g        g = ∂ target / ∂ stream where the source is written

g is carried down from the target's site by the transposed frozen model, a layer at a time:

    attention l:   g(s) ← g(s) + P Σ_h Σ_t A[h, t, s] W_V W_O g(t) / σ_attention(l, s)
    skip of l:     g(t) ← g(t) + P W_skip g(t) / σ_mlp(l, t)

Targets of one token are carried together, each joining at its site; positions after the token are never
touched. With heads="nodes" heads end the graph as sources of their own (by source token) and g stays at
the target's token. Either way constant + Σ edges = value, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, ReadSite, SourceKind
from tclib.models.architectures import AttentionWeights

Heads = Literal["summed", "nodes"]
Written = Literal["mlp", "attention", "embedding"]
_CARRIED_ELEMENTS = 32_000_000  # of g at once: 128 MB in float32


class Readers(NamedTuple):
    """Targets that read the stream at one site of one token; u is a row of `directions`."""

    site: ReadSite
    directions: Float[Tensor, "target d_model"]


@dataclass(frozen=True)
class _Vectors:
    """A source at every token of one layer: where its columns start, and what it writes."""

    kind: SourceKind
    layer: int
    written: Written
    start: int
    vectors: Float[Tensor, "pos d_model"]


@dataclass(frozen=True)
class _Features:
    """Active features of one layer in (pos, feature) order; `offsets` are columns by token."""

    layer: int
    offsets: list[int]
    feature: Int[Tensor, "active"]
    acts: Float[Tensor, "active"]
    pos: Int[Tensor, "active"]
    W_dec: Float[Tensor, "n_features d_model"]


class DirectEffects:
    """The columns of a prompt's edge matrix, and its rows for any batch of targets at one token.

    Args:
        frozen: the prompts.
        prompt: which of them.
        heads: "summed": effects pass through attention; "nodes": heads are sources.
    """

    def __init__(self, frozen: FrozenPrompts, prompt: int = 0, heads: Heads = "summed") -> None:
        self.frozen, self.prompt, self.heads = frozen, prompt, heads
        self.n_columns = 0
        self.features = [self._place_features(layer) for layer in frozen.parts]
        self.n_features = self.n_columns
        self.vectors = list(self._place_vectors())
        self.head_start = self.n_columns
        if heads == "nodes":
            self.n_columns += frozen.lm.n_layers * frozen.lm.n_heads * frozen.n_pos
        self._by_layer = {features.layer: features for features in self.features}

    # -- columns ----------------------------------------------------------------------------

    def _place_features(self, layer: int) -> _Features:
        active = self.frozen.parts[layer].active
        n_pos = self.frozen.n_pos
        offsets = active.offsets[self.prompt * n_pos : (self.prompt + 1) * n_pos + 1]
        here = slice(int(offsets[0]), int(offsets[-1]))
        start = self.n_columns
        self.n_columns += here.stop - here.start
        return _Features(
            layer,
            (offsets - offsets[0] + start).tolist(),
            active.feature[here],
            active.acts[here],
            active.pos[here],
            self.frozen.parts[layer].dictionary.W_dec,
        )

    def _place_vectors(self) -> Iterator[_Vectors]:
        for kind, layer, written, vectors in self._vector_sources():
            yield _Vectors(kind, layer, written, self.n_columns, vectors)
            self.n_columns += self.frozen.n_pos

    def _vector_sources(self) -> Iterator[tuple[SourceKind, int, Written, Tensor]]:
        frozen, prompt = self.frozen, self.prompt
        for layer in range(frozen.lm.n_layers):
            if layer in frozen.parts:
                parts = frozen.parts[layer]
                yield "error", layer, "mlp", parts.error[prompt]
                bias = parts.dictionary.b_dec.expand(frozen.n_pos, -1)
                yield "decoder_bias", layer, "mlp", bias
            else:
                yield "mlp", layer, "mlp", frozen.cache.mlp_out[layer][prompt]
        yield "embedding", -1, "embedding", frozen.cache.token_embedding[prompt]
        if frozen.cache.position_embedding is not None:
            yield "position", -1, "embedding", frozen.cache.position_embedding[prompt]
        for layer in range(frozen.lm.n_layers):
            sums = frozen.cache.pattern[layer][prompt].sum(-1)
            bias = frozen.b_O[layer] + torch.einsum("ht,hd->td", sums, frozen.value_bias[layer])
            yield "attention_bias", layer, "attention", bias

    def table(self) -> pd.DataFrame:
        """A line a column: kind, layer, head, feature, pos, activation (−1 or 1 where none applies)."""
        n_pos = self.frozen.n_pos
        parts = [
            _column_block("feature", f.layer, _ints(f.pos), feature=_ints(f.feature), acts=f.acts)
            for f in self.features
        ]
        tokens = np.arange(n_pos)
        parts += [_column_block(v.kind, v.layer, tokens) for v in self.vectors]
        if self.heads == "nodes":
            lm = self.frozen.lm
            parts += [
                _column_block("head", layer, tokens, head=head)
                for layer in range(lm.n_layers)
                for head in range(lm.n_heads)
            ]
        return pd.concat(parts, ignore_index=True)

    # -- rows -------------------------------------------------------------------------------

    def rows(
        self, pos: int, readers: Sequence[Readers], out: Float[Tensor, "target column"]
    ) -> None:
        """Write the edges into all targets at token `pos` into `out`, in the order of `readers`.

        `readers` come from the top of the model down; `out` holds zeros.
        """
        n_range = pos + 1 if self.heads == "summed" else 1
        limit = max(1, _CARRIED_ELEMENTS // (n_range * self.frozen.lm.d_model))
        start = 0
        for batch in _batches(readers, limit):
            n_targets = sum(len(one.directions) for one in batch)
            self._carry_down(pos, batch, out[start : start + n_targets])
            start += n_targets

    def _carry_down(self, pos: int, readers: Sequence[Readers], out: Tensor) -> None:
        frozen = self.frozen
        first = 0 if self.heads == "summed" else pos
        waiting = {one.site: one.directions for one in readers}
        carried = out.new_zeros(0, pos + 1 - first, frozen.lm.d_model)

        join = partial(self._join, waiting, pos)
        carried = join(carried, ReadSite("final", frozen.lm.n_layers))
        for layer in reversed(range(frozen.lm.n_layers)):
            self._read("mlp", layer, carried, first, pos, out)
            after_skip = self._through_skip(layer, carried, first, pos)
            site = ReadSite("mlp", layer)
            if frozen.lm.is_parallel:  # both parts read the stream below the layer
                self._read("attention", layer, carried, first, pos, out)
                attended = self._through_attention(layer, carried, pos)
                carried = join(after_skip + attended, site)
            else:
                carried = join(after_skip, site)
                self._read("attention", layer, carried, first, pos, out)
                carried = carried + self._through_attention(layer, carried, pos)
        self._read("embedding", -1, carried, first, pos, out)

    def _join(
        self, waiting: dict[ReadSite, Tensor], pos: int, grad: Tensor, site: ReadSite
    ) -> Tensor:
        """`grad`, and behind it what waits to be read at `site`."""
        directions = waiting.pop(site, None)
        if directions is None:
            return grad
        fresh = grad.new_zeros(len(directions), *grad.shape[1:])
        fresh[:, -1] = directions * self.frozen.scale(site, self.prompt, pos)
        return torch.cat([grad, fresh])

    def _read(
        self, written: Written, layer: int, grad: Tensor, first: int, pos: int, out: Tensor
    ) -> None:
        """Edges from everything that is written there."""
        n = len(grad)
        if n == 0:
            return
        for block in self.vectors:
            if block.written == written and block.layer == layer:
                columns = slice(block.start + first, block.start + pos + 1)
                vectors = block.vectors[first : pos + 1]
                out[:n, columns] = torch.einsum("npd,pd->np", grad, vectors)
        if written == "mlp" and layer in self._by_layer:
            self._read_features(self._by_layer[layer], grad, first, pos, out)
        if written == "attention" and self.heads == "nodes":
            self._read_heads(layer, grad[:, -1], pos, out)

    def _read_features(
        self, features: _Features, grad: Tensor, first: int, pos: int, out: Tensor
    ) -> None:
        base = features.offsets[0]
        for i, token in enumerate(range(first, pos + 1)):
            begin, end = features.offsets[token], features.offsets[token + 1]
            here = slice(begin - base, end - base)
            written = features.W_dec[features.feature[here]] * features.acts[here, None]
            torch.mm(grad[:, i], written.T, out=out[: len(grad), begin:end])

    def _read_heads(self, layer: int, grad: Tensor, pos: int, out: Tensor) -> None:
        frozen = self.frozen
        written = torch.einsum("nd,hkd->nhk", grad, frozen.W_O[layer])
        values = frozen.values[layer, self.prompt, :, : pos + 1]
        pattern = frozen.patterns[layer, self.prompt, :, pos, : pos + 1]
        effects = torch.einsum("nhk,hsk,hs->nhs", written, values, pattern)
        n_heads, n_pos = frozen.lm.n_heads, frozen.n_pos
        start = self.head_start + layer * n_heads * n_pos
        block = out[: len(grad), start : start + n_heads * n_pos]
        block.view(len(grad), n_heads, n_pos)[:, :, : pos + 1] = effects

    def _through_skip(self, layer: int, grad: Tensor, first: int, pos: int) -> Tensor:
        parts = self.frozen.parts.get(layer)
        if parts is None or parts.dictionary.W_skip is None:
            return grad
        scale = self.frozen.cache.mlp_scale[layer][self.prompt, first : pos + 1, None]
        back = self.frozen.lm.final_norm.centre(grad @ parts.dictionary.W_skip.T)
        return grad + back / scale

    def _through_attention(self, layer: int, grad: Tensor, pos: int) -> Tensor | float:
        """P Σ_h Σ_t A[h, t, s] W_V W_O g(t) / σ(s), for all s up to `pos`."""
        if self.heads == "nodes" or len(grad) == 0:
            return 0.0
        weights = self.frozen.attention[layer]
        n_targets, n_pos, d_model = grad.shape
        n_heads, d_head, _ = weights.W_O.shape
        written = grad.reshape(-1, d_model) @ weights.W_O.reshape(-1, d_model).T
        by_head = written.view(n_targets, n_pos, n_heads, d_head).permute(2, 1, 0, 3)
        pattern = self._scaled_pattern(layer)[:, :n_pos, :n_pos]
        mixed = torch.bmm(pattern.mT, by_head.reshape(n_heads, n_pos, n_targets * d_head))
        values = mixed.view(n_heads, n_pos, n_targets, d_head).permute(2, 1, 0, 3)
        back = values.reshape(n_targets * n_pos, -1) @ self._value_weights(weights)
        return back.view(n_targets, n_pos, d_model)

    def _scaled_pattern(self, layer: int) -> Float[Tensor, "head dst src"]:
        cache = self.frozen.cache
        return cache.pattern[layer][self.prompt] / cache.attention_scale[layer][self.prompt]

    def _value_weights(self, weights: AttentionWeights) -> Float[Tensor, "head_d_head d_model"]:
        centred = self.frozen.lm.final_norm.centre(weights.W_V.transpose(1, 2))
        return centred.reshape(-1, centred.shape[-1])


def _batches(readers: Sequence[Readers], limit: int) -> Iterator[list[Readers]]:
    """Readers in batches of at most `limit` targets."""
    batch: list[Readers] = []
    room = limit
    for one in readers:
        rest = one.directions
        while len(rest):
            batch.append(Readers(one.site, rest[:room]))
            taken = min(room, len(rest))
            rest, room = rest[taken:], room - taken
            if room == 0:
                yield batch
                batch, room = [], limit
    if batch:
        yield batch


def _column_block(
    kind: SourceKind,
    layer: int,
    pos: Int[np.ndarray, "column"],
    head: int = -1,
    feature: Int[np.ndarray, "column"] | None = None,
    acts: Float[Tensor, "column"] | None = None,
) -> pd.DataFrame:
    none = np.full(len(pos), -1)
    return pd.DataFrame(
        {
            "kind": kind,
            "layer": layer,
            "head": head,
            "feature": none if feature is None else feature,
            "pos": pos,
            "activation": np.ones(len(pos)) if acts is None else acts.double().cpu().numpy(),
        }
    )


def _ints(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy().astype(np.int64)
