"""Features against neurons under zero ablation (paper Section 5.2, Figure 5).

One MLP's output is rest + Σ_i a_i d_i over *units*: a transcoder's features, an SAE's, or the MLP's own
neurons; `rest` is what stays when all are ablated (output bias, skip). Units are ranked, and the task's
metric is measured

    keep only the first k of the ranking   (sufficiency, the paper's curve)
    remove only the first k                (necessity)

at every position, for k from 0 to all. The layers below run once; partial sums over the ranking give every k's
output without decoding again; several k share one forward pass through the layers above, and only the answers
are unembedded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.greater_than.task import GreaterThan
from tclib.greater_than.units import Units
from tclib.models.language_model import LanguageModel
from tclib.models.running import LowerRun
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import ranked, to_numpy

TOKENS_PER_FORWARD = 16_384  # prompts × positions × values of k
EVEN = 1e-6  # of the metric: two values that differ by less are a tie


def rank_by_attribution(
    lm: LanguageModel, task: GreaterThan, below: LowerRun, units: Units
) -> Int[Tensor, "unit"]:
    """By activation × gradient of the probability difference, summed over positions, mean size.

    The gradient is taken at the output with all units kept, through the layers above.
    """
    scored = task.is_scored
    total = units.total().detach().requires_grad_()
    with torch.enable_grad():
        differences = _differences(lm, task, below, units.mlp_out(total)[None])[0]
        differences[scored].sum().backward()
    assert total.grad is not None
    per_prompt = (total.grad[scored] @ units.W_dec.T * units.acts[scored]).sum(1)
    return torch.from_numpy(ranked(per_prompt.abs().mean(0))).to(units.acts.device)


@dataclass(frozen=True)
class Curve:
    """The metric of every scored prompt for every k."""

    units: str
    ranking: str
    ks: tuple[int, ...]
    values: Float[np.ndarray, "k prompt"]

    @property
    def mean(self) -> Float[np.ndarray, "k"]:
        """Mean over prompts."""
        return np.asarray(self.values.mean(1))

    def at(self, k: int) -> float:
        """The mean at one k. Errors: `InputError` if the curve does not have it."""
        if k not in self.ks:
            raise InputError(f"k {k} is not on the curve: it has {self.ks[0]} to {self.ks[-1]}")
        return float(self.mean[self.ks.index(k)])


def k_grid(n_units: int, dense_to: int = 100, n_sparse: int = 20) -> list[int]:
    """0 to `dense_to` one by one, then geometrically up to all units."""
    dense = range(min(dense_to, n_units) + 1)
    top = max(n_units, dense_to)
    sparse = np.minimum(np.geomspace(max(1, dense_to), top, n_sparse + 1), n_units)
    return sorted({*dense, *(int(k) for k in np.rint(sparse))})


@torch.no_grad()
def ablation_curve(
    lm: LanguageModel,
    task: GreaterThan,
    below: LowerRun,
    units: Units,
    order: Int[Tensor, "unit"],
    ks: Sequence[int],
    remove: bool = False,
    ranking: str = "",
) -> Curve:
    """The probability difference with only the first k units of `order` kept, or with them removed.

    Errors: `InputError` for k outside 0 to n_units, or not increasing.
    """
    ks = list(ks)
    outside = [k for k in ks if not 0 <= k <= units.n_units]
    if outside or ks != sorted(set(ks)) or not ks:
        raise InputError(
            f"k {outside[:5] or ks[:5]}: expected increasing numbers from 0 to {units.n_units}"
        )
    scored = task.is_scored.nonzero()[:, 0]
    every = units.total()
    sums = _partial_sums(units, order, ks)
    totals = (every - kept + units.rest if remove else kept for kept in sums)
    outputs = map(units.mlp_out, totals)
    chunks = []
    room = max(1, TOKENS_PER_FORWARD // every[..., 0].numel())
    with progress(None, f"{units.name}, {ranking or 'k'}", total=len(ks), unit="k") as bar:
        while group := list(itertools.islice(outputs, room)):
            chunks.append(_differences(lm, task, below, torch.stack(group)))
            bar.update(len(group))
    values = torch.cat(chunks)[:, scored].double().cpu().numpy()
    return Curve(units.name, ranking, tuple(ks), values)


def _partial_sums(
    units: Units, order: Int[Tensor, "unit"], ks: Sequence[int]
) -> Iterator[Float[Tensor, "prompt pos d_model"]]:
    """rest + Σ over the first k of `order`, for every k in turn."""
    total, done = units.rest.clone(), 0
    for k in ks:
        added = order[done:k]
        total = total + units.acts[..., added] @ units.W_dec[added]
        done = k
        yield total


def _differences(
    lm: LanguageModel,
    task: GreaterThan,
    below: LowerRun,
    outputs: Float[Tensor, "k prompt pos d_model"],
) -> Float[Tensor, "k prompt"]:
    """The metric of every prompt with the MLP's output replaced by each of `outputs`."""
    streams = (below.base + outputs).flatten(0, 1)
    read = lm.run_above(below.layer, streams)
    logits = read @ lm.unembedding(task.answer_ids) + lm.b_U[task.answer_ids]
    probabilities = logits.softmax(-1).unflatten(0, outputs.shape[:2])
    return task.differences(probabilities)


