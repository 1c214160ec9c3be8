"""A language model judges features: it explains them, and is held to what its explanations predict.

Four tasks, as in EleutherAI's delphi (`contexts` says how questions are made of text):

    explanation  from marked examples with activations, one sentence
    detection    which contexts hold what the explanation says: balanced accuracy
    fuzzing      in which contexts the marked tokens are what it says: balanced accuracy
    intruder     which of k + 1 marked contexts is not the feature's: accuracy, chance 1 / (k + 1)

An answer that cannot be read counts neither as right nor as wrong, and is reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

from tclib.blind.contexts import CLOSE, OPEN, Context, Item, Trial, example_line
from tclib.blind.endpoint import Asks, Prompt
from tclib.support.checked import checked
from tclib.support.declared import Count
from tclib.support.errors import InputError
from tclib.support.statistics import newcombe_interval, wilson_interval

Task = Literal["detection", "fuzzing"]
EXPLANATION_TOKENS = 100
INTRUDER_TOKENS = 16
MAX_EXPLANATION = 500  # characters

MARKS = f"Some tokens are marked: {OPEN}like this{CLOSE}."
SYSTEM = "You study texts closely and answer exactly in the form that you are asked for."
EXPLAIN = (
    "A feature of a language model is active on the marked tokens of the texts below. "
    f"{MARKS} Each text is followed by how strongly, from 1 to 10.\n\n{{texts}}\n\n"
    "What do the marked tokens have in common? Answer with one short sentence and nothing else."
)
QUESTIONS: dict[Task, str] = {
    "detection": (
        "Feature: {explanation}\n\nFor each text below: is the feature anywhere in it?\n\n{texts}\n\n"
    ),
    "fuzzing": (
        f"Feature: {{explanation}}\n\n{MARKS} For each text below: are the marked tokens those that "
        "the feature describes?\n\n{texts}\n\n"
    ),
}
# Without a sample, which a judge that only repeats would be taken at.
FORM = (
    "Answer with a list of {n} numbers in brackets, with commas between them, one a text, 1 for yes and 0 for no, "
    "and nothing else."
)
INTRUDER = (
    f"{MARKS} In all texts below but one the marked tokens have something in common.\n\n{{texts}}\n\n"
    "Which text is the odd one out? Answer with its number in brackets and nothing else."
)
NO_EXPLANATION = "(not described)"


@dataclass(frozen=True)
class Judged:
    """How often a judge was right, where the feature is and where it is not; `+` pools two of them."""

    n_right: int = 0
    n: int = 0
    n_right_without: int = 0
    n_without: int = 0
    n_unparsed: int = 0

    def __add__(self, other: Judged) -> Judged:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Judged(*(one + another for one, another in pairs))

    @property
    def accuracy(self) -> float:
        """Balanced: the mean of both shares of right answers; NaN where one side has no answer."""
        if not (self.n and self.n_without):
            return float("nan")
        return (self.n_right / self.n + self.n_right_without / self.n_without) / 2

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the balanced accuracy (Newcombe's, of hits less false alarms, by Wilson's); (0, 1) for none.

        The answers count as independent, which those on one feature are not quite.
        """
        if not (self.n and self.n_without):
            return 0.0, 1.0
        n_alarms = self.n_without - self.n_right_without
        low, high = newcombe_interval(self.n_right, self.n, n_alarms, self.n_without)
        return (1 + low) / 2, (1 + high) / 2


@dataclass(frozen=True)
class Found:
    """How often a judge found the intruder; `+` pools two of them."""

    n_right: int
    n: int
    chance: float
    n_unparsed: int = 0

    def __add__(self, other: Found) -> Found:
        if self.chance != other.chance:
            raise InputError(
                f"chances {self.chance:g} and {other.chance:g}: expected one number of texts"
            )
        unparsed = self.n_unparsed + other.n_unparsed
        return Found(self.n_right + other.n_right, self.n + other.n, self.chance, unparsed)

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN for none."""
        return self.n_right / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson); (0, 1) for none."""
        return wilson_interval(self.n_right, self.n)


