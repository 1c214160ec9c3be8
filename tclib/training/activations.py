"""Shuffled activations of any number of MLP sites, from one forward pass over the corpus.

The harvest is stateless: block b of pass p is a pure function of (rows, seed, b), so a killed run
resumes by asking for the block it was in. A block is a fixed number of rows, drawn in an order that
is shuffled anew for every pass over the corpus; its tokens are shuffled once more, and all sites
share the permutation. Memory is one block, whatever the number of tokens.

With an `ActivationCache` the model reads every row once and its activations are kept on disk, so that
further passes and further dictionaries cost no forward pass: on a laptop that is nearly all of the time.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError
from tclib.support.progress import progress

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
        cache: where activations are kept once they were read; None: the model reads every block.
    """

    lm: LanguageModel
    rows: Int[Tensor, "row pos"]
    sites: tuple[Site, ...]
    block_rows: int = 512
    rows_per_forward: int = 16
    seed: int = 0
    cache: ActivationCache | None = None

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
        found = {site: self._empty() for site in self.sites}
        n_ctx, start = self.rows.shape[1], 0
        for batch in self._row_indices(block_idx).split(self.rows_per_forward):
            places = order[start : start + len(batch) * n_ctx].to(self.lm.device)
            for site, acts in self._read(batch).items():
                found[site].index_copy_(0, places, acts.flatten(0, 1).float())
            start += len(batch) * n_ctx
        return found

    def _read(self, row_indices: Int[Tensor, "row"]) -> dict[Site, Tensor]:
        if self.cache is None:
            return self.lm.read(self.rows[row_indices].long(), self.sites)
        return self.cache.read(self.sites, row_indices, self.lm.device)

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


@dataclass(frozen=True)
class ActivationCache:
    """Activations of all rows of a corpus on disk: one float16 file a site, [row, pos, d_model].

    A file is there whole or not at all.
    """

    folder: Path
    rows_per_forward: int = 32

    @classmethod
    def of(cls, parent: Path, lm: LanguageModel, rows: Int[Tensor, "row pos"]) -> ActivationCache:
        """The cache of this model on these rows: a folder of its own below `parent`."""
        digest = hashlib.sha256(f"{lm.name} {tuple(rows.shape)}".encode())
        digest.update(np.ascontiguousarray(rows.numpy()).data)
        return cls(parent / digest.hexdigest()[:16])

    def read(
        self, sites: Sequence[Site], row_indices: Int[Tensor, "batch"], device: torch.device
    ) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """Activations of some rows; call `fill` first."""
        index = row_indices.numpy()
        found = {}
        for site in sites:
            stored = np.load(self._path(site), mmap_mode="r")
            found[site] = torch.from_numpy(stored[index]).to(device)
        return found

    def fill(self, lm: LanguageModel, rows: Int[Tensor, "row pos"], sites: Sequence[Site]) -> None:
        """Read what is missing of `sites`, in one pass over the rows.

        Errors: `InputError` if the disk has no room for it, or for values beyond float16's range.
        """
        missing = [site for site in sites if not self._path(site).is_file()]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shape = (*rows.shape, lm.d_model)
        _check_room(self.folder, len(missing) * math.prod(shape) * torch.float16.itemsize)
        partial = {site: self._path(site).with_suffix(".partial") for site in missing}
        try:
            self._write(lm, rows, partial, shape)
            for site, path in partial.items():
                path.rename(self._path(site))
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)

    def _path(self, site: Site) -> Path:
        return self.folder / f"{site.name}-L{site.layer}.npy"

    def _write(
        self,
        lm: LanguageModel,
        rows: Int[Tensor, "row pos"],
        paths: dict[Site, Path],
        shape: tuple[int, ...],
    ) -> None:
        files = {
            site: np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            for site, path in paths.items()
        }
        starts = range(0, len(rows), self.rows_per_forward)
        for start in progress(starts, f"reading {lm.name}", unit="batch"):
            batch = rows[start : start + self.rows_per_forward].long()
            for site, acts in lm.read(batch, paths).items():
                halved = acts.to(torch.float16)
                if not bool(halved.isfinite().all()):
                    raise InputError(
                        f"{site.name} of layer {site.layer} reaches {float(acts.abs().max()):.3g}, more than "
                        "float16 holds: set cache_activations to false"
                    )
                files[site][start : start + len(batch)] = halved.cpu().numpy()
        for file in files.values():
            file.flush()


def _check_room(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise InputError(
            f"the activation cache needs {n_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB: "
            "free some, train fewer layers or tokens, or set cache_activations to false"
        )


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator of its own for every (seed, stream, index)."""
    mixed = (seed * 1_000_003 + stream) * 1_000_000_007 + index
    return torch.Generator().manual_seed(mixed % 2**63)


def needed_sites(dictionaries: Iterable[tuple[Site, Site]]) -> tuple[Site, ...]:
    """The distinct sites among (input, output) pairs, by layer and name."""
    distinct = {site for pair in dictionaries for site in pair}
    return tuple(sorted(distinct, key=lambda site: (site.layer, site.name)))
