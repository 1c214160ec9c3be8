"""From a list of tokens to what they have in common: what a blind study may conclude from weights alone.

A de-embedding lists tokens with scores. Where most of them are numbers, or end in "ing", the hypothesis that the
feature reads numbers, or words in "ing", says more than the list, and holds for tokens that the list does not
reach. Nothing here has seen a text: the vocabulary and the scores are all there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tclib.blind.language import Condition, OfClass, Spelt
from tclib.blind.vocabulary import CLASSES, MAX_AFFIX, Spelling, Vocabulary
from tclib.support.errors import InputError
from tclib.support.statistics import auroc

MIN_SEPARATION = 0.5
MIN_TOKENS = 3  # that are listed and of the class: two may agree by chance
N_PROPOSED = 5


class Proposal(NamedTuple):
    """A condition, and how well it separates the tokens that score high from the others.

    `covered` is the share of the listed tokens' scores that it holds, `separation` what it is chosen by.
    """

    condition: Condition
    separation: float
    covered: float


def generalise(
    token_scores: Mapping[int, float],
    vocabulary: Vocabulary,
    full_scores: Float[Tensor, "token"] | None = None,
    least: float = MIN_SEPARATION,
    n: int = N_PROPOSED,
) -> list[Proposal]:
    """Classes, beginnings, ends and insides that explain a list of high-scoring tokens, the best first.

    By separation: the share of the listed scores that a class covers, less the share of all other tokens
    that it holds. With scores of the whole vocabulary: that share times 2 AUROC − 1, by which the
    class's tokens score higher than the others. At `least` that, and of what holds for the same tokens the
    longest spelling. Classes that look at earlier tokens are taken as they are without any. Errors:
    `InputError` for a list without a positive score, an id outside the vocabulary, or scores of another one.
    """
    high = {i: score for i, score in token_scores.items() if score > 0 and i != vocabulary.bos_id}
    if not high:
        raise InputError("token scores without one above 0: expected those of a de-embedding's top")
    if full_scores is not None and full_scores.shape != (len(vocabulary),):
        raise InputError(
            f"full scores of {len(full_scores)} tokens: the vocabulary has {len(vocabulary)}"
        )
    weights = torch.zeros(len(vocabulary), dtype=torch.float64)
    is_listed = vocabulary.listed(high)
    for i, score in high.items():
        weights[i] = score
    found: dict[bytes, Proposal] = {}
    for condition, mask in _candidates(high, vocabulary):
        if int((mask & is_listed).sum()) < min(MIN_TOKENS, len(high)):
            continue
        covered = float(weights[mask].sum() / weights.sum())
        separation = covered * _above(mask, full_scores)
        if full_scores is None:
            separation = covered - float(mask[~is_listed].double().mean().nan_to_num())
        if separation >= least:
            found.setdefault(mask.numpy().tobytes(), Proposal(condition, separation, covered))
    return sorted(found.values(), key=lambda one: -round(one.separation, 9))[:n]


def _above(mask: Bool[Tensor, "token"], full_scores: Float[Tensor, "token"] | None) -> float:
    """2 AUROC − 1: how surely a token of the class scores higher than another one."""
    if full_scores is None:
        return 1.0
    return 2 * auroc(full_scores.double().numpy(), mask.numpy()) - 1


def _candidates(
    high: Mapping[int, float], vocabulary: Vocabulary
) -> list[tuple[Condition, Bool[Tensor, "token"]]]:
    """Classes first, then the spellings that several of the tokens share, longer ones first."""
    found: list[tuple[Condition, Bool[Tensor, "token"]]] = [
        (OfClass(name), vocabulary.of_class(name)) for name in CLASSES if name != "word inside"
    ]
    shared: Counter[tuple[Spelling, str]] = Counter()
    for i in high:
        shared.update(_spellings(vocabulary.stripped[i]))
    common = [one for one, n in shared.items() if n >= max(2, len(high) // 3)]
    for how, text in sorted(common, key=lambda one: (-len(one[1]), one)):
        found.append((Spelt(how, text), vocabulary.spelt(how, text)))
    return found


def _spellings(text: str) -> set[tuple[Spelling, str]]:
    lengths = range(1, min(MAX_AFFIX + 2, len(text)) + 1)
    found: set[tuple[Spelling, str]] = {("begins", text[:n]) for n in lengths}
    found |= {("ends", text[-n:]) for n in lengths}
    inside = (2, 3, 4)
    return found | {
        ("contains", text[at : at + n]) for n in inside for at in range(1, len(text) - n)
    }
