"""The sighted search: the best that the language of hypotheses can say of a feature whose text is seen.

It sees what no blind study sees, so its F1 on other text is the ceiling of a study's grade: what is missing from
one is the language's fault, not blindness. From atoms (classes, spellings, lists of tokens, the same before the
position, places) it builds conjunctions by beams and then further cases, all by F1; something that says more is
taken only if its F1 is 0.05 higher. Where something holds is kept as bits, 64 tokens a number: what two conditions
share is then counted in microseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
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
    OfClass,
    OneOf,
    Spelt,
    distances,
)
from tclib.blind.vocabulary import CLASSES, Vocabulary
from tclib.evaluation.metrics import strong_threshold
from tclib.features.examples import check_acts
from tclib.support.errors import InputError

GAIN = 0.05  # of F1, which something that says more has to bring
MAX_TOKENS, MAX_EARLIER_TOKENS = 40, 12  # of a list at the position, and before it
REACHES = (1, 2, 3, 4, 6, 8, 0)
CLAUSE_PLACES, DOCUMENT_PLACES = (0, 1, 2, 3, 5, 8), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
N_CASES = 3
N_EXTENDED = (8, 4)  # of one part, and of two parts
N_WIDE, WIDE_RECALL = 3, 0.8  # and as many that leave little out, whatever their F1
N_EXTENSIONS = 3  # of each, beside the lists that are fitted to it
Bits: TypeAlias = UInt64[np.ndarray, "..."]  # a table of any rank, of words
Counts: TypeAlias = Int[np.ndarray, "..."]
Shares: TypeAlias = Float[np.ndarray, "..."]
N_COMMON, N_PRECISE, LOOK_BACK, MIN_SHARE = 32, 16, 8, 0.02  # earlier tokens that are tried
N_SPELLINGS, N_STRONGEST, N_PIECES = 2, 20, 10
MIN_LEVEL = 1e-6


class _Found(NamedTuple):
    """Conditions that hold together, and where: a bit a token of a text, without BOS."""

    parts: tuple[Condition, ...]
    holds: Bits

    @property
    def condition(self) -> Condition:
        return self.parts[0] if len(self.parts) == 1 else Every(self.parts)

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def _bits(mask: Bool[Tensor, "*item token"]) -> Bits:
    packed = np.packbits(mask.numpy(), axis=-1)
    padding = [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % 8)]
    words: Bits = np.ascontiguousarray(np.pad(packed, padding)).view(np.uint64)
    return words


def _mask(bits: Bits, n: int) -> Bool[Tensor, "token"]:
    return torch.from_numpy(np.unpackbits(bits.view(np.uint8), count=n)).bool()


def _count(bits: Bits) -> Counts:
    return np.asarray(np.bitwise_count(bits).sum(-1, dtype=np.int64))


def _f1(holds: Bits, active: Bits) -> Shares:
    hits, n_active = _count(holds & active), _count(active)
    return _f1_of(hits, _count(holds), int(n_active))


def _f1_of(hits: Counts, sizes: Counts, n_active: int) -> Shares:
    return np.asarray(2.0 * hits / (sizes + n_active))


class SearchedText:
    """A text as the search reads it: what is the same for all features, computed once.

    Errors: `InputError` for tokens outside the vocabulary, or rows of BOS alone.
    """

    def __init__(self, rows: Int[Tensor, "row pos"], vocabulary: Vocabulary) -> None:
        vocabulary.check(rows)
        self.vocabulary, self.rows = vocabulary, rows.long()
        self.is_text = self.rows != vocabulary.bos_id
        self.tokens = self.rows[self.is_text]
        if not len(self.tokens):
            raise InputError("no token explains any activation: the rows hold BOS alone")
        self.everywhere = _bits(torch.ones_like(self.tokens, dtype=torch.bool))
        self.observed = self.tokens.unique().tolist()
        self.atoms = [one for one in self._atoms() if self._is_telling(one)]

    def flat(self, values: Tensor) -> Tensor:
        """Values by position as values by token, without those at BOS."""
        return values[self.is_text]

    def times(self, where: Bits) -> Int[np.ndarray, "vocabulary"]:
        """How often each token of the vocabulary is there."""
        found = self.tokens[_mask(where, len(self.tokens))]
        return torch.bincount(found, minlength=len(self.vocabulary)).numpy()

    def near(self, here: Bool[Tensor, "row pos"]) -> Bits:
        """For each reach, the tokens which a marked position stands before."""
        away = self.flat(distances(here))
        return _bits(torch.stack([away <= (reach or self.rows.shape[1]) for reach in REACHES]))

    def _atoms(self) -> list[_Found]:
        """Classes here and before, and places."""
        found: list[_Found] = []
        for name in CLASSES:
            here = self.vocabulary.marked(self.rows, name) & self.is_text
            found.append(_Found((OfClass(name),), _bits(self.flat(here))))
            reached = zip(REACHES, self.near(here), strict=True)
            found += [_Found((After(OfClass(name), reach),), near) for reach, near in reached]
        places: list[Condition] = [InClause(0, most) for most in CLAUSE_PLACES]
        places += [InDocument(1, most) for most in DOCUMENT_PLACES]
        for place in places:
            holds = self.flat(place.true(self.rows, self.vocabulary))
            found.append(_Found((place,), _bits(holds)))
        return found

    def _is_telling(self, one: _Found) -> bool:
        return 0 < int(_count(one.holds)) < len(self.tokens)


def best_predicate(
    rows: Int[Tensor, "row pos"] | SearchedText,
    acts: Float[Tensor, "row pos"],
    vocabulary: Vocabulary,
    threshold: float | None = None,
) -> Claim:
    """The claim that explains best where a feature is active, with mean activations as levels.

    Active means above `threshold`: a quarter of the maximum if it is None, as in grading. Whoever searches
    for several features on one text makes its `SearchedText` once. Errors: `InputError` if the feature is
    never active here.
    """
    check_acts(acts, rows.rows if isinstance(rows, SearchedText) else rows)
    text = rows if isinstance(rows, SearchedText) else SearchedText(rows, vocabulary)
    values = text.flat(acts)
    active = _bits(values > (strong_threshold(values) if threshold is None else threshold))
    if not active.any():
        raise InputError("the feature is never active on these rows: nothing to explain")
    cases = [_best_case(text, active, text.everywhere)]
    covered = cases[0].holds
    while len(cases) < N_CASES and _f1(covered, active) < 1 - GAIN and (active & ~covered).any():
        further = _best_case(text, active & ~covered, text.everywhere & ~covered)
        gain = _f1(covered | further.holds, active) - _f1(covered, active)
        if round(float(gain) - GAIN, 9) <= 0:
            break
        cases.append(further)
        covered = covered | further.holds
    return Claim(tuple(_levelled(cases, values)))


def _levelled(cases: Sequence[_Found], values: Float[Tensor, "token"]) -> list[Case]:
    """Each case with the mean activation where it is the first to hold, in shares of the maximum."""
    left, made = torch.ones_like(values, dtype=torch.bool), []
    for case in cases:
        holds = _mask(case.holds, len(values))
        level = float(values[holds & left].mean() / values.max())
        made.append(Case(case.condition, max(level, MIN_LEVEL)))
        left &= ~holds
    return made


# -- one case ----------------------------------------------------------------------------------


class _Problem:
    """What one case is to explain: the `active` tokens among those `within`. All atoms in one table."""

    def __init__(self, text: SearchedText, active: Bits, within: Bits) -> None:
        self.text, self.active, self.n_active = text, active, int(_count(active))
        self.ids, self.near = _earlier_tokens(text, active)
        own = [*_spellings(text, active, within), *self.lists(within), *self.earlier(within)]
        atoms = [*text.atoms, *own]
        self.parts = [one.parts[0] for one in atoms]
        self.holds = np.stack([one.holds for one in atoms])

    def singles(self, within: Bits) -> list[_Found]:
        """Every atom, and every atom negated."""
        held = list(zip(self.parts, self.holds, strict=True))
        found = [_Found((part,), holds & within) for part, holds in held]
        return found + [_Found((Not(part),), within & ~holds) for part, holds in held]

    def extended(self, one: _Found) -> list[_Found]:
        """The best conjunctions with an atom or with the negation of one, and with lists fitted to what is left."""
        inside = np.stack([self.holds & one.holds, ~self.holds & one.holds])
        f1 = _f1(inside, self.active)
        found = []
        for i in (-f1.flatten()).argsort(kind="stable")[:N_EXTENSIONS].tolist():
            negated, at = divmod(i, len(self.parts))
            part = Not(self.parts[at]) if negated else self.parts[at]
            found.append(_Found((*one.parts, part), inside[negated, at]))
        fitted = [*self.lists(one.holds), *self.earlier(one.holds)]
        return found + [_Found((*one.parts, *more.parts), more.holds) for more in fitted]

    def lists(self, where: Bits) -> list[_Found]:
        """The token, and the tokens, that explain best what is active there."""
        n_all, n_hits = self.text.times(where), self.text.times(where & self.active)
        order = np.lexsort((-n_hits, -n_hits / np.maximum(n_all, 1)))[:MAX_TOKENS]
        order = order[n_hits[order] > 0]
        if not len(order):
            return []
        one = int(_f1_of(n_hits, n_all, self.n_active).argmax())
        f1 = _f1_of(n_hits[order].cumsum(), n_all[order].cumsum(), self.n_active)
        found = []
        for ids in ([one], order[: int(f1.argmax()) + 1].tolist()):
            chosen = self.text.vocabulary.listed(ids)
            found.append(_Found((OneOf(frozenset(ids)),), _bits(chosen[self.text.tokens]) & where))
        return found

    def earlier(self, where: Bits) -> list[_Found]:
        """For each reach, the earlier tokens that explain best what is active there."""
        near = self.near & where
        n_all, n_hits = _count(near), _count(near & self.active)
        found = []
        for i, reach in enumerate(REACHES):
            order = (-n_hits[:, i] / np.maximum(n_all[:, i], 1)).argsort(kind="stable")
            order = order[n_hits[order, i] > 0][:MAX_EARLIER_TOKENS]
            if len(order):
                union = np.bitwise_or.accumulate(near[order, i], axis=0)
                n = int(_f1_of(_count(union & self.active), _count(union), self.n_active).argmax())
                ids = frozenset(self.ids[order[: n + 1]].tolist())
                found.append(_Found((After(OneOf(ids), reach),), union[n]))
        return found


def _best_case(text: SearchedText, active: Bits, within: Bits) -> _Found:
    """The simplest conjunction that explains `active`, among tokens `within`."""
    problem = _Problem(text, active, within)
    level = problem.singles(within)
    candidates = list(level)
    for n in N_EXTENDED:
        if _f1(np.stack([one.holds for one in level]), active).max() > 1 - GAIN:
            break  # nothing that says more can bring enough
        level = [more for one in _beam(level, active, n) for more in problem.extended(one)]
        candidates += level
    return _simplest(candidates, active)


def _beam(found: Sequence[_Found], active: Bits, n: int) -> list[_Found]:
    """The `n` of the highest F1, and a few that hold at nearly all active tokens and at few others."""
    holds, n_active = np.stack([one.holds for one in found]), int(_count(active))
    hits, sizes = _count(holds & active), _count(holds)
    wide = np.where(hits >= WIDE_RECALL * n_active, hits / np.maximum(sizes, 1), -1.0)
    chosen: dict[tuple[int, int], int] = {}  # what holds as often and as rightly is the same
    for values, most in ((_f1_of(hits, sizes, n_active), n), (wide, n + N_WIDE)):
        for i in (-values).argsort(kind="stable").tolist():
            if len(chosen) >= most or values[i] <= 0:
                break
            chosen.setdefault((int(hits[i]), int(sizes[i])), i)
    return [found[i] for i in chosen.values()]


def _simplest(found: Sequence[_Found], active: Bits) -> _Found:
    """From the one that says least: of a size the best, of a larger size only for `GAIN` more."""
    f1 = _f1(np.stack([one.holds for one in found]), active).tolist()
    order = sorted(range(len(found)), key=lambda i: (found[i].size, -round(f1[i], 9)))
    best = order[0]
    for i in order[1:]:
        larger = found[i].size > found[best].size
        if round(f1[i] - f1[best] - (GAIN if larger else 0.0), 9) > 0:
            best = i
    return found[best]


# -- atoms of one feature ----------------------------------------------------------------------


def _earlier_tokens(text: SearchedText, active: Bits) -> tuple[Int[np.ndarray, "earlier"], Bits]:
    """Tokens that stand before active ones often, or before few others, and for each reach what they stand before."""
    marked = torch.zeros_like(text.is_text)
    marked[text.is_text] = _mask(active, len(text.tokens))
    n_back, n_vocabulary = min(LOOK_BACK, text.rows.shape[1] - 1), len(text.vocabulary)
    n_before = np.zeros(n_vocabulary, dtype=np.int64)
    for back in range(1, n_back + 1):
        seen = text.rows[:, :-back][marked[:, back:] & text.is_text[:, :-back]]
        n_before += torch.bincount(seen, minlength=n_vocabulary).numpy()
    common = (-n_before).argsort(kind="stable")[:N_COMMON]
    is_often = n_before >= max(1.0, MIN_SHARE * int(_count(active)))
    share = np.where(is_often, n_before / np.maximum(text.times(text.everywhere), 1), -1.0)
    ids = np.unique(np.concatenate([common, (-share).argsort(kind="stable")[:N_PRECISE]]))
    ids = ids[n_before[ids] > 0]
    near = [text.near(text.rows == i) for i in ids.tolist()]
    empty = np.zeros((0, len(REACHES), len(text.everywhere)), dtype=np.uint64)
    return ids, np.stack(near) if near else empty


def _spellings(text: SearchedText, active: Bits, within: Bits) -> list[_Found]:
    """Beginnings, ends and insides that several tokens of the text share, by F1."""
    n_all, n_hits = text.times(within), text.times(within & active)
    found: list[_Found] = []
    n_active = int(_count(active))
    for how, texts, of_token in text.vocabulary.affixes:
        has = of_token.numpy() >= 0
        codes = of_token.numpy()[has]
        hits, sizes, n_types = (
            np.bincount(codes, weights=n[has], minlength=len(texts))
            for n in (n_hits, n_all, n_all > 0)
        )
        f1 = np.where(n_types > 1, 2 * hits / (sizes + n_active), 0.0)
        for i in (-f1).argsort(kind="stable")[:N_SPELLINGS].tolist():
            if f1[i] > 0:
                holds = _bits(of_token[text.tokens] == i)
                found.append(_Found((Spelt(how, texts[i]),), holds))
    return found + _insides(text, n_hits, n_all, n_active)


def _insides(
    text: SearchedText,
    n_hits: Int[np.ndarray, "vocabulary"],
    n_all: Int[np.ndarray, "vocabulary"],
    n_active: int,
) -> list[_Found]:
    """What the strongest tokens have inside, two to four letters long."""
    stripped = text.vocabulary.stripped
    shared: Counter[str] = Counter()
    strongest = (-n_hits).argsort(kind="stable")[:N_STRONGEST]
    for own in (stripped[i] for i in strongest.tolist() if n_hits[i]):
        pieces = {own[at : at + n] for n in (2, 3, 4) for at in range(1, len(own) - n)}
        shared.update(sorted(pieces))
    found: list[tuple[float, str, list[int]]] = []
    for piece, n_sharing in shared.most_common(N_PIECES):
        if n_sharing > 1:
            ids = [i for i in text.observed if piece in stripped[i]]
            f1 = 2 * int(n_hits[ids].sum()) / (int(n_all[ids].sum()) + n_active)
            found.append((f1, piece, ids))
    found.sort(key=lambda one: -one[0])
    return [
        _Found((Spelt("contains", piece),), _bits(text.vocabulary.listed(ids)[text.tokens]))
        for _, piece, ids in found[:N_SPELLINGS]
    ]