class Judge:
    """A model that judges features.

    Args:
        asker: whom to ask.
        n_shown: contexts in one prompt of detection and fuzzing; more cost less, and are harder.

    Errors: `InputError` for fewer than one.
    """

    @checked
    def __init__(self, asker: Asks, n_shown: Count = 5) -> None:
        self.asker, self.n_shown = asker, n_shown

    def explain(self, examples: Sequence[Context]) -> str | None:
        """One sentence on what a feature is active on; None if the answer is empty."""
        texts = _numbered(map(example_line, examples))
        said = self.asker.ask(Prompt(SYSTEM, EXPLAIN.format(texts=texts), EXPLANATION_TOKENS))
        lines = [line.strip(' "*\t') for line in said.splitlines()]
        sentence = next((line for line in lines if line), "")
        return sentence.removeprefix("Explanation:").strip()[:MAX_EXPLANATION] or None

    def judge(self, task: Task, explanation: str | None, items: Sequence[Item]) -> Judged:
        """Detection or fuzzing, by an explanation or without one."""
        batches = [items[i : i + self.n_shown] for i in range(0, len(items), self.n_shown)]
        return reduce(add, (self._batch(task, explanation, batch) for batch in batches), Judged())

    def _batch(self, task: Task, explanation: str | None, batch: Sequence[Item]) -> Judged:
        n = len(batch)
        question = QUESTIONS[task] + FORM
        user = question.format(
            explanation=explanation or NO_EXPLANATION,
            texts=_numbered(item.text for item in batch),
            n=n,
        )
        said = parse_list(self.asker.ask(Prompt(SYSTEM, user, 8 + 4 * n)), n)
        if said is None:
            return Judged(n_unparsed=n)
        with_it = [answer for answer, item in zip(said, batch, strict=True) if item.holds]
        without = [answer for answer, item in zip(said, batch, strict=True) if not item.holds]
        return Judged(sum(with_it), len(with_it), without.count(False), len(without))

    def find_intruders(self, trials: Sequence[Trial]) -> Found:
        """Intruder detection. Errors: `InputError` for trials of different numbers of texts, or none."""
        sizes = {len(trial.texts) for trial in trials}
        if len(sizes) != 1:
            raise InputError(
                f"{len(trials)} trials of {sorted(sizes)} texts: expected one number of texts"
            )
        (n_texts,) = sizes
        said = [self._intruder(trial) for trial in trials]
        pairs = zip(said, trials, strict=True)
        n_right = sum(answer == trial.intruder for answer, trial in pairs)
        n_unparsed = said.count(None)
        return Found(n_right, len(said) - n_unparsed, 1 / n_texts, n_unparsed)

    def _intruder(self, trial: Trial) -> int | None:
        user = INTRUDER.format(texts=_numbered(trial.texts))
        said = self.asker.ask(Prompt(SYSTEM, user, INTRUDER_TOKENS))
        return parse_number(said, len(trial.texts))


NUMBERED = re.compile(r"(\d{1,3})[.):] *(yes|no|1|0)[.,;]?", re.IGNORECASE)


def _numbered(texts: Iterable[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def parse_list(said: str, n: int) -> list[bool] | None:
    """The last list of n ones and zeros in an answer, or one that is nothing but them, or n numbered lines of yes or no.

    None for anything else.
    """
    for inside in reversed(re.findall(r"\[([^\[\]]*)\]", said)):
        values = re.split(r"[\s,;]+", inside.strip())
        if len(values) == n and set(values) <= {"0", "1"}:
            return [value == "1" for value in values]
    values = re.split(r"[\s,;]+", said.strip().rstrip("."))
    if len(values) == n and set(values) <= {"0", "1"}:
        return [value == "1" for value in values]
    lines = [NUMBERED.fullmatch(line.strip()) for line in said.strip().splitlines()]
    numbers = [line and int(line[1]) for line in lines]
    if numbers == list(range(1, n + 1)):
        return [line is not None and line[2].lower() in ("yes", "1") for line in lines]
    return None


def parse_number(said: str, n: int) -> int | None:
    """Which of n texts an answer names, from 0: the last number in brackets, or the only number; else None."""
    found = re.findall(r"\[(\d{1,3})\]", said)[-1:] or re.findall(r"\d+", said)
    if len(found) != 1 or not 1 <= int(found[0][:6]) <= n:
        return None
    return int(found[0][:6]) - 1
