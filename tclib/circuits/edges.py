"""Direct effects of everything in a prompt on many targets at once: the edges of attribution graphs.

With attention patterns and norm scales frozen, a target reads the stream at its token, and through the
attention of lower layers the stream at earlier tokens. Its *direct* effect from a source passes no
transcoder feature on the way:

    edge(source → target) = z · d · g        g = ∂ target / ∂ stream where the source is written

g is carried down from the target's site by the transposed frozen model, a layer at a time:

    attention l:   g(s) ← g(s) + P Σ_h Σ_t A[h, t, s] W_V W_O g(t) / σ_attention(l, s)
    skip of l:     g(t) ← g(t) + P W_skip g(t) / σ_mlp(l, t)                (σ is 1 where resid_mid is read)

Targets of one token are carried together, each joining at its site; positions after the token are never
touched. With heads="nodes" heads end the graph as sources of their own (by source token) and g stays at
the target's token. Either way constant + Σ edges = value, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, ReadSite, site_of
from tclib.circuits.writers import Part, Writer, writers
from tclib.support.statistics import to_numpy

Heads = Literal["summed", "nodes"]

_CARRIED_ELEMENTS = 32_000_000  # of g at once: 128 MB in float32


class Readers(NamedTuple):
    """Targets that read the stream at one site of one token; u is a row of `directions`."""

    site: ReadSite
    directions: Float[Tensor, "target d_model"]


# The order of columns; within a layer errors come before decoder biases.
_COLUMN_RANK = {"feature": 0, "embedding": 2, "position": 2, "attention_bias": 3}


class DirectEffects:
    """The columns of a prompt's edge matrix, and its rows for any batch of targets at one token.

    Args:
        frozen: the prompts.
        prompt: which of them.
        heads: "summed": effects pass through attention; "nodes": heads are sources.
    """

    def __init__(self, frozen: FrozenPrompts, prompt: int = 0, heads: Heads = "summed") -> None:
        self.frozen, self.prompt, self.heads = frozen, prompt, heads
        # What a skip writes is carried through it, to what it reads.
        found = [w for w in writers(frozen, prompt) if w.kind != "skip"]
        self.writers = sorted([*found, *self._attention_biases()], key=_column_order)
        self.starts = [0, *np.cumsum([w.n_lines for w in self.writers]).tolist()]
        self.head_start = self.n_columns = self.starts[-1]
        if heads == "nodes":
            self.n_columns += frozen.lm.n_layers * frozen.lm.n_heads * frozen.n_pos

    # -- columns ----------------------------------------------------------------------------

    def _attention_biases(self) -> Iterator[Writer]:
        frozen, every_token = self.frozen, range(self.frozen.n_pos + 1)
        for layer in range(frozen.lm.n_layers):
            sums = frozen.cache.pattern[layer][self.prompt].sum(-1)
            bias = frozen.b_O[layer] + torch.einsum("ht,hd->td", sums, frozen.value_bias[layer])
            yield Writer("attention_bias", layer, "attention", every_token, bias)

    def table(self) -> pd.DataFrame:
        """A line a column: kind, layer, head, feature, pos, activation (−1 or 1 where none applies)."""
        blocks = [_column_block(writer) for writer in self.writers]
        if self.heads == "nodes":
            lm = self.frozen.lm
            shape = (lm.n_layers, lm.n_heads, self.frozen.n_pos)
            layer, head, pos = np.indices(shape).reshape(3, -1)
            columns = {"kind": "head", "layer": layer, "head": head, "feature": -1, "pos": pos}
            blocks.append(pd.DataFrame({**columns, "activation": 1.0}))
        return pd.concat(blocks, ignore_index=True)

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
            read = [ReadSite("mlp", layer), ReadSite("resid_mid", layer)]
            if frozen.lm.is_parallel:  # both parts read the stream below the layer
                self._read("attention", layer, carried, first, pos, out)
                attended = self._through_attention(layer, carried, pos)
                carried = reduce(join, read, after_skip + attended)
            else:
                carried = reduce(join, read, after_skip)
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
        self, part: Part, layer: int, grad: Tensor, first: int, pos: int, out: Tensor
    ) -> None:
        """Edges from everything that is written there."""
        n = len(grad)
        if n == 0:
            return
        for start, writer in zip(self.starts, self.writers, strict=False):
            if (writer.part, writer.layer) != (part, layer):
                continue
            if writer.kind == "feature":
                _read_features(writer, grad, first, pos, out[:n, start:])
            else:
                columns = slice(start + first, start + pos + 1)
                vectors = writer.vectors(slice(first, pos + 1))
                out[:n, columns] = torch.einsum("npd,pd->np", grad, vectors)
        if part == "attention" and self.heads == "nodes":
            self._read_heads(layer, grad[:, -1], pos, out)

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
        scale = site_of(parts.dictionary).scale(self.frozen.cache)[
            self.prompt, first : pos + 1, None
        ]
        back = self.frozen.lm.final_norm.centre(grad @ parts.dictionary.W_skip.T)
        return grad + back / scale

    def _through_attention(self, layer: int, grad: Tensor, pos: int) -> Tensor | float:
        """P Σ_h Σ_t A[h, t, s] W_V W_O g(t) / σ(s), for all s up to `pos`."""
        if self.heads == "nodes" or len(grad) == 0:
            return 0.0
        frozen, weights = self.frozen, self.frozen.attention[layer]
        n_targets, n_pos, d_model = grad.shape
        n_heads, d_head, _ = weights.W_O.shape
        written = grad.reshape(-1, d_model) @ weights.W_O.reshape(-1, d_model).T
        by_head = written.view(n_targets, n_pos, n_heads, d_head).permute(2, 1, 0, 3)
        pattern = frozen.cache.pattern[layer][self.prompt]
        scaled = (pattern / frozen.cache.attention_scale[layer][self.prompt])[:, :n_pos, :n_pos]
        mixed = torch.bmm(scaled.mT, by_head.reshape(n_heads, n_pos, n_targets * d_head))
        values = mixed.view(n_heads, n_pos, n_targets, d_head).permute(2, 1, 0, 3)
        W_V = frozen.lm.final_norm.centre(weights.W_V.transpose(1, 2)).reshape(-1, d_model)
        back = values.reshape(n_targets * n_pos, -1) @ W_V
        return back.view(n_targets, n_pos, d_model)


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


def _column_order(writer: Writer) -> tuple[int, int, bool]:
    return _COLUMN_RANK.get(writer.kind, 1), writer.layer, writer.kind == "decoder_bias"


def _read_features(writer: Writer, grad: Tensor, first: int, pos: int, out: Tensor) -> None:
    """Edges from active features of the tokens from `first` to `pos`; `out` begins at their columns."""
    assert writer.acts is not None
    for i, token in enumerate(range(first, pos + 1)):
        here = writer.lines(token)
        written = writer.vectors(here) * writer.acts[here, None]
        torch.mm(grad[:, i], written.T, out=out[:, here])


def _column_block(writer: Writer) -> pd.DataFrame:
    pos = np.repeat(np.arange(len(writer.offsets) - 1), np.diff(writer.offsets))
    return pd.DataFrame(
        {
            "kind": writer.kind,
            "layer": writer.layer,
            "head": -1,
            "feature": -1 if writer.feature is None else writer.feature.cpu().numpy(),
            "pos": pos,
            "activation": 1.0 if writer.acts is None else to_numpy(writer.acts),
        }
    )
