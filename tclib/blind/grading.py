"""A hypothesis against the feature on text that the study did not hold, between a floor and a ceiling.

Rules of a grade, written before any result. Active means above a quarter of the maximum on the held-out text:

    success    F1 at or above 0.6, and correlation of prediction and activation at or above 0.4
    mostly     F1 at or above 0.3, or correlation at or above 0.4
    failure    the rest; also what is not above the floor, where there is one

The floor is the best F1 of a hundred random hypotheses of the same shape (`floor`), the ceiling that of the
sighted search (`search`) on the study's text, scored on the held-out text as the hypothesis is. A study whose ceiling
lies below `MOSTLY_F1` has no power: the language cannot say what the feature is, whoever looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.floor import floor_f1
from tclib.blind.language import Condition, from_predicate
from tclib.blind.predicates import Predicate, Score, score
from tclib.blind.vocabulary import Vocabulary
from tclib.evaluation.metrics import strong_threshold
from tclib.features.examples import check_acts

Grade = Literal["success", "mostly", "failure"]
SUCCESS_F1, MOSTLY_F1 = 0.6, 0.3
# Of a success too: who lists the right tokens but not how strong they are may still pass, at an F1 of 0.6.
MIN_CORRELATION = 0.4


@dataclass(frozen=True)
class Graded:
    """A hypothesis against the feature on held-out text; NaN where there is no ceiling, or no floor."""

    score: Score
    grade: Grade
    threshold: float
    ceiling: float = math.nan
    floor: float = math.nan

    @property
    def has_power(self) -> bool:
        """Whether the language could have said it: a failure below such a ceiling is not the study's."""
        return not self.ceiling < MOSTLY_F1

    @property
    def share_of_ceiling(self) -> float:
        """Where F1 lies between floor (0) and ceiling (1); NaN without both, or if they are the same."""
        height = self.ceiling - self.floor
        return (self.score.f1 - self.floor) / height if height > 0 else math.nan


def grade_predicate(
    predicate: Predicate | Condition,
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    vocabulary: Vocabulary,
    *,
    best: Condition | None = None,
    n_random: int = 0,
    generator: torch.Generator | None = None,
) -> Graded:
    """Score a predicate on text that the study did not see, and grade it by the rules above.

    Args:
        predicate: three sets of tokens, or a condition of the language, which may predict levels.
        rows, acts: the held-out text, and the feature's activations there.
        vocabulary: that of the model.
        best: what the sighted search found on the study's text: the ceiling.
        n_random, generator: how many random hypotheses the floor is the best of; none, no floor. A
            hundred is what the rules say (`floor.N_RANDOM`).

    Errors: `InputError` if the feature never fires there, or for tokens that the vocabulary does not have.
    """
    check_acts(acts, rows)
    threshold, text = strong_threshold(acts), rows != vocabulary.bos_id
    said = from_predicate(predicate) if isinstance(predicate, Predicate) else predicate
    found = score(said.predicted(rows, vocabulary), acts, text, threshold)
    floor = math.nan
    if n_random:
        floor = floor_f1(said, rows, acts, vocabulary, threshold, n_random, generator)
    ceiling = math.nan
    if best is not None:
        ceiling = score(best.predicted(rows, vocabulary), acts, text, threshold).f1
    return Graded(found, grade_of(found, floor), threshold, ceiling, floor)


def grade_of(found: Score, floor: float = math.nan) -> Grade:
    """The grade of a score, and of one no better than random hypotheses of its shape."""
    if found.f1 <= floor:
        return "failure"
    if found.f1 >= SUCCESS_F1 and found.correlation >= MIN_CORRELATION:
        return "success"
    is_mostly = found.f1 >= MOSTLY_F1 or found.correlation >= MIN_CORRELATION
    return "mostly" if is_mostly else "failure"


def active_positions(acts: Float[Tensor, "row pos"]) -> Tensor:
    """Where a feature counts as active when grading."""
    return acts > strong_threshold(acts)
