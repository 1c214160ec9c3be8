"""The floor of a grade: what random hypotheses of the same shape and size reach.

Every list of tokens is drawn anew, as many of them, by how frequent they are in the text; a class or a spelling
becomes a list of as many tokens as it has there; a place keeps its width and stands elsewhere. Only other tokens than
its own are drawn: one draw in fifty would else say " to" where the hypothesis does, and the best of a hundred be the
hypothesis itself. What is left of it is its structure: reaches, conjunctions, negations, levels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.language import (
    After,
    Case,
    Claim,
    Condition,
    Every,
    InClause,
    InDocument,
    Not,
    OneOf,
)
from tclib.blind.predicates import f1_score
from tclib.blind.vocabulary import Vocabulary
from tclib.features.examples import check_acts
from tclib.support.declared import whole
from tclib.support.errors import InputError

N_RANDOM = 100
_N_PLACES = 32  # how far into a clause or a document a place may be moved


class _Text(NamedTuple):
    """What random conditions are drawn from."""

    rows: Int[Tensor, "row pos"]
    vocabulary: Vocabulary
    counts: Float[Tensor, "token"]
    generator: torch.Generator


def random_predicates(
    condition: Condition,
    rows: Int[Tensor, "row pos"],
    vocabulary: Vocabulary,
    n: int = N_RANDOM,
    generator: torch.Generator | None = None,
) -> list[Condition]:
    """`n` random conditions of the shape of one; by seed 0 without a generator.

    Errors: `InputError` for fewer than one, tokens outside the vocabulary, or rows of BOS alone.
    """
    if whole("n", n) < 1:
        raise InputError(f"n {n}: expected at least one random hypothesis")
    vocabulary.check(rows)
    tokens = rows[rows != vocabulary.bos_id].long()
    if not len(tokens):
        raise InputError("rows hold nothing but BOS: expected text")
    counts = torch.bincount(tokens, minlength=len(vocabulary)).double()
    drawn_by = generator or torch.Generator().manual_seed(0)
    text = _Text(rows.long(), vocabulary, counts, drawn_by)
    return [_redrawn(condition, text) for _ in range(n)]


def floor_f1(
    condition: Condition,
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    vocabulary: Vocabulary,
    threshold: float = 0.0,
    n: int = N_RANDOM,
    generator: torch.Generator | None = None,
) -> float:
    """The best F1 of `n` random hypotheses of the same shape, and of the one that holds everywhere.

    A real one is worth something above it.

    Errors: `InputError` if the feature is never above the threshold, and as `random_predicates`.
    """
    drawn = random_predicates(condition, rows, vocabulary, n, generator)
    text = rows != vocabulary.bos_id
    check_acts(acts, rows)
    active = (acts > threshold) & text
    if not active.any():
        raise InputError(
            f"the feature is never above {threshold:g} on this text: give more text, or a live feature"
        )
    checked_rows = rows.long()
    everywhere = f1_score(text, active)
    return max(everywhere, *(f1_score(one.true(checked_rows, vocabulary), active) for one in drawn))


def _redrawn(condition: Condition, text: _Text) -> Condition:
    if isinstance(condition, After):
        return After(_redrawn(condition.condition, text), condition.reach)
    if isinstance(condition, Not):
        return Not(_redrawn(condition.condition, text))
    if isinstance(condition, Every):
        return Every(tuple(_redrawn(part, text) for part in condition.parts))
    if isinstance(condition, Claim):
        cases = condition.cases
        return Claim(tuple(Case(_redrawn(case.condition, text), case.level) for case in cases))
    if isinstance(condition, InClause | InDocument):
        return _moved(condition, text.generator)
    return _other_tokens(condition, text)


def _other_tokens(condition: Condition, text: _Text) -> OneOf:
    """As many different tokens as are meant, by frequency, none of them meant; fewer if the text has no more."""
    if isinstance(condition, OneOf):
        own, n = torch.tensor(sorted(condition.ids), dtype=torch.long), len(condition.ids)
    else:
        own = text.rows[condition.true(text.rows, text.vocabulary)].unique()
        n = len(own)
    others = text.counts.clone()
    others[own] = 0.0
    n = min(n, int((others > 0).sum()))
    drawn = torch.multinomial(others, n, generator=text.generator).tolist() if n else []
    return OneOf(frozenset(drawn))


def _moved(place: InClause | InDocument, generator: torch.Generator) -> InClause | InDocument:
    """A place of the same width that begins elsewhere."""
    first = 0 if isinstance(place, InClause) else 1
    starts = [at for at in range(first, first + _N_PLACES) if at != place.least]
    start = starts[int(torch.randint(len(starts), (), generator=generator))]
    most = None if place.most is None else start + place.most - place.least
    return type(place)(start, most)
