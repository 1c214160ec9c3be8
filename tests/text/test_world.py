"""The bundled world: its grammar, its labels, its bound."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from tclib.greater_than.task import GreaterThan, mean_probability_difference
from tclib.models.language_model import LanguageModel
from tclib.models.locate import BUNDLED
from tclib.text import grammar, world

DOCUMENTS = list(itertools.islice(world.documents(3), 4000))


def test_there_are_at_least_twelve_kinds_and_all_are_written() -> None:
    assert len(grammar.KINDS) >= 12
    assert {d.kind for d in DOCUMENTS} == {kind.__name__ for kind in grammar.KINDS}


def test_every_token_has_a_label_of_its_kind_and_a_surprisal() -> None:
    for document in DOCUMENTS:
        assert len(document.tokens) == len(document.labels) == len(document.surprisals)
        assert all(label.startswith(document.kind + ".") for label in document.labels)
        assert min(document.surprisals) >= 0


def test_the_second_year_is_always_later() -> None:
    pairs = {"year_range": ("first_yy", "second_yy"), "lifespan": ("birth_yy", "death_yy")}
    n_seen = 0
    for document in DOCUMENTS:
        if document.kind in pairs:
            first, second = pairs[document.kind]
            labelled = list(zip(document.tokens, document.labels, strict=True))
            firsts = [int(t) for t, label in labelled if label.endswith(first)]
            seconds = [int(t) for t, label in labelled if label.endswith(second)]
            assert len(firsts) == len(seconds) > 0
            assert all(a < b for a, b in zip(firsts, seconds, strict=True))
            n_seen += 1
    assert n_seen > 300


def test_comparisons_and_scores_are_true() -> None:
    comparisons = {"cheaper": True, "dearer": False, "lost to": True, "beat": False}
    n_seen = 0
    for document in DOCUMENTS:
        if document.kind in ("price", "score"):
            labelled = list(zip(document.tokens, document.labels, strict=True))
            numbers = [int(t) for t, _ in labelled if t.strip().isdigit()]
            roles = ("price.comparison", "score.verb")
            verdicts = "".join(t for t, label in labelled if label in roles).split()
            verdicts = [v for v in verdicts if v != "to"]
            assert 2 * len(verdicts) == len(numbers)
            for verdict, first, second in zip(verdicts, numbers[::2], numbers[1::2], strict=True):
                said = comparisons["lost to" if verdict == "lost" else verdict]
                assert said == (first < second)
                n_seen += 1
    assert n_seen > 300


def test_the_same_seed_gives_the_same_documents_and_another_does_not() -> None:
    again = list(itertools.islice(world.documents(3), 100))
    other = list(itertools.islice(world.documents(4), 100))
    assert again == DOCUMENTS[:100] and other != DOCUMENTS[:100]


def test_surprisal_of_a_document_is_the_log_probability_of_its_choices() -> None:
    class Fixed(random.Random):
        def random(self) -> float:
            return 0.0

    writer = grammar.Writer(Fixed(), kind="estimate")
    grammar.estimate(writer)
    choices = [len(grammar.WORDS.costly), 4, len(grammar.WORDS.cost_kinds), 90, 2]
    assert sum(writer.surprisals) == pytest.approx(sum(map(math.log, choices)))
    weighted = grammar.Writer(random.Random(0), kind="x")
    weighted.weighted({"a": 1.0, "b": 0.0})
    weighted.say(" a")
    assert weighted.surprisals == [0.0]


@pytest.mark.slow
def test_the_tokenizer_reads_every_document_back_exactly() -> None:
    tokenizer = world.build_tokenizer()
    ids = tokenizer.get_vocab()
    assert len(ids) <= 2000
    for document in DOCUMENTS[:500]:
        encoded = tokenizer(document.text)["input_ids"]
        assert encoded == [ids[token] for token in document.tokens]
        assert tokenizer.decode(encoded) == document.text


@pytest.mark.slow
def test_numbers_are_two_digit_tokens() -> None:
    tokens = world.build_tokenizer().tokenize("The siege lasted from the year 1735 to the year 17")
    assert tokens[6:8] == [" 17", "35"] and tokens[-1] == " 17"


@pytest.mark.slow
def test_the_bundled_tokenizers_are_those_of_the_world() -> None:
    for name in BUNDLED:
        assert LanguageModel.load(name).tokenizer.get_vocab() == world.build_tokenizer().get_vocab()


def test_the_bundled_gpt2_compares_years() -> None:
    lm = LanguageModel.load("demo", device="cpu")
    assert mean_probability_difference(lm, GreaterThan.of(lm)) >= 0.80
