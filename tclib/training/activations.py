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
import warnings
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.errors import InputError
from tclib.support.files import exclusive, new_file, temporary_path
from tclib.support.progress import progress

BYTES = 2  # of float16
ADVICE = "free some space, train fewer layers or tokens, or set cache_activations to false"
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
        self.lm.check_text(self.rows)
        for site in self.sites:
            self.lm.check_layer(site.layer)

    @property
    def block_tokens(self) -> int:
        return self.block_rows * self.rows.shape[1]

    def block(self, block_idx: int) -> Block:
        """All sites' activations of block `block_idx`, in its own token order."""
        lm, n_tokens = self.lm, self.block_tokens
        order = torch.randperm(n_tokens, generator=_generator(self.seed, 1, block_idx))
        found = {site: torch.empty(n_tokens, lm.d_model, device=lm.device) for site in self.sites}
        n_ctx, start = self.rows.shape[1], 0
        for batch in self._row_indices(block_idx).split(self.rows_per_forward):
            places = order[start : start + len(batch) * n_ctx].to(lm.device)
            for site, acts in self._read(batch).items():
                found[site].index_copy_(0, places, acts.flatten(0, 1).float())
            start += len(batch) * n_ctx
        return found

    def _read(self, row_indices: Int[Tensor, "row"]) -> dict[Site, Tensor]:
        if self.cache is None:
            return self.lm.read(self.rows[row_indices].long(), self.sites)
        return self.cache.read(self.sites, row_indices, self.lm.device)

    def _row_indices(self, block_idx: int) -> Int[Tensor, "row"]:
        """Rows block_idx × block_rows … of the endless sequence of shuffled passes."""
        first = block_idx * self.block_rows
        n_rows = len(self.rows)
        passes = range(first // n_rows, (first + self.block_rows - 1) // n_rows + 1)
        orders = [torch.randperm(n_rows, generator=_generator(self.seed, 0, p)) for p in passes]
        offset = first - passes[0] * n_rows
        return torch.cat(orders)[offset : offset + self.block_rows]


@dataclass(frozen=True)
class ActivationCache:
    """Activations of all rows of a corpus on disk: one float16 file a site, [row, pos, d_model].

    A file is there whole or not at all; beside it lies a checksum of every `rows_per_forward` rows.
    """

    folder: Path
    shape: tuple[int, int, int]
    rows_per_forward: int = 32

    @classmethod
    def of(cls, parent: Path, lm: LanguageModel, rows: Int[Tensor, "row pos"]) -> ActivationCache:
        """The cache of this model's weights on these rows: a folder of its own below `parent`."""
        digest = hashlib.sha256(f"{lm.content_hash} {tuple(rows.shape)}".encode())
        digest.update(np.ascontiguousarray(rows.numpy()).data)
        return cls(parent / digest.hexdigest()[:16], (*rows.shape, lm.d_model))

    def read(
        self, sites: Sequence[Site], row_indices: Int[Tensor, "batch"], device: torch.device
    ) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
        """Activations of some rows; call `fill` first."""
        stored = {site: np.load(self._path(site), mmap_mode="r") for site in sites}
        index = row_indices.numpy()
        return {site: torch.from_numpy(acts[index]).to(device) for site, acts in stored.items()}

    def fill(self, lm: LanguageModel, rows: Int[Tensor, "row pos"], sites: Sequence[Site]) -> None:
        """Read what is missing of `sites`, or damaged, in one pass over those rows.

        A second run on the same cache waits for the first. Errors: `InputError` if the disk has no room
        for it, or for values beyond float16's range.
        """
        with exclusive(self.folder, is_patient=True):
            wanted = {site: blocks for site in sites if (blocks := self._damaged(site))}
            if not wanted:
                return
            n_blocks = sum(map(len, wanted.values()))
            block_bytes = self.rows_per_forward * math.prod(self.shape[1:]) * BYTES
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _check_room(self.folder, n_blocks * block_bytes)
                self._write(lm, rows, wanted)
            except OSError as error:
                raise InputError(
                    f"the activation cache in {self.folder} could not be written ({error}): {ADVICE}"
                ) from error
            finally:
                for site in wanted:
                    with suppress(OSError):
                        self._partial(site).unlink()

    def _path(self, site: Site) -> Path:
        return self.folder / f"{site.name}-L{site.layer}.npy"

    def _partial(self, site: Site) -> Path:
        """What is written before it has the file's name; a name that `sweep` knows."""
        return temporary_path(self._path(site))

    def _sums_path(self, site: Site) -> Path:
        return self._path(site).with_suffix(".crc32.npy")

    def _rows(self, block: int) -> slice:
        return slice(block * self.rows_per_forward, (block + 1) * self.rows_per_forward)

    def _damaged(self, site: Site) -> set[int]:
        """The blocks of a site that are missing, or not as they were written; these are named."""
        path = self._path(site)
        every = set(range(math.ceil(self.shape[0] / self.rows_per_forward)))
        if not path.is_file():
            return every
        try:
            stored, sums = np.load(path, mmap_mode="r"), np.load(self._sums_path(site))
            as_written = stored.shape == self.shape and stored.dtype == np.float16
            is_whole = as_written and len(sums) == len(every)
        except (OSError, ValueError, EOFError):
            is_whole = False
        found = every
        if is_whole:
            found = {
                block for block in every if zlib.crc32(stored[self._rows(block)]) != sums[block]
            }
        if found:
            what = f"{len(found)} of {len(every)} blocks were damaged"
            warnings.warn(f"{path}: {what}: the model reads them again", stacklevel=4)
        return found

    def _write(
        self, lm: LanguageModel, rows: Int[Tensor, "row pos"], wanted: dict[Site, set[int]]
    ) -> None:
        """Write the blocks that are wanted: into a new file if they are all of it, else in place."""
        every = set().union(*wanted.values())
        is_new = {
            site: len(blocks) * self.rows_per_forward >= self.shape[0]
            for site, blocks in wanted.items()
        }
        paths = {site: self._partial(site) if is_new[site] else self._path(site) for site in wanted}
        sums = {site: self._sums(site, is_new[site]) for site in wanted}
        with ExitStack() as stack:
            files = {
                site: stack.enter_context(_Writer(path, self.shape, is_new[site]))
                for site, path in paths.items()
            }
            for block in progress(sorted(every), f"reading {lm.name}", unit="batch"):
                here = [site for site, blocks in wanted.items() if block in blocks]
                for site, acts in lm.read(rows[self._rows(block)].long(), here).items():
                    stored = _halved(site, acts)
                    files[site].put(self._rows(block).start, stored)
                    sums[site][block] = zlib.crc32(stored.data)
        for site, path in paths.items():
            with new_file(self._sums_path(site)) as temporary, open(temporary, "wb") as file:
                np.save(file, sums[site])
            path.rename(self._path(site))

    def _sums(self, site: Site, is_new: bool) -> NDArray[np.uint32]:
        if is_new:
            return np.zeros(math.ceil(self.shape[0] / self.rows_per_forward), np.uint32)
        return np.array(np.load(self._sums_path(site)))


class _Writer:
    """Writes rows into a .npy file; unlike a memory map it says so when the disk is full."""

    def __init__(self, path: Path, shape: tuple[int, int, int], is_new: bool) -> None:
        mode: Literal["w+", "r+"] = "w+" if is_new else "r+"
        mapped = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
        self._offset, self._row_bytes = mapped.offset, math.prod(shape[1:]) * BYTES
        del mapped
        self._file = open(path, "r+b")  # noqa: SIM115

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def put(self, row: int, values: NDArray[np.float16]) -> None:
        self._file.seek(self._offset + row * self._row_bytes)
        self._file.write(values.tobytes())


def _halved(site: Site, acts: Tensor) -> NDArray[np.float16]:
    halved = acts.to(torch.float16)
    if not bool(halved.isfinite().all()):
        raise InputError(
            f"{site.name} of layer {site.layer} reaches {float(acts.abs().max()):.3g}, more than float16 "
            "holds: set cache_activations to false"
        )
    return halved.cpu().numpy()


def _check_room(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise InputError(
            f"the activation cache needs {n_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB: "
            f"{ADVICE}"
        )


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator of its own for every (seed, stream, index)."""
    mixed = (seed * 1_000_003 + stream) * 1_000_000_007 + index
    return torch.Generator().manual_seed(mixed % 2**63)


def needed_sites(dictionaries: Iterable[tuple[Site, Site]]) -> tuple[Site, ...]:
    """The distinct sites among (input, output) pairs, by layer and name."""
    distinct = {site for pair in dictionaries for site in pair}
    return tuple(sorted(distinct, key=lambda site: (site.layer, site.name)))
