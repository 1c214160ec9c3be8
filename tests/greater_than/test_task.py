"""The greater-than metric on hand-made tables; every trap of tokenisation is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_hf_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tclib.greater_than.task import (
    DEMO_TEMPLATE,
    GreaterThan,
    full_vocabulary_differences,
    mean_probability_difference,
)
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError

YEARS = [f"{year:02d}" for year in range(100)]


def year_lm(merged: tuple[str, ...] = (), missing: tuple[str, ...] = ()) -> LanguageModel:
    """A tiny model whose tokenizer cuts after 17, save for `merged` words; `missing` are unknown."""
    words = ["<bos>", "<unk>", "from", "to", "17", *[y for y in YEARS if y not in missing], *merged]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    keep = "|".join(merged) or "nothing at all"
    pattern = rf"{keep}|17|\d\d|\w+"
    split = pre_tokenizers.Split(_regex(pattern), "removed", invert=True)
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
    model = tiny_hf_model("gpt2")
    model.resize_token_embeddings(len(vocabulary))
    return LanguageModel(model, fast, "years")


def _regex(pattern: str) -> object:
    from tokenizers import Regex

    return Regex(pattern)


TEMPLATE = "from 17{yy:02d} to 17"


def test_differences_by_hand() -> None:
    task = GreaterThan.of(year_lm(), TEMPLATE).subset([0, 1, 98])
    small = replace(
        task, answer_ids=task.answer_ids[:3], answers=(0, 1, 2), is_greater=task.is_greater[:, :3]
    )
    table = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    torch.testing.assert_close(small.differences(table), torch.tensor([0.8, -1.0, -1.0]))
    stacked = small.differences(torch.stack([table, table]))
    assert stacked.shape == (2, 3)


def test_a_perfect_and_a_uniform_table() -> None:
    task = GreaterThan.of(year_lm(), TEMPLATE)
    perfect = task.is_greater / task.is_greater.sum(1, keepdim=True).clamp_min(1)
    scored = task.is_scored
    assert scored.sum() == 98 and not scored[0] and not scored[99]
    assert task.differences(perfect)[scored].mean().item() == pytest.approx(1.0)
    uniform = torch.full((100, 100), 0.01)
    assert task.differences(uniform)[scored].mean().item() == pytest.approx(-0.01, abs=1e-6)


def test_prompts_end_in_the_century_and_answers_are_the_years() -> None:
    lm = LanguageModel.load("demo")
    task = GreaterThan.of(lm)
    assert lm.tokenizer.decode(task.tokens[35]).endswith("1735 to the year 17")
    assert lm.token_strings(task.answer_ids[[0, 35, 99]]) == ["00", "35", "99"]
    assert lm.token_strings(task.tokens[35, [task.subject_pos]]) == ["35"]
    assert (task.form, task.left_out) == ("years", {})
    assert 0.8 <= mean_probability_difference(lm, task) <= 1.0
    full = full_vocabulary_differences(lm, task.scored()).mean()
    assert 0.7 < float(full) < mean_probability_difference(lm, task)


def test_several_templates_stand_one_after_the_other() -> None:
    lm = LanguageModel.load("demo")
    task = GreaterThan.of(lm, [DEMO_TEMPLATE, DEMO_TEMPLATE.replace("war", "siege")])
    assert len(task.tokens) == 200 and task.prompt_index(35, 1) == 135
    assert task.scored().template_idx.count(1) == 98
    with pytest.raises(InputError, match="expected the same for all"):
        GreaterThan.of(lm, [DEMO_TEMPLATE, "The war ran from 17{yy:02d} to 17"])


def test_merged_years_are_left_out_and_named() -> None:
    task = GreaterThan.of(year_lm(merged=("1776",)), TEMPLATE)
    assert task.left_out == {"'from 1776 to 17'": "5 tokens where the others have 6"}
    assert len(task.numbers) == 99 and 76 not in task.numbers
    assert [tokens.tolist() for tokens in task.misfits] == [
        year_lm(merged=("1776",)).tokenize("from 1776 to 17").tolist()
    ]
    with pytest.raises(InputError, match="no prompt for 76"):
        task.prompt_index(76)


def test_answers_that_merge_or_are_unknown_are_left_out_and_named() -> None:
    lm = year_lm(missing=("42",))
    with pytest.raises(InputError, match="99 of the tokens '00' to '99' after 'from 1750 to 17'"):
        GreaterThan.of(lm, TEMPLATE)
    with pytest.raises(InputError, match="does not know"):  # the prompt itself holds 42
        GreaterThan.of(lm, TEMPLATE, form="years")
    with pytest.raises(InputError, match="0 single-token answers of form 'digits'"):
        GreaterThan.of(year_lm(), TEMPLATE, form="digits")


def digit_lm() -> LanguageModel:
    vocabulary = {w: i for i, w in enumerate(["<bos>", "<unk>", "from", "to", *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_regex(r"\d|[a-z]+"), "removed", invert=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
    return LanguageModel(tiny_hf_model("gpt2"), fast, "digits")


def test_single_digits_count_from_the_tens_digit_up() -> None:
    lm = digit_lm()
    task = GreaterThan.of(lm, TEMPLATE)
    assert task.form == "digits" and len(task.answers) == 10
    assert lm.token_strings(task.tokens[35, [task.subject_pos]]) == ["3"]
    assert task.is_greater[35].tolist() == [d >= 3 for d in range(10)]
    assert not task.is_scored[:10].any()  # every digit is at or above 0
    assert task.is_scored[10:99].all()


def test_roots_are_mean_greater_minus_mean_other() -> None:
    task = GreaterThan.of(year_lm(), TEMPLATE)
    weights = task.root_weights(97)
    ids = task.answer_ids.tolist()
    assert weights[ids[98]] == weights[ids[99]] == 0.5
    assert weights[ids[3]] == pytest.approx(-1 / 98)
    assert sum(weights.values()) == pytest.approx(0.0)
    with pytest.raises(InputError, match="99: expected a number with answers on either side"):
        task.root_weights(99)


def test_templates_that_cannot_be_used_are_refused() -> None:
    lm = year_lm()
    with pytest.raises(InputError, match="expected a sentence with {yy:02d}"):
        GreaterThan.of(lm, "from 1735 to 17")
    with pytest.raises(InputError, match=r"no year can be used in .*: token 'x00' where '00'"):
        GreaterThan.of(year_lm(merged=tuple(f"x{y}" for y in YEARS)), "x{yy:02d} to 17")


def test_models_without_numbers_are_refused() -> None:
    from conftest import tiny_lm

    with pytest.raises(InputError):
        GreaterThan.of(tiny_lm())
