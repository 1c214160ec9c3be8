"""A greater-than task on random tokens, for the tiny models."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import random_rows

from tclib.greater_than.task import GreaterThan


def make_task(n_prompts: int = 12, n_answers: int = 9) -> GreaterThan:
    """Random prompts whose 'numbers' are 1 to 12 and whose answers are tokens 20 to 28."""
    numbers = tuple(range(1, n_prompts + 1))
    answers = tuple(range(0, 2 * n_answers, 2))
    greater = torch.tensor(answers)[None, :] > torch.tensor(numbers)[:, None]
    return GreaterThan(
        "years",
        random_rows(n_prompts, 6).long(),
        numbers,
        (0,) * n_prompts,
        3,
        torch.arange(20, 20 + n_answers),
        answers,
        greater,
    )


def in_two_sentences(task: GreaterThan) -> GreaterThan:
    """The same prompts, the later half of them as if of another sentence."""
    half = len(task.numbers) // 2
    return replace(task, template_idx=(0,) * half + (1,) * (len(task.numbers) - half))
