"""What writes to the residual stream, token by token: embeddings, and the parts of each layer's MLP output.

Heads and attention biases are left to those who need them: heads write by source token, and their biases
times their pattern's sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, LayerParts, SourceKind
from tclib.dictionaries.dictionary import Dictionary

Part = Literal["embedding", "attention", "mlp"]


@dataclass(frozen=True)
class Writer:
    """One kind of source of one layer: what it writes in one prompt, a line a source.

    Lines are in the order of tokens; those of token t are `offsets[t]` to `offsets[t + 1]`. A writer
    has one line a token, but features have one each that is active: `feature` and `acts` name them,
    and `rows` is then their dictionary, which has the directions.
    """

    kind: SourceKind
    layer: int
    part: Part
    offsets: Sequence[int]
    rows: Float[Tensor, "row d_model"] | Dictionary
    feature: Int[Tensor, "line"] | None = None
    acts: Float[Tensor, "line"] | None = None

    @property
    def n_lines(self) -> int:
        return self.offsets[-1]

    def lines(self, pos: int) -> slice:
        """The lines of one token."""
        return slice(self.offsets[pos], self.offsets[pos + 1])

    def vectors(self, lines: slice) -> Float[Tensor, "line d_model"]:
        """What each line adds to the stream per unit of its activation."""
        if isinstance(self.rows, Tensor):
            return self.rows[lines]
        assert self.feature is not None
        return self.rows.decoder_rows(self.feature[lines])


def writers(frozen: FrozenPrompts, prompt: int) -> list[Writer]:
    """Embeddings, then by layer features, decoder bias, error and skip, or an opaque MLP's output."""
    every_token = range(frozen.n_pos + 1)
    cache = frozen.cache
    found = [Writer("embedding", -1, "embedding", every_token, cache.token_embedding[prompt])]
    if cache.position_embedding is not None:
        position = cache.position_embedding[prompt]
        found.append(Writer("position", -1, "embedding", every_token, position))
    for layer in range(frozen.lm.n_layers):
        if layer not in frozen.parts:
            mlp_out = cache.mlp_out[layer][prompt]
            found.append(Writer("mlp", layer, "mlp", every_token, mlp_out))
            continue
        parts = frozen.parts[layer]
        b_dec = parts.dictionary.b_dec.expand(frozen.n_pos, -1)
        found.append(_features(parts, layer, prompt, frozen.n_pos))
        found.append(Writer("decoder_bias", layer, "mlp", every_token, b_dec))
        found.append(Writer("error", layer, "mlp", every_token, parts.error[prompt]))
        if parts.skip is not None:
            found.append(Writer("skip", layer, "mlp", every_token, parts.skip[prompt]))
    return found


def _features(parts: LayerParts, layer: int, prompt: int, n_pos: int) -> Writer:
    active = parts.active
    offsets = active.offsets[prompt * n_pos : (prompt + 1) * n_pos + 1].tolist()
    here = slice(offsets[0], offsets[-1])
    return Writer(
        "feature",
        layer,
        "mlp",
        [offset - here.start for offset in offsets],
        parts.dictionary,
        active.feature[here],
        active.acts[here],
    )
