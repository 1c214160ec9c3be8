"""Short texts in which a feature is active or silent, and the questions that are made of them.

The protocol is that of EleutherAI's delphi (Paulo et al. 2024, arXiv 2410.13928): a token is active above 0.3 of the
feature's maximum, active tokens stand between delimiters, sets are balanced and shuffled. Of the variants of fuzzing
this is the harder one: both halves are active contexts, so that only the marks tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.features.examples import check_acts
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count
from tclib.support.errors import InputError
from tclib.support.statistics import ranked

MARKED_SHARE = 0.3  # of the feature's maximum: above it a token is active
OPEN, CLOSE = "<<", ">>"
N_TOKENS, MIN_TOKENS = 32, 4  # of a context
N_LEVELS = 10  # activations are shown as whole numbers up to it

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """A stretch of text, and the feature's activations as shares of its maximum."""

    tokens: tuple[str, ...]
    acts: tuple[float, ...]

    @property
    def active(self) -> tuple[int, ...]:
        """Where the feature is active: above `MARKED_SHARE`."""
        return tuple(i for i, act in enumerate(self.acts) if act > MARKED_SHARE)

    @property
    def silent(self) -> tuple[int, ...]:
        """Where the feature does not fire at all."""
        return tuple(i for i, act in enumerate(self.acts) if act <= 0)

    def text(self, marked: Collection[int] = ()) -> str:
        """The text on one line; each stretch of marked tokens stands between delimiters."""
        parts = []
        for i, token in enumerate(self.tokens):
            opens = i in marked and i - 1 not in marked
            closes = i in marked and i + 1 not in marked
            # A space before a word stays outside.
            space = token[: len(token) - len(token.lstrip(" "))] if opens else ""
            parts += [space, OPEN if opens else "", token[len(space) :], CLOSE if closes else ""]
        return " ".join("".join(parts).split())


@dataclass(frozen=True)
class Contexts:
    """Where a feature is active, strongest first, and where it is silent; what is between is left out."""

    active: tuple[Context, ...]
    silent: tuple[Context, ...]


@checked
def contexts(
    lm: LanguageModel,
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    n_tokens: Count = N_TOKENS,
) -> Contexts:
    """Rows cut at BOS, and into pieces of at most `n_tokens`; pieces of fewer than four tokens are left out.

    Errors: `InputError` for a feature that never fires on these rows.
    """
    check_acts(acts, rows)
    shares = torch.where(rows == lm.bos_id, 0.0, acts.float())
    if not bool((shares > 0).any()):
        raise InputError("the feature never fires on these rows: give more rows, or a live feature")
    shares = shares / shares.max()
    active, silent = [], []
    for row, row_shares in zip(rows, shares, strict=True):
        strings = lm.token_strings(row.tolist())
        for start, end in _pieces((row == lm.bos_id).tolist(), n_tokens):
            found = Context(tuple(strings[start:end]), tuple(row_shares[start:end].tolist()))
            if found.active:
                active.append(found)
            elif len(found.silent) == len(found.acts):
                silent.append(found)
    order = ranked(torch.tensor([max(found.acts) for found in active])) if active else ()
    return Contexts(tuple(active[i] for i in order), tuple(silent))


def _pieces(is_bos: Sequence[bool], n_tokens: int) -> list[tuple[int, int]]:
    """Where pieces begin and end."""
    borders = [-1, *(i for i, is_one in enumerate(is_bos) if is_one), len(is_bos)]
    pieces = [
        (start, min(start + n_tokens, end))
        for before, end in zip(borders, borders[1:], strict=False)
        for start in range(before + 1, end, n_tokens)
    ]
    return [(start, end) for start, end in pieces if end - start >= MIN_TOKENS]


# ---------------------------------------------------------------------------------------------
# Questions


class Item(NamedTuple):
    """A text to be judged, and whether the feature is there (where it is marked, in fuzzing)."""

    text: str
    holds: bool


class Trial(NamedTuple):
    """Texts with marks, and which of them is not the feature's."""

    texts: tuple[str, ...]
    intruder: int


def examples(found: Contexts, n: int) -> tuple[Context, ...]:
    """Active contexts to explain a feature from, evenly over its range. Errors: `InputError` for too few."""
    _check_enough("active", found.active, n)
    step = (len(found.active) - 1) / max(1, n - 1)
    return tuple(found.active[round(i * step)] for i in range(n))


def example_line(context: Context) -> str:
    """A context with marks, and the activations of what is marked, from 0 to 10."""
    levels = [f"{context.tokens[i].strip()!r} {_level(context.acts[i])}" for i in context.active]
    return f"{context.text(context.active)}  (activations: {', '.join(levels)})"


def _level(act: float) -> int:
    return max(1, round(N_LEVELS * act))


def detection_items(found: Contexts, n: int, generator: torch.Generator) -> tuple[Item, ...]:
    """`n` contexts without marks, shuffled, half active. Errors: `InputError` for an odd n, or too few."""
    half = half_of(n)
    active = _drawn("active", found.active, half, generator)
    silent = _drawn("silent", found.silent, half, generator)
    items = [Item(c.text(), True) for c in active] + [Item(c.text(), False) for c in silent]
    return tuple(_shuffled(items, generator))


def fuzzing_items(found: Contexts, n: int, generator: torch.Generator) -> tuple[Item, ...]:
    """`n` active contexts, shuffled: half marked where they are active, half at as many silent tokens.

    Errors: `InputError` for an odd n, or too few contexts with as many silent tokens as active ones.
    """
    half = half_of(n)
    usable = [c for c in found.active if len(c.silent) >= len(c.active)]
    drawn = _drawn("half-silent active", usable, 2 * half, generator)
    items = [Item(c.text(c.active), True) for c in drawn[:half]]
    for context in drawn[half:]:
        wrong = _drawn("silent", context.silent, len(context.active), generator)
        items.append(Item(context.text(wrong), False))
    return tuple(_shuffled(items, generator))


def intruder_trials(
    found: Contexts, n: int, n_others: int, generator: torch.Generator
) -> tuple[Trial, ...]:
    """`n` times `n_others` active contexts, marked, and a silent one marked at as many random tokens.

    Errors: `InputError` for too few contexts.
    """
    intruders = _drawn("silent", found.silent, n, generator)
    trials = []
    for intruder in intruders:
        others = _drawn("active", found.active, n_others, generator)
        n_marked = math.ceil(sum(len(c.active) for c in others) / max(1, n_others))
        n_possible = min(n_marked, len(intruder.silent))
        texts = [c.text(c.active) for c in others]
        place = int(torch.randint(n_others + 1, (1,), generator=generator))
        texts.insert(place, intruder.text(_drawn("", intruder.silent, n_possible, generator)))
        trials.append(Trial(tuple(texts), place))
    return tuple(trials)


def half_of(n: int) -> int:
    """Half of a number of texts. Errors: `InputError` unless it is even, and not 0."""
    if n < 2 or n % 2:
        raise InputError(f"{n} contexts to judge: expected an even number, at least 2")
    return n // 2


def _drawn(what: str, found: Sequence[T], n: int, generator: torch.Generator) -> list[T]:
    _check_enough(what, found, n)
    return _shuffled(found, generator)[:n]


def _shuffled(found: Sequence[T], generator: torch.Generator) -> list[T]:
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def _check_enough(what: str, found: Sequence[object], n: int) -> None:
    if len(found) < n:
        raise InputError(
            f"{n} {what} contexts asked for, but there are {len(found)}: ask for fewer, or give more rows"
        )
