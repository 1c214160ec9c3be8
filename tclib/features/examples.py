"""Where features fire: activations over a corpus, top examples of all features in one pass, samples in bands.

BOS positions count as silent throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import is_active
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count, Positive
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import TIE, ranked, settled

ROWS_PER_FORWARD = 16
N_BANDS = 5
HISTOGRAM_EDGES = np.geomspace(1e-3, 1e3, 61)  # activations, ten bins a factor of ten


@checked
@torch.no_grad()
def feature_activations(
    lm: LanguageModel,
    dictionary: Dictionary,
    features: Sequence[int],
    rows: Int[Tensor, "row pos"],
    memory_limit_gib: Positive = 4.0,
) -> Float[Tensor, "feature row pos"]:
    """Activations of some features at every position, from one pass over the rows.

    Takes 4 bytes × features × rows × positions. Errors: `InputError` for a feature that does not
    exist, or more memory than allowed.
    """
    dictionary.check_features(*features)
    needed = 4 * len(features) * rows.numel() / 2**30
    if needed > memory_limit_gib:
        raise InputError(
            f"activations of {len(features)} features on {rows.numel()} tokens take {needed:.1f} GiB: "
            f"ask for fewer, give fewer rows, or raise memory_limit_gib above {memory_limit_gib:g}"
        )
    found = [acts[..., list(features)].float().cpu() for _, acts in _encoded(lm, dictionary, rows)]
    return torch.cat(found).permute(2, 0, 1).contiguous()


def check_acts(acts: Float[Tensor, "row pos"], rows: Int[Tensor, "row pos"]) -> None:
    """Raise `InputError` unless there is a finite activation a token."""
    if acts.shape != rows.shape:
        raise InputError(
            f"activations of shape {tuple(acts.shape)} for rows of shape {tuple(rows.shape)}: "
            "give one activation a token, or leave them out"
        )
    if not bool(acts.isfinite().all()):
        raise InputError("activations that are NaN or infinite: expected finite ones")


def _encoded(
    lm: LanguageModel, dictionary: Dictionary, rows: Int[Tensor, "row pos"]
) -> Iterator[tuple[int, Float[Tensor, "row pos n_features"]]]:
    """(First row of a batch, its activations with BOS silenced)."""
    dictionary.check_model(lm)
    lm.check_text(rows)
    site = dictionary.config.input_site
    batches = rows.split(ROWS_PER_FORWARD)
    bar = progress(batches, f"layer {dictionary.config.layer}", unit="batch", leave=False)
    for i, batch in enumerate(bar):
        acts = dictionary.encode(lm.read(batch.long(), {site})[site])
        acts[(batch == lm.bos_id).to(acts.device)] = 0.0
        yield i * ROWS_PER_FORWARD, acts


# ---------------------------------------------------------------------------------------------
# Every feature in one pass


@torch.no_grad()
def firing_frequency(
    lm: LanguageModel, dictionary: Dictionary, rows: Int[Tensor, "row pos"]
) -> Float[Tensor, "n_features"]:
    """Share of tokens, BOS left out, on which each feature fires."""
    n_fired = torch.zeros(dictionary.config.n_features, dtype=torch.float64, device=lm.device)
    for _, acts in _encoded(lm, dictionary, rows):
        n_fired += is_active(acts).sum((0, 1))
    return n_fired.cpu() / int((rows != lm.bos_id).sum())


def live_in_random_order(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Int[Tensor, "row pos"],
    generator: torch.Generator,
    min_log10_frequency: float = -4.0,
) -> list[int]:
    """All features that fire on more than 10^min of the tokens, BOS left out.

    Every feature is put in a random order, live or not: should one at the border be live on one machine
    only, the others stay in theirs.
    """
    frequency = firing_frequency(lm, dictionary, rows)
    order = torch.randperm(len(frequency), generator=generator)
    live: list[int] = order[(frequency > 10.0**min_log10_frequency)[order]].tolist()
    return live


def live_features(
    lm: LanguageModel,
    dictionary: Dictionary,
    rows: Int[Tensor, "row pos"],
    n_features: int,
    generator: torch.Generator,
    min_log10_frequency: float = -4.0,
) -> list[int]:
    """The first of `live_in_random_order`. Errors: `InputError` if fewer than `n_features` are live."""
    live = live_in_random_order(lm, dictionary, rows, generator, min_log10_frequency)
    if len(live) < n_features:
        raise InputError(
            f"{n_features} live features asked for, but layer {dictionary.config.layer} has {len(live)}: "
            "ask for fewer, or give more rows"
        )
    return live[:n_features]


@dataclass(frozen=True)
class TopExamples:
    """The strongest examples of every feature, its frequency and a histogram of its activations.

    `values`, `row` and `pos` are [n_features, k], strongest first; where a feature fired fewer than k
    times the rest is 0 and −1. `histogram` counts positive activations between `HISTOGRAM_EDGES`
    (outer bins take what lies beyond). Memory: n_features × (16 k + 8 × 60) bytes.
    """

    values: Float[np.ndarray, "n_features k"]
    row: Int[np.ndarray, "n_features k"]
    pos: Int[np.ndarray, "n_features k"]
    n_fired: Int[np.ndarray, "n_features"]
    histogram: Int[np.ndarray, "n_features bin"]
    n_tokens: int

    @property
    def frequency(self) -> Float[np.ndarray, "n_features"]:
        """Share of tokens, BOS left out, on which each feature fires."""
        return self.n_fired / self.n_tokens


@checked
@torch.no_grad()
def top_examples(
    lm: LanguageModel, dictionary: Dictionary, rows: Int[Tensor, "row pos"], k: Count = 20
) -> TopExamples:
    """The k strongest examples of every feature, from one pass over the rows.

    Only activations above a feature's k-th strongest so far are looked at, so the pass costs little
    more than encoding. Errors: `InputError` for k below 1.
    """
    n_features, n_pos = dictionary.config.n_features, rows.shape[1]
    edges = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float32, device=lm.device)
    values = torch.zeros(n_features, k, device=lm.device)
    heap = _Heap(values, torch.full_like(values, -1, dtype=torch.long))
    n_fired = torch.zeros(n_features, dtype=torch.long, device=lm.device)
    histogram = n_fired.new_zeros(n_features, len(HISTOGRAM_EDGES) - 1)
    for first_row, acts in _encoded(lm, dictionary, rows):
        flat = acts.flatten(0, 1).float()
        place, feature = is_active(flat).nonzero(as_tuple=True)
        value = flat[place, feature]
        n_fired += torch.bincount(feature, minlength=n_features)
        cell = feature * histogram.shape[1] + torch.bucketize(value, edges)
        histogram += torch.bincount(cell, minlength=histogram.numel()).view_as(histogram)
        strong = value > heap.values[feature, -1]
        heap = heap.merged(feature[strong], value[strong], place[strong] + first_row * n_pos)
    place_of = heap.place.cpu().numpy()
    empty = place_of < 0
    return TopExamples(
        heap.values.cpu().numpy(),
        np.where(empty, -1, place_of // n_pos),
        np.where(empty, -1, place_of % n_pos),
        n_fired.cpu().numpy(),
        histogram.cpu().numpy(),
        int((rows != lm.bos_id).sum()),
    )


class _Heap(NamedTuple):
    """The strongest values of each feature, falling, and where they are."""

    values: Float[Tensor, "n_features k"]
    place: Int[Tensor, "n_features k"]

    def merged(
        self,
        feature: Int[Tensor, "new"],
        value: Float[Tensor, "new"],
        place: Int[Tensor, "new"],
    ) -> _Heap:
        """With new values taken in; only features that have any are touched."""
        if len(feature) == 0:
            return self
        k = self.values.shape[1]
        touched, index = feature.unique(return_inverse=True)
        old = torch.arange(len(touched), device=feature.device).repeat_interleave(k)
        groups = torch.cat([old, index])
        values = torch.cat([self.values[touched].flatten(), value])
        places = torch.cat([self.place[touched].flatten(), place])
        order = values.argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        starts = torch.bincount(groups).cumsum(0) - torch.bincount(groups)
        rank = torch.arange(len(order), device=order.device) - starts[groups[order]]
        best = order[rank < k].view(len(touched), k)
        merged = _Heap(self.values.clone(), self.place.clone())
        merged.values[touched] = values[best]
        merged.place[touched] = places[best]
        return merged


# ---------------------------------------------------------------------------------------------
# Samples of one feature


def sample_in_bands(
    acts: Float[Tensor, "row pos"], n_examples: int = 50, n_bands: int = N_BANDS
) -> pd.DataFrame:
    """Examples spread evenly over a feature's positive range, no position twice.

    For `n_examples` values equally spaced from the smallest to the largest activation the nearest
    unused example is taken. Columns: row, pos, activation, band (0 is the lowest of `n_bands` equal
    bands from 0 to the maximum; the last ends at it), strongest first. Errors: `InputError` for a
    feature that never fires here, or fewer examples than asked for.
    """
    row, pos = is_active(acts).nonzero(as_tuple=True)
    values = acts[row, pos].double().numpy()
    if len(values) == 0:
        raise InputError("the feature never fires on these rows: give more rows, or a live feature")
    if len(values) < n_examples:
        raise InputError(
            f"{n_examples} examples asked for, but the feature fires on {len(values)} tokens: "
            f"ask for at most {len(values)}, or give more rows"
        )
    tied = settled(values)
    order = np.argsort(tied, kind="stable")
    chosen = order[_nearest_unused(tied[order], n_examples)]
    width = values.max() / n_bands
    band = np.minimum((values[chosen] / width).astype(int), n_bands - 1)
    places = {"row": row.numpy()[chosen], "pos": pos.numpy()[chosen]}
    table = pd.DataFrame({**places, "activation": values[chosen], "band": band})
    return table.iloc[ranked(table["activation"])].reset_index(drop=True)


def _nearest_unused(ordered: Float[np.ndarray, "value"], n: int) -> Int[np.ndarray, "chosen"]:
    """Indices of the values nearest to n equally spaced ones, each used once."""
    free = np.ones(len(ordered), dtype=bool)
    for wanted in np.linspace(ordered[0], ordered[-1], n):
        left = right = int(np.searchsorted(ordered, wanted))
        while left > 0 and not free[left - 1]:
            left -= 1
        while right < len(ordered) and not free[right]:
            right += 1
        has_left, has_right = left > 0, right < len(ordered)
        if has_left and has_right:
            # As near as the right one, but for rounding: the left one.
            has_left = wanted - ordered[left - 1] <= (ordered[right] - wanted) * (1 + TIE)
        free[left - 1 if has_left else right] = False
    return (~free).nonzero()[0]


def band_shares(
    acts: Float[Tensor, "row pos"], n_tokens: int, n_bands: int = N_BANDS
) -> pd.DataFrame:
    """Share of all tokens whose activation lies in each band. Columns: band, low, high, share."""
    positive = acts[acts > 0].double().numpy()
    edges = np.linspace(0.0, positive.max() if len(positive) else 1.0, n_bands + 1)
    counts, _ = np.histogram(positive, edges)
    return pd.DataFrame(
        {"band": range(n_bands), "low": edges[:-1], "high": edges[1:], "share": counts / n_tokens}
    )
