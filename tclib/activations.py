"""Shuffled activations of any number of MLP sites, from one forward pass over the corpus.

The harvest is stateless: block b of pass p is a pure function of (rows, seed, b), so a killed run
resumes by asking for the block it was in. A block is a fixed number of rows, drawn in an order that
is shuffled anew for every pass over the corpus; its tokens are shuffled once more, and all sites
share the permutation. Memory is one block, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.lm import LanguageModel, Site
from tclib.runs import InputError

Block = dict[Site, Float[Tensor, "token d_model"]]


@dataclass(frozen=True)
class Harvest:
    """Blocks of shuffled activations.

    Args:
        lm: the frozen model.
        rows: tokens, [row, pos].
        sites: what to read; the forward pass ends at the last of them.
        block_rows: rows a block; a block holds block_rows × n_ctx tokens of every site.
        rows_per_forward: rows a forward pass.
        seed: of both shuffles.
    """

    lm: LanguageModel
    rows: Int[Tensor, "row pos"]
    sites: tuple[Site, ...]
    block_rows: int = 512
    rows_per_forward: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise InputError("no rows to harvest: the corpus is empty")
        for site in self.sites:
            self.lm.check_layer(site.layer)
        self.lm.check_context(self.rows.shape[1])

    @property
    def block_tokens(self) -> int:
        return self.block_rows * self.rows.shape[1]

    def block(self, block_idx: int) -> Block:
        """All sites' activations of block `block_idx`, in its own token order."""
        order = self._permutation(block_idx)
        tokens = self.rows[self._row_indices(block_idx)].long()
        found = {site: self._empty() for site in self.sites}
        start = 0
        for batch in tokens.split(self.rows_per_forward):
            places = order[start : start + batch.numel()].to(self.lm.device)
            for site, acts in self.lm.read(batch, self.sites).items():
                found[site].index_copy_(0, places, acts.flatten(0, 1).float())
            start += batch.numel()
        return found

    def _empty(self) -> Float[Tensor, "token d_model"]:
        return torch.empty(self.block_tokens, self.lm.d_model, device=self.lm.device)

    def _permutation(self, block_idx: int) -> Int[Tensor, "token"]:
        return torch.randperm(self.block_tokens, generator=_generator(self.seed, 1, block_idx))

    def _row_indices(self, block_idx: int) -> Int[Tensor, "row"]:
        """Rows block_idx × block_rows … of the endless sequence of shuffled passes."""
        first = block_idx * self.block_rows
        n_rows = len(self.rows)
        passes = range(first // n_rows, (first + self.block_rows - 1) // n_rows + 1)
        sequence = torch.cat([self._pass_order(p) for p in passes])
        offset = first - passes[0] * n_rows
        return sequence[offset : offset + self.block_rows]

    def _pass_order(self, pass_idx: int) -> Int[Tensor, "row"]:
        return torch.randperm(len(self.rows), generator=_generator(self.seed, 0, pass_idx))


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator of its own for every (seed, stream, index)."""
    mixed = (seed * 1_000_003 + stream) * 1_000_000_007 + index
    return torch.Generator().manual_seed(mixed % 2**63)


def needed_sites(dictionaries: Iterable[tuple[Site, Site]]) -> tuple[Site, ...]:
    """The distinct sites among (input, output) pairs, by layer and name."""
    distinct = {site for pair in dictionaries for site in pair}
    return tuple(sorted(distinct, key=lambda site: (site.layer, site.name)))
