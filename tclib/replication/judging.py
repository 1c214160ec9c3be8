"""A language model as judge: first held to the demo world's known latents, then asked about a run's features.

validation.csv  a line an explanation (true, wrong, none) and task, pooled over latents
by_latent.csv   the same latent by latent
judged.csv      a line a feature of step 05: its explanation and scores
answers/        every answer, so that the same command asks nothing twice
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tclib.blind.contexts import contexts, examples
from tclib.blind.judge import Judge
from tclib.blind.judge_validation import (
    TASKS,
    Validation,
    draw_questions,
    score_line,
    validate_judge,
)
from tclib.blind.latents import labelled_rows
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.examples import feature_activations
from tclib.models.language_model import LanguageModel
from tclib.replication.comparison import STEP, comparison_pair
from tclib.replication.run import Run
from tclib.support.declared import Count, Natural, declared
from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.support.progress import progress
from tclib.support.steps import MANIFEST

ANSWERS = "answers"  # a folder of `out`
N_ROWS, N_CTX = 256, 64  # of the demo world
N_EXPLAINED = 10  # examples that an explanation is made from


@declared(frozen=True)
class Asked:
    """How much a judge is asked about one feature or latent."""

    n_items: Count = 10
    """Texts for detection, and for fuzzing; even."""
    n_trials: Natural = 5
    """Intruder questions."""


def validate(judge: Judge, out: Path, n_latents: int, asked: Asked, seed: int) -> Validation:
    """The judge on the bundled GPT-2's demo world; its tables go into `out`."""
    lm = LanguageModel.load("demo")
    labelled = labelled_rows(lm, N_ROWS, N_CTX, seed)
    generator = torch.Generator().manual_seed(seed)
    found = validate_judge(judge, lm, labelled, generator, n_latents, asked.n_items, asked.n_trials)
    save_table(found.table, out / "validation.csv")
    save_table(found.by_latent, out / "by_latent.csv")
    return found


def check_compared(run: Run) -> None:
    """Raise `InputError` unless the run has compared features, which takes long."""
    step = run.step(STEP)
    if not (step.folder / MANIFEST).is_file():
        raise InputError(f"{step.folder} holds no comparison: run `{step.command}` first")


def judge_run(run: Run, judge: Judge, out: Path, n_features: int, asked: Asked) -> pd.DataFrame:
    """The first features of step 05 in its shuffled order, judged without their origin.

    Explained on one text, scored on another. Errors: `InputError` without step 05.
    """
    check_compared(run)
    comparison, config = run.comparison, run.preset.comparison
    pair = comparison_pair(run)
    rows = run.corpus.train[: config.n_rows]
    held_out = run.corpus.evaluation[: config.n_held_out_rows]
    lines = []
    shown = comparison.items.head(n_features)[["number", "feature"]].itertuples(
        index=False, name=None
    )
    for number, feature in progress(list(shown), "features", unit="feature"):
        kind = comparison.origin[number]
        generator = torch.Generator().manual_seed(run.preset.seed + int(number))
        judged = judge_feature(
            run.lm, pair[kind], feature, (rows, held_out), judge, asked, generator
        )
        lines.append({"number": number, "kind": kind, "feature": feature, **judged})
    table = pd.DataFrame(lines)
    save_table(table, out / "judged.csv")
    return table


def judge_feature(
    lm: LanguageModel,
    dictionary: Dictionary,
    feature: int,
    texts: Sequence[Int[Tensor, "row pos"]],
    judge: Judge,
    asked: Asked,
    generator: torch.Generator,
) -> dict[str, Any]:
    """One feature, explained on the first text and scored on the second; `left_out` says why it was not."""
    try:
        known, held_out = (
            contexts(lm, rows, feature_activations(lm, dictionary, [feature], rows)[0])
            for rows in texts
        )
        questions = draw_questions(held_out, asked.n_items, asked.n_trials, generator)
        shown = examples(known, min(N_EXPLAINED, len(known.active)))
    except InputError as error:
        return {"explanation": "", "left_out": str(error)}
    explanation = judge.explain(shown)
    line: dict[str, Any] = {"explanation": explanation or "", "left_out": ""}
    scores = {task: judge.judge(task, explanation, questions.items[task]) for task in TASKS}
    for task, score in scores.items():
        line |= {f"{task}_{name}": value for name, value in score_line(score).items()}
    if questions.trials:
        intruder = score_line(judge.find_intruders(questions.trials))
        line |= {f"intruder_{name}": value for name, value in intruder.items()}
    return line


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all."""
    with new_file(path) as temporary:
        table.to_csv(temporary, index=False)
