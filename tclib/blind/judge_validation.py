"""Can a judge be believed? On the demo world, where every token's latent is known, it is held to the truth.

A judge is asked about positions of a latent with that latent's name as the explanation, with the name of a latent of
another kind of document, and with none: the same texts in the same order each time. The rule, written before any
result: by a task a judge tells true explanations from wrong ones if its balanced accuracy is surely higher with the
true ones, that is, if the 95 % interval of the difference lies above 0, both over latents (Student's, paired) and over
answers (each accuracy's own interval), and if at most half of its answers could not be read. Otherwise it cannot tell
these apart, and its scores of features say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import pandas as pd
import torch

from tclib.blind.contexts import (
    Contexts,
    Item,
    Trial,
    contexts,
    detection_items,
    fuzzing_items,
    half_of,
    intruder_trials,
)
from tclib.blind.judge import Found, Judge, Judged, Task
from tclib.blind.latents import LabelledRows
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import student_interval

Explanation = Literal["true", "wrong", "none"]
TASKS: tuple[Task, ...] = get_args(Task)
EXPLANATIONS: tuple[Explanation, ...] = get_args(Explanation)
ROLES_THAT_SAY_NOTHING = ("text", "stop")  # every kind has them
MIN_LATENTS = 3  # for an interval over them
MAX_UNPARSED = 0.5
COLUMNS = ["explanation", "task", "accuracy", "low", "high", "chance", "n", "n_unparsed"]

Score: TypeAlias = Judged | Found


class Questions(NamedTuple):
    """All that a judge is asked about one feature or latent, but for explanations."""

    items: Mapping[Task, tuple[Item, ...]]
    trials: tuple[Trial, ...]


@checked
def draw_questions(
    found: Contexts,
    n_items: Count,
    n_trials: Natural,
    generator: torch.Generator,
    n_others: Count = 4,
) -> Questions:
    """Detection, fuzzing and intruder questions. Errors: `InputError` for too few contexts."""
    items: dict[Task, tuple[Item, ...]] = {
        "detection": detection_items(found, n_items, generator),
        "fuzzing": fuzzing_items(found, n_items, generator),
    }
    return Questions(items, intruder_trials(found, n_trials, n_others, generator))


@dataclass(frozen=True)
class Distinction:
    """Whether a judge tells true explanations from wrong ones, by one task."""

    task: Task
    true: float
    wrong: float
    low: float
    high: float
    tells: bool

    def __str__(self) -> str:
        said = "tells these apart" if self.tells else "cannot tell these apart"
        difference = f"{self.true - self.wrong:+.2f}, {self.low:+.2f} to {self.high:+.2f}"
        return (
            f"{self.task}: {self.true:.2f} with true explanations, {self.wrong:.2f} with wrong ones ({difference}): "
            f"the judge {said}"
        )


@dataclass(frozen=True)
class Validation:
    """A judge on known latents: pooled, latent by latent, and what follows."""

    table: pd.DataFrame
    by_latent: pd.DataFrame
    distinctions: tuple[Distinction, ...]


@checked
def validate_judge(
    judge: Judge,
    lm: LanguageModel,
    labelled: LabelledRows,
    generator: torch.Generator,
    n_latents: Count = 6,
    n_items: Count = 10,
    n_trials: Natural = 5,
) -> Validation:
    """Hold a judge to known latents, by the rule above.

    Args:
        judge: whose answers.
        lm, labelled: the model whose tokens these are, and rows with a latent a position.
        generator: draws latents and texts.
        n_latents: at least three, each of another kind of document.
        n_items: texts a latent for detection, and for fuzzing; even.
        n_trials: intruder questions a latent.

    Errors: `InputError` for too few latents with enough texts; those of the judge.
    """
    if n_latents < MIN_LATENTS:
        raise InputError(
            f"n_latents {n_latents}: expected at least {MIN_LATENTS}, for an interval over them"
        )
    half_of(n_items)
    drawn = _drawn_latents(lm, labelled, generator, n_latents, n_items, n_trials)
    names = list(drawn)
    scores: list[tuple[str, Explanation, str, Score]] = []
    for i, (latent, questions) in enumerate(
        progress(list(drawn.items()), "latents", unit="latent")
    ):
        wrong = names[(i + 1) % len(names)]
        said = {"true": latent_in_words(latent), "wrong": latent_in_words(wrong), "none": None}
        scores += [(latent, *line) for line in _judged(judge, questions, said)]
    by_latent = pd.DataFrame([{"latent": line[0], **_line(*line[1:])} for line in scores])
    pooled: dict[tuple[Explanation, str], Score] = {}
    for _, explanation, task, score in scores:
        place = (explanation, task)
        pooled[place] = reduce(add, [pooled[place], score]) if place in pooled else score
    table = pd.DataFrame([_line(*place, score) for place, score in pooled.items()])[COLUMNS]
    return Validation(
        table, by_latent, tuple(distinction(task, table, by_latent) for task in TASKS)
    )


def latent_in_words(name: str) -> str:
    """`year_range.second_yy` as an explanation."""
    kind, role = name.replace("_", " ").split(".")
    return f"the {role} in a text of the kind {kind!r}"


def _drawn_latents(
    lm: LanguageModel,
    labelled: LabelledRows,
    generator: torch.Generator,
    n_latents: int,
    n_items: int,
    n_trials: int,
) -> dict[str, Questions]:
    """Latents in random order, no kind and no role twice, that occur in enough texts, with their questions."""
    drawn: dict[str, Questions] = {}
    parts: set[str] = set()
    for code in torch.randperm(len(labelled.names), generator=generator).tolist():
        name = labelled.names[code]
        kind, role = name.split(".")
        marked = (labelled.label == code).float()
        is_rare = int(marked.sum()) < n_items  # fuzzing takes as many active texts
        if role in ROLES_THAT_SAY_NOTHING or parts & {kind, role} or is_rare:
            continue
        try:
            found = contexts(lm, labelled.rows, marked)
            drawn[name] = draw_questions(found, n_items, n_trials, generator)
        except InputError:  # too few texts
            continue
        parts |= {kind, role}
        if len(drawn) == n_latents:
            return drawn
    raise InputError(
        f"{n_latents} latents asked for, but {len(drawn)} kinds of document have one in enough texts: ask for "
        "fewer latents or items, or give more rows"
    )


def _judged(
    judge: Judge, questions: Questions, said: Mapping[Any, str | None]
) -> Iterator[tuple[Explanation, str, Score]]:
    for explanation in EXPLANATIONS:
        for task in TASKS:
            yield explanation, task, judge.judge(task, said[explanation], questions.items[task])
    if questions.trials:
        yield "none", "intruder", judge.find_intruders(questions.trials)


def _line(explanation: str, task: str, score: Score) -> dict[str, Any]:
    return {"explanation": explanation, "task": task, **score_line(score)}


def score_line(score: Score) -> dict[str, Any]:
    """A score as a table has it: accuracy, low, high, chance, n, n_unparsed."""
    low, high = score.interval
    n, chance = (
        (score.n, score.chance) if isinstance(score, Found) else (score.n + score.n_without, 0.5)
    )
    values = {"accuracy": score.accuracy, "low": low, "high": high, "chance": chance}
    return {**values, "n": n, "n_unparsed": score.n_unparsed}


def distinction(task: Task, table: pd.DataFrame, by_latent: pd.DataFrame) -> Distinction:
    """The rule, for one task: from pooled accuracies and those latent by latent."""
    lines = table[table["task"] == task].to_dict("records")
    pooled: dict[str, Any] = {line["explanation"]: line for line in lines}
    true, wrong = pooled["true"], pooled["wrong"]
    each = by_latent[by_latent["task"] == task].pivot(
        index="latent", columns="explanation", values="accuracy"
    )
    differences = (each["true"] - each["wrong"]).dropna().to_numpy()
    low, high = _over_answers(true, wrong)
    if len(differences) >= MIN_LATENTS:
        _, low_over, high_over = student_interval(differences)
        low, high = min(low, low_over), max(high, high_over)
    else:
        low, high = -1.0, 1.0
    n_unparsed = true["n_unparsed"] + wrong["n_unparsed"]
    is_read = n_unparsed <= MAX_UNPARSED * (true["n"] + wrong["n"] + n_unparsed)
    tells = bool(low > 0 and is_read)
    return Distinction(task, true["accuracy"], wrong["accuracy"], low, high, tells)


def _over_answers(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies from theirs, joined as Newcombe joins shares'."""
    value, low, high = (float(one[name]) for name in ("accuracy", "low", "high"))
    value_2, low_2, high_2 = (float(other[name]) for name in ("accuracy", "low", "high"))
    below = math.hypot(value - low, high_2 - value_2)
    above = math.hypot(high - value, value_2 - low_2)
    return value - value_2 - below, value - value_2 + above