@torch.no_grad()
def metric_of(
    lm: LanguageModel,
    task: GreaterThan,
    below: LowerRun,
    mlp_out: Float[Tensor, "prompt pos d_model"],
) -> float:
    """The mean probability difference with the MLP's output replaced by `mlp_out`."""
    return float(values_of(lm, task, below, mlp_out).mean())


@torch.no_grad()
def values_of(
    lm: LanguageModel,
    task: GreaterThan,
    below: LowerRun,
    mlp_out: Float[Tensor, "prompt pos d_model"],
) -> Float[np.ndarray, "scored_prompt"]:
    """The probability difference of every scored prompt with the MLP's output replaced by `mlp_out`."""
    return to_numpy(_differences(lm, task, below, mlp_out[None])[0, task.is_scored])


def crossing(one: Curve, other: Curve) -> int | None:
    """The first k ≥ 1 at which `one` is no longer above `other`; None if it always is.

    Only values of k that both curves have.
    """
    for k in sorted(set(one.ks) & set(other.ks) - {0}):
        if not is_above(one, other, k):
            return k
    return None


def is_above(one: Curve, other: Curve, k: int) -> bool:
    """Whether one curve is above another at k by more than rounding."""
    return one.at(k) - other.at(k) > EVEN


def nearest_approach(one: Curve, other: Curve, below: int = 100) -> int | None:
    """The k from 1 to `below` − 1 at which two curves are nearest: the authors' "crossing"; None without one.

    Only values of k that both curves have.
    """
    shared = [k for k in sorted(set(one.ks) & set(other.ks)) if 1 <= k < below]
    nearness = np.array([-abs(one.at(k) - other.at(k)) for k in shared])
    return shared[int(ranked(nearness, EVEN)[0])] if shared else None


def steepest_drop(curve: Curve, order: Int[Tensor, "unit"], within: int = 50) -> int:
    """The unit whose joining lowers the kept-k curve most, among the first `within`.

    Errors: `InputError` if the curve does not hold every k up to there.
    """
    within = min(within, len(order))
    if curve.ks[: within + 1] != tuple(range(within + 1)):
        raise InputError(f"the steepest drop needs every k from 0 to {within}")
    drops = -np.diff(curve.mean[: within + 1])
    return int(order[int(ranked(drops, EVEN)[0])])


@torch.no_grad()
def leave_one_out(
    lm: LanguageModel, task: GreaterThan, below: LowerRun, units: Units, candidates: Sequence[int]
) -> pd.DataFrame:
    """The metric with all units but one, for each candidate. Columns: unit, value, gain (over all)."""
    every = units.total()
    whole = metric_of(lm, task, below, units.mlp_out(every))
    values = []
    for unit in candidates:
        others = every - units.acts[..., [unit]] @ units.W_dec[[unit]]
        values.append(metric_of(lm, task, below, units.mlp_out(others)))
    table = pd.DataFrame({"unit": list(candidates), "value": values})
    table["gain"] = table["value"] - whole
    return table.iloc[ranked(table["gain"], EVEN)].reset_index(drop=True)
