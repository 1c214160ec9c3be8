"""The complete list of sources of a target: what its value is made of (paper Eqs. 7, 8, 25, 26)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.circuits.frozen import KINDS, FrozenPrompts, SourceKind, Target
from tclib.circuits.writers import writers
from tclib.support.checked import checked
from tclib.support.statistics import to_numpy


@dataclass(frozen=True)
class Sources:
    """All sources of one target, as columns of equal length.

    contribution = activation × weight: `activation` is input-dependent (z of a feature, the pattern
    entry of a head, 1 for what is always there, all over σ), `weight` is the source's vector dotted
    with the target's input-invariant direction. `kind` indexes `KINDS`; columns that do not apply to
    a kind hold −1.
    """

    target: Target
    value: float
    kind: Int[np.ndarray, "source"]
    layer: Int[np.ndarray, "source"]
    head: Int[np.ndarray, "source"]
    feature: Int[np.ndarray, "source"]
    pos: Int[np.ndarray, "source"]
    activation: Float[np.ndarray, "source"]
    weight: Float[np.ndarray, "source"]

    @cached_property
    def contribution(self) -> Float[np.ndarray, "source"]:
        """activation × weight."""
        return np.asarray(self.activation * self.weight)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line a source, kinds by name."""
        names = ("layer", "head", "feature", "pos", "activation", "weight", "contribution")
        columns = {name: getattr(self, name) for name in names}
        return pd.DataFrame({"kind": np.array(KINDS)[self.kind], **columns})

    @property
    def total(self) -> float:
        """The sum of all contributions; equals `value` to rounding."""
        return float(self.contribution.sum())

    @property
    def residual(self) -> float:
        """(total − value), over the largest magnitude that was summed."""
        size = max(abs(self.value), float(np.abs(self.contribution).max()))
        return (self.total - self.value) / size if size else 0.0


@checked
def sources(frozen: FrozenPrompts, targets: Sequence[Target]) -> list[Sources]:
    """The complete list of sources of each target (the equation of `frozen`), for any batch of targets."""
    if not targets:
        return []
    directions = torch.stack([target.direction for target in targets])
    written = torch.einsum("lhkd,nd->nlhk", frozen.W_O, directions)
    return [_sources_of(frozen, *pair) for pair in zip(targets, written, strict=True)]


def _sources_of(
    frozen: FrozenPrompts, target: Target, written: Float[Tensor, "layer head d_head"]
) -> Sources:
    """All sources of one target: Eq. 7 for features, Eq. 8 for heads, activation × weight over σ.

    `written` is W_O v of every head.
    """
    scale = frozen.scale(target.site, target.prompt, target.pos)
    # The constant is not read from the stream: its weight undoes the scale.
    constant = np.array([target.constant / scale])
    columns = [
        _columns("constant", constant, layer=target.site.layer, pos=target.pos),
        *_local_columns(frozen, target),
        _head_columns(frozen, target, written),
    ]
    joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    joined["activation"] = joined["activation"] * scale
    return Sources(target, frozen.value(target), **joined)


_Columns = dict[str, np.ndarray]


def _columns(kind: SourceKind | np.ndarray, weight: np.ndarray, **others: Any) -> _Columns:
    """Columns as long as `weight`: −1 for what is not given, 1 for an activation."""
    defaults = {"layer": -1, "head": -1, "feature": -1, "pos": -1, "activation": 1.0}
    code = KINDS.index(kind) if isinstance(kind, str) else kind
    columns = {"kind": code, **defaults, **others, "weight": weight}
    return {name: np.broadcast_to(values, weight.shape) for name, values in columns.items()}


def _local_columns(frozen: FrozenPrompts, target: Target) -> tuple[_Columns, _Columns]:
    """Sources at the target's own token: embeddings and MLP parts, and attention biases."""
    local = local_sources(frozen, target.prompt, target.pos)
    below = slice(int(np.searchsorted(local.layer, target.site.layer)))
    layers = np.arange(len(frozen.attention_layers(target.site)))
    mlps = _columns(
        local.kind[below],
        to_numpy(local.vectors[below] @ target.direction),
        layer=local.layer[below],
        feature=local.feature[below],
        pos=target.pos,
        activation=local.activation[below],
    )
    biases = to_numpy(local.attention_bias[: len(layers)] @ target.direction)
    return mlps, _columns("attention_bias", biases, layer=layers, pos=target.pos)


def _head_columns(
    frozen: FrozenPrompts, target: Target, written: Float[Tensor, "layer head d_head"]
) -> _Columns:
    """Heads by source token (Eq. 8)."""
    n_layers, n_src = len(frozen.attention_layers(target.site)), target.pos + 1
    values = frozen.values[:n_layers, target.prompt, :, :n_src]
    weight = torch.einsum("lhsk,lhk->lhs", values, written[:n_layers])
    pattern = frozen.patterns[:n_layers, target.prompt, :, target.pos, :n_src]
    layer, head, pos = np.indices(tuple(weight.shape)).reshape(3, -1)
    acts, weights = to_numpy(pattern.reshape(-1)), to_numpy(weight.reshape(-1))
    return _columns("head", weights, layer=layer, head=head, pos=pos, activation=acts)


@dataclass(frozen=True)
class LocalSources:
    """Everything but heads that the stream at one token may hold, by layer from the bottom.

    `vectors` are what each source adds per unit of its activation. `attention_bias` has a row a layer:
    b_O and the value biases times the pattern's sum.
    """

    kind: Int[np.ndarray, "source"]
    layer: Int[np.ndarray, "source"]
    feature: Int[np.ndarray, "source"]
    activation: Float[np.ndarray, "source"]
    vectors: Float[Tensor, "source d_model"]
    attention_bias: Float[Tensor, "layer d_model"]


_COLLECTED: WeakKeyDictionary[FrozenPrompts, dict[tuple[int, int], LocalSources]] = (
    WeakKeyDictionary()
)


def local_sources(frozen: FrozenPrompts, prompt: int, pos: int) -> LocalSources:
    """Sources at one token, collected once for as long as the prompts are held."""
    collected = _COLLECTED.setdefault(frozen, {})
    if (prompt, pos) not in collected:
        collected[prompt, pos] = _collect_local(frozen, prompt, pos)
    return collected[prompt, pos]


def _collect_local(frozen: FrozenPrompts, prompt: int, pos: int) -> LocalSources:
    here = [(writer, writer.lines(pos)) for writer in writers(frozen, prompt)]
    sizes = [lines.stop - lines.start for _, lines in here]
    features = [
        -np.ones(n, np.int64) if w.feature is None else to_numpy(w.feature[lines]).astype(np.int64)
        for (w, lines), n in zip(here, sizes, strict=True)
    ]
    acts = [
        np.ones(n) if w.acts is None else to_numpy(w.acts[lines])
        for (w, lines), n in zip(here, sizes, strict=True)
    ]
    pattern_sums = frozen.patterns[:, prompt, :, pos].sum(-1)
    return LocalSources(
        kind=np.repeat([KINDS.index(writer.kind) for writer, _ in here], sizes),
        layer=np.repeat([writer.layer for writer, _ in here], sizes),
        feature=np.concatenate(features),
        activation=np.concatenate(acts),
        vectors=torch.cat([writer.vectors(lines) for writer, lines in here]),
        attention_bias=frozen.b_O + torch.einsum("lh,lhd->ld", pattern_sums, frozen.value_bias),
    )
