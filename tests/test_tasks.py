"""The greater-than metric on hand-made probability tables."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_lm

from tclib.lm import LanguageModel
from tclib.runs import InputError
from tclib.tasks import GreaterThan, mean_probability_difference, probability_differences


def test_differences_by_hand() -> None:
    table = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    torch.testing.assert_close(probability_differences(table), torch.tensor([0.8, -1.0, -1.0]))


def test_a_perfect_and_a_uniform_table() -> None:
    perfect = torch.triu(torch.ones(100, 100), diagonal=1)
    perfect = perfect / perfect.sum(1, keepdim=True).clamp_min(1)
    assert probability_differences(perfect)[1:99].mean().item() == pytest.approx(1.0)
    uniform = torch.full((100, 100), 0.01)
    assert probability_differences(uniform)[1:99].mean().item() == pytest.approx(-0.01, abs=1e-6)


def test_prompts_end_in_the_century_and_answers_are_the_years() -> None:
    lm = LanguageModel.load("demo")
    task = GreaterThan.of(lm)
    assert lm.tokenizer.decode(task.tokens[35]).endswith("1735 to the year 17")
    assert lm.token_strings(task.answer_ids[[0, 35, 99]]) == ["00", "35", "99"]
    assert 0.8 <= mean_probability_difference(lm, task) <= 1.0


def test_models_without_year_tokens_are_refused() -> None:
    with pytest.raises(InputError):
        GreaterThan.of(tiny_lm())
    lm = LanguageModel.load("demo")
    with pytest.raises(InputError, match="lengths"):
        GreaterThan.of(lm, "The war lasted from the year 17{yy:d} the")
