"""Predicates over contexts: what a hypothesis says, and how well it holds on text.

A predicate is true at a position if the token there is in `current` (where that is given), and some earlier
token in reach is in `attended` (where that is given). BOS positions are never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tclib.support.declared import Natural, declared
from tclib.support.errors import InputError
from tclib.support.statistics import auroc


@declared(frozen=True)
class Predicate:
    """Token ids at the position, token ids before it, and how far back these may stand.

    None allows anything. `reach` counts tokens before the position; 0 means the whole context so far.
    """

    current: frozenset[Natural] | None = None
    attended: frozenset[Natural] | None = None
    reach: Natural = 0

    def __post_init__(self) -> None:
        if self.current is None and self.attended is None:
            raise InputError(
                "a predicate over nothing: give current tokens, attended tokens, or both"
            )

    @property
    def is_context_free(self) -> bool:
        """Whether the token at the position decides alone."""
        return self.attended is None

    def holds(self, rows: Int[Tensor, "row pos"], bos_id: int) -> Bool[Tensor, "row pos"]:
        """Where the predicate is true."""
        true = rows != bos_id
        if self.current is not None:
            true &= _isin(rows, self.current)
        if self.attended is not None:
            true &= _seen_before(_isin(rows, self.attended), self.reach)
        return true

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sets = {"current": self.current, "attended": self.attended}
        listed = {name: None if ids is None else sorted(ids) for name, ids in sets.items()}
        return {**listed, "reach": self.reach}


def _isin(rows: Int[Tensor, "row pos"], ids: frozenset[int]) -> Bool[Tensor, "row pos"]:
    return torch.isin(rows.long(), torch.tensor(sorted(ids), dtype=torch.long))


def _seen_before(here: Bool[Tensor, "row pos"], reach: int) -> Bool[Tensor, "row pos"]:
    """Whether any of the `reach` positions before each one is marked."""
    reach = min(reach, here.shape[1])
    n_before = pad(here.cumsum(1, dtype=torch.int32), (1, 0))[:, :-1]
    beyond = pad(n_before, (reach, 0))[:, : here.shape[1]] if reach else 0
    return n_before > beyond


@dataclass(frozen=True)
class Score:
    """A predicate against a feature's activations, over all positions but BOS.

    `precision`, `recall` and `f1` are against "activation above the threshold"; `auroc` is the chance
    that a random active position has a higher prediction than a random silent one; `correlation` is
    that of prediction and activation.
    """

    precision: float
    recall: float
    f1: float
    auroc: float
    correlation: float
    n_active: int
    n_predicted: int

    def as_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def score(
    predicted: Bool[Tensor, "row pos"] | Float[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    counted: Bool[Tensor, "row pos"],
    threshold: float = 0.0,
) -> Score:
    """Score a prediction (true or false, or graded) on the positions that count.

    A graded prediction is taken as true where it is above 0. Errors: `InputError` if the feature is
    never above the threshold there.
    """
    graded = predicted[counted].double().numpy()
    values = acts[counted].double().numpy()
    active, said = values > threshold, graded > 0
    if not active.any():
        raise InputError(
            f"the feature is never above {threshold:g} on this text: give more text, or a live feature"
        )
    precision, recall, f1 = _precision_recall_f1(said, active)
    spread = graded.std() * values.std()
    correlation = float(np.corrcoef(graded, values)[0, 1]) if spread > 0 else 0.0
    counts = (int(active.sum()), int(said.sum()))
    return Score(precision, recall, f1, auroc(graded, active), correlation, *counts)


def _precision_recall_f1(said: Any, active: Any) -> tuple[float, float, float]:
    """Of two masks of one shape, `active` true somewhere; arrays or tensors."""
    hits, n_said, n_active = (int(mask.sum()) for mask in (active & said, said, active))
    precision = hits / n_said if n_said else 0.0
    recall = hits / n_active
    # By counts, of which 0.6 is 0.6: by precision and recall it may be a bit less.
    f1 = 2 * hits / (n_said + n_active)
    return precision, recall, f1


def f1_score(said: Bool[Tensor, "row pos"], active: Bool[Tensor, "row pos"]) -> float:
    """F1 of two masks, the second of which is true somewhere."""
    return _precision_recall_f1(said, active)[2]


def fit_predicate(
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    bos_id: int,
    threshold: float = 0.0,
    max_tokens: int = 12,
    reaches: Sequence[int] = (1, 4, 0),
) -> Predicate:
    """The simplest of a small family of predicates that explains where a feature is active.

    Candidates, from simple to less simple: tokens at the position; tokens right before, within four,
    or anywhere before it; the first and one of the others together. Each takes the tokens that raise F1
    most, at most `max_tokens`. A less simple one is taken only if its F1 is 0.05 higher. Errors:
    `InputError` if the feature is never active here.
    """
    active = acts > threshold
    if not active.any():
        raise InputError("the feature is never active on these rows: nothing to explain")
    text = rows != bos_id
    current = _best_tokens(rows, active, text, max_tokens, None)
    candidates = [Predicate(current=current)] if current else []
    for reach in reaches:
        attended = _best_tokens(rows, active, text, max_tokens, reach)
        if not attended:
            continue
        before = Predicate(attended=attended, reach=reach)
        candidates.append(before)
        # Together, each is chosen where the other holds.
        here = _best_tokens(rows, active, before.holds(rows, bos_id), max_tokens, None)
        if here:
            allowed = Predicate(current=here).holds(rows, bos_id)
            attended = _best_tokens(rows, active, allowed, max_tokens, reach)
        if here and attended:
            candidates.append(Predicate(here, attended, reach))
    if not candidates:
        raise InputError("no token explains any activation: the rows hold BOS alone")
    best, best_f1 = candidates[0], -1.0
    for candidate in candidates:
        f1 = _precision_recall_f1(candidate.holds(rows, bos_id), active & text)[2]
        if round(f1 - best_f1, 9) > (0.05 if best_f1 >= 0 else 0.0):
            best, best_f1 = candidate, f1
    return best


def _best_tokens(
    rows: Int[Tensor, "row pos"],
    active: Bool[Tensor, "row pos"],
    within: Bool[Tensor, "row pos"],
    max_tokens: int,
    reach: int | None,
) -> frozenset[int]:
    """Tokens, by their share of active positions, as many as raise F1 on the positions `within`.

    Of equal shares the more frequent token is first, then the lower id.
    Tokens at the position itself (reach None), or before it.
    """
    active = active & within
    candidates = rows[active] if reach is None else _tokens_before(rows, active, reach)
    ids, counts = candidates.unique(return_counts=True)
    common = ids[counts.argsort(descending=True, stable=True)][: 4 * max_tokens]
    masks = {i: _where(rows, i, reach) & within for i in common.tolist()}
    sizes = {i: int(mask.sum()) for i, mask in masks.items()}
    precision = {i: int((active & masks[i]).sum()) / size for i, size in sizes.items() if size}
    ordered = sorted(precision, key=lambda i: -precision[i])
    n_active = int(active.sum())
    union, best, best_f1, chosen = torch.zeros_like(active), 0, 0.0, []
    for i in ordered[:max_tokens]:
        union = union | masks[i]
        chosen.append(i)
        hits = int((union & active).sum())
        f1 = 2 * hits / (int(union.sum()) + n_active)
        if f1 > best_f1:
            best, best_f1 = len(chosen), f1
    return frozenset(chosen[:best])


def _where(
    rows: Int[Tensor, "row pos"], token_id: int, reach: int | None
) -> Bool[Tensor, "row pos"]:
    here = rows == token_id
    return here if reach is None else _seen_before(here, reach)


def _tokens_before(
    rows: Int[Tensor, "row pos"], active: Bool[Tensor, "row pos"], reach: int
) -> Int[Tensor, "token"]:
    """Tokens at up to four positions before active ones (or `reach`, if that is less)."""
    distances = range(1, min(reach or 4, 4) + 1)
    return torch.cat([rows[:, :-back][active[:, back:]] for back in distances])
