"""A hypothesis against the feature on text that the study did not hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from tclib.blind.predicates import Predicate, Score, score
from tclib.evaluation.metrics import strong_threshold

Grade = Literal["success", "mostly", "failure"]
SUCCESS_F1, MOSTLY_F1, MOSTLY_AUROC = 0.6, 0.3, 0.9


@dataclass(frozen=True)
class Graded:
    """A hypothesis against the feature on held-out text."""

    score: Score
    grade: Grade
    threshold: float


def grade_predicate(
    predicate: Predicate, rows: Int[Tensor, "row pos"], acts: Float[Tensor, "row pos"], bos_id: int
) -> Graded:
    """Score a predicate on text that the study did not see, and grade it.

    Active means above a quarter of the maximum there. Success: F1 at least 0.6. Mostly: F1 at least
    0.3, or AUROC at least 0.9. Else failure. Errors: `InputError` if the feature never fires there.
    """
    threshold = strong_threshold(acts)
    found = score(predicate.holds(rows, bos_id), acts, rows != bos_id, threshold)
    if found.f1 >= SUCCESS_F1:
        grade: Grade = "success"
    elif found.f1 >= MOSTLY_F1 or found.auroc >= MOSTLY_AUROC:
        grade = "mostly"
    else:
        grade = "failure"
    return Graded(found, grade, threshold)


def active_positions(acts: Float[Tensor, "row pos"]) -> Tensor:
    """Where a feature counts as active when grading."""
    return acts > strong_threshold(acts)
