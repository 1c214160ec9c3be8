"""Every condition by hand under labelled columns; round trips, laws, sentences; what is said of GPT-2's tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gpt2_tokenizer import gpt2_ranks
from hypothesis import given
from hypothesis import strategies as st
from tiny import FEW, tiny_lm, unchecked_types

from tclib.blind.generalise import generalise
from tclib.blind.language import (
    After,
    Case,
    Claim,
    Condition,
    Every,
    InClause,
    InDocument,
    Not,
    OfClass,
    OneOf,
    Spelt,
    from_dict,
)
from tclib.blind.predicates import Predicate
from tclib.blind.vocabulary import CLASSES, Vocabulary
from tclib.replication.paper_hypotheses import paper_hypotheses
from tclib.support.errors import InputError

BOS = "<bos>"
TEXTS = (
    *(BOS, " The", " war", "fare", " from", " 17", "35", ",", " NATO", " 1984"),
    *("\n", " ", " 42", "7", "мир", "(", "Smith", " sing", "ing", " 3500"),
)
VOCABULARY = Vocabulary(TEXTS, 0)
LINE = [*(BOS, " The", " war", "fare", " from", " 17", "35", ",", " NATO", BOS, "Smith", " sing")]


def row(*texts: str) -> torch.Tensor:
    return torch.tensor([[TEXTS.index(text) for text in texts]], dtype=torch.int32)


def marks(condition: Condition, *texts: str) -> str:
    return "".join("x" if holds else "." for holds in condition.holds(row(*texts), VOCABULARY)[0])


def one_of(*texts: str) -> OneOf:
    return OneOf(VOCABULARY.ids_of(texts))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        #                          BOS The war fare from 17 35 , NATO BOS Smith sing
        (one_of(" war", "Smith"), "..x.......x."),
        (OneOf(frozenset({0})), "............"),
        (OneOf(frozenset()), "............"),
        (OfClass("number"), ".....xx....."),
        (OfClass("capital"), ".x......x.x."),
        (OfClass("all capitals"), "........x..."),
        (OfClass("letters"), ".xxxx...x.xx"),
        (OfClass("punctuation"), ".......x...."),
        (OfClass("year"), "......x....."),
        (OfClass("word start"), ".xx.x...x.xx"),
        (OfClass("word inside"), "...x........"),
        (Spelt("begins", "f"), "...xx......."),
        (Spelt("ends", "r"), "..x........."),
        (Spelt("contains", "i"), "..........xx"),
        (After(one_of(" war"), 1), "...x........"),
        (After(one_of(" war"), 3), "...xxx......"),
        # Over the border of documents, as the model attends.
        (After(one_of(" war")), "...xxxxxx.xx"),
        (After(OfClass("number"), 2), "......xxx..."),
        (After(one_of(BOS)), "............"),
        (After(After(one_of(" war"), 1), 1), "....x......."),
        (InClause(0, 0), ".x......x.x."),
        (InClause(1, 2), "..xx.......x"),
        (InClause(5), "......xx...."),
        (InDocument(1, 1), ".x........x."),
        (InDocument(3, 4), "...xx......."),
        (InDocument(7), ".......xx..."),
        (Every((OfClass("letters"), After(one_of(" war")))), "...xx...x.xx"),
        (Not(OfClass("letters")), ".....xxx...."),
        (Claim((Case(one_of(" war")), Case(one_of(","), 0.5))), "..x....x...."),
    ],
)
def test_conditions_by_hand(condition: Condition, expected: str) -> None:
    assert marks(condition, *LINE) == expected


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("year", (BOS, " 1984", " 17", "35", "7", " 42", "35", " 17", " 42"), ".x.x....."),
        ("year", (BOS, " 3500", " 17", "7", "35"), "....."),
        ("newline", (BOS, "\n", " ", " The"), ".x.."),
        ("white space", (BOS, "\n", " ", " The"), ".xx."),
        ("cyrillic", (BOS, "мир", " The"), ".x."),
        ("word inside", (BOS, "(", "Smith", "ing", "\n", "fare"), "...x.."),
        ("word start", (BOS, "(", "Smith", "ing", "\n", "fare"), "..x..x"),
    ],
)
def test_classes_by_hand(name: Any, texts: tuple[str, ...], expected: str) -> None:
    assert marks(OfClass(name), *texts) == expected


def test_levels_are_predicted_and_the_highest_counts() -> None:
    claim = Claim((Case(OfClass("letters"), 0.25), Case(one_of(" war"), 1.0)))
    assert claim.predicted(row(*LINE[:6]), VOCABULARY).tolist() == [[0, 0.25, 1, 0.25, 0.25, 0]]
    assert one_of(",").predicted(row(*LINE[6:9]), VOCABULARY).tolist() == [[0, 1, 0]]


# -- laws --------------------------------------------------------------------------------------

IDS = st.integers(1, len(TEXTS) - 1)
ATOMS: st.SearchStrategy[Condition] = (
    st.frozensets(IDS, max_size=4).map(OneOf)
    | st.sampled_from(CLASSES).map(OfClass)
    | st.builds(Spelt, st.sampled_from(["begins", "ends", "contains"]), st.sampled_from("Tfin"))
    | st.builds(lambda a, b: InClause(a, a + b), st.integers(0, 4), st.integers(0, 3))
    | st.builds(lambda a, b: InDocument(a, a + b), st.integers(1, 5), st.integers(0, 3))
    | st.builds(InDocument, st.integers(1, 5))
)
CONDITIONS = st.recursive(
    ATOMS,
    lambda inner: (
        st.builds(After, inner, st.integers(0, 4))
        | inner.map(Not)
        | st.lists(inner, min_size=1, max_size=3).map(tuple).map(Every)
        | st.lists(st.builds(Case, inner, st.sampled_from([0.5, 1.0])), min_size=1, max_size=2).map(
            lambda cases: Claim(tuple(cases))
        )
    ),
    max_leaves=5,
)
GENERATED = torch.randint(
    0, len(TEXTS), (6, 14), generator=torch.Generator().manual_seed(0), dtype=torch.int32
)
GENERATED[:, 0] = 0


@FEW
@given(CONDITIONS)
def test_conditions_come_back_from_json_and_are_said(condition: Condition) -> None:
    again = from_dict(json.loads(json.dumps(condition.as_dict())))
    assert again == condition and hash(again) == hash(condition)
    assert (again.size, again.is_context_free) == (condition.size, condition.is_context_free)
    sentence = condition.in_words(VOCABULARY)
    assert sentence.startswith("The feature is active where the token ")
    assert sentence.endswith(".")


@FEW
@given(CONDITIONS, CONDITIONS)
def test_conjunction_and_negation_keep_their_laws(one: Condition, other: Condition) -> None:
    def holds(condition: Condition) -> torch.Tensor:
        return condition.holds(GENERATED, VOCABULARY)

    both, text = holds(Every((one, other))), GENERATED != 0
    assert torch.equal(both, holds(one) & holds(other))
    assert not (both & ~holds(one)).any()
    either_not = Claim((Case(Not(one)), Case(Not(other), 0.5)))
    assert torch.equal(holds(Not(Every((one, other)))), holds(either_not))  # De Morgan
    assert torch.equal(holds(Not(Not(one))), holds(one))
    assert not holds(one)[~text].any() and not holds(Not(one))[~text].any()
    assert torch.equal(either_not.predicted(GENERATED, VOCABULARY) > 0, holds(either_not))


@FEW
@given(st.none() | st.frozensets(IDS, max_size=3), st.frozensets(IDS), st.integers(0, 9))
def test_what_older_ledgers_say_means_the_same(
    current: frozenset[int] | None, attended: frozenset[int], reach: int
) -> None:
    old = Predicate(current, attended, reach)
    new = from_dict(json.loads(json.dumps(old.as_dict())))
    assert torch.equal(new.holds(GENERATED, VOCABULARY), old.holds(GENERATED, 0))


def test_sentences() -> None:
    condition = Every((OfClass("number"), Not(After(one_of("(", ","), 3)), InClause(0, 0)))
    assert condition.in_words(VOCABULARY) == (
        "The feature is active where the token is a number, and does not come within 3 tokens after one that "
        "is one of '(', ',', and has no tokens of its clause before it."
    )
    claim = Claim((Case(Not(OfClass("year"))), Case(Not(Every((Spelt("ends", "ing"),))), 0.5)))
    assert claim.phrase(VOCABULARY) == (
        "does not end a year (at 100% of its maximum); or is not one that ends in 'ing' (at 50% of its maximum)"
    )
    assert OneOf(frozenset(range(1, 20))).phrase(VOCABULARY).endswith("… (19 tokens)")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("number", "condition 'number': expected names and values"),
        ({1: 2}, "expected names and values"),
        ({}, "kind None: expected one of one_of, class, spelt, after"),
        ({"kind": "noun"}, "kind 'noun': expected one of"),
        ({"kind": ["class"]}, "expected one of"),
        ({"kind": "class", "name": "noun"}, "name noun|name 'noun': expected 'number'"),
        ({"kind": "class"}, "name: expected a value, found none"),
        ({"kind": "class", "nam": "number"}, "nam: no such name; did you mean name?"),
        ({"kind": "one_of", "ids": ["w"]}, "'w': expected a whole number"),
        ({"kind": "one_of", "ids": 3}, "ids 3: expected"),
        ({"kind": "one_of", "texts": [" war"]}, "without a vocabulary"),
        ({"kind": "spelt", "how": "ends", "text": ""}, "text '': expected"),
        (
            {"kind": "after", "condition": {"kind": "class", "name": "year"}, "reach": -1},
            "reach -1",
        ),
        ({"kind": "after", "condition": 3}, "condition 3: expected names and values"),
        ({"kind": "after"}, "condition: expected a value, found none"),
        ({"kind": "in_clause", "least": 3, "most": 2}, "least 3, most 2: expected most"),
        ({"kind": "in_document", "least": 0}, "least 0: expected at least 1"),
        ({"kind": "every", "parts": []}, r"parts \(\): expected at least one"),
        ({"kind": "every", "parts": {}}, "parts {}: expected a list"),
        ({"kind": "claim", "cases": []}, r"cases \(\): expected at least one"),
        ({"kind": "claim", "cases": [3]}, "case 3: expected names and values"),
        ({"kind": "claim", "cases": [{"level": 1}]}, "condition: expected a value"),
        ({"current": [1], "attended": None, "reach": 0, "far": 1}, "far: no such name"),
        ({"current": None, "attended": None, "reach": 0}, "a predicate over nothing"),
    ],
)
def test_bad_dicts_end_in_one_sentence(values: Any, message: str) -> None:
    with unchecked_types(), pytest.raises(InputError, match=message) as raised:
        from_dict(values)
    assert "\n" not in str(raised.value)


def test_levels_depth_and_tokens_are_checked() -> None:
    deep: dict[str, Any] = {"kind": "class", "name": "year"}
    for _ in range(2_000):
        deep = {"kind": "not", "condition": deep}
    with pytest.raises(InputError, match="within more than 20 others"):
        from_dict(deep)
    zero = {"kind": "claim", "cases": [{"condition": OfClass("year").as_dict(), "level": 0}]}
    with pytest.raises(InputError, match="level 0: expected more than 0"):
        from_dict(zero)
    with pytest.raises(InputError, match="expected a list of texts"):
        from_dict({"kind": "one_of", "texts": [3]}, VOCABULARY)
    with pytest.raises(InputError, match="none of ' peace' is a token"):
        from_dict({"kind": "one_of", "texts": [" peace"]}, VOCABULARY)
    with pytest.raises(InputError, match="tokens 0 to 99: the vocabulary has ids from 0 to 19"):
        one_of(",").holds(torch.tensor([[0, 99]]), VOCABULARY)
    with pytest.raises(InputError, match="token id 99: the vocabulary"):
        OneOf(frozenset({99})).holds(row(BOS), VOCABULARY)
    with pytest.raises(InputError, match="BOS 20 of 20 tokens"):
        Vocabulary(TEXTS, 20)


def test_a_models_vocabulary_has_its_texts_and_bos() -> None:
    lm = tiny_lm()
    vocabulary = Vocabulary.of(lm)
    assert (len(vocabulary), vocabulary.bos_id) == (lm.d_vocab, lm.bos_id)
    assert vocabulary.texts[5] == "w5" and vocabulary.stripped[lm.bos_id] == ""
    assert vocabulary.of_class("letters").sum() == 0  # every word has a number in it


# -- what a blind study may say ----------------------------------------------------------------


def words(*ends: str) -> tuple[str, ...]:
    stems = [a + b for a in "bdfglmnprt" for b in ("al", "en", "or", "ut")]
    return tuple(f" {stem}{end}" for end in ends for stem in stems)


LARGE = Vocabulary((BOS, *words("", "ing", "ed"), *(f" {n}" for n in range(100))), 0)


def scores_of(condition: Condition, n: int) -> dict[int, float]:
    """The first `n` of its tokens, from 4 down."""
    mask = condition.holds(torch.arange(len(LARGE))[:, None], LARGE)[:, 0]
    return {int(i): 4.0 - at / n for at, i in enumerate(mask.nonzero()[:n, 0])}


@pytest.mark.parametrize(
    "planted", [OfClass("number"), Spelt("ends", "ing"), Spelt("begins", "m"), Spelt("ends", "ed")]
)
@pytest.mark.parametrize("has_all", [False, True])
def test_a_list_is_generalised_to_what_it_has_in_common(planted: Condition, has_all: bool) -> None:
    holds = planted.holds(torch.arange(len(LARGE))[:, None], LARGE)[:, 0]
    full = holds * 2.0 + torch.rand(len(LARGE), generator=torch.Generator().manual_seed(0))
    listed = scores_of(planted, 30 if planted == OfClass("number") else 10)
    others = dict.fromkeys((~holds).nonzero()[1:9:4, 0].tolist(), 0.5)  # two that do not belong
    found = generalise({**listed, **others}, LARGE, full if has_all else None)
    assert found[0].condition == planted
    assert 0.9 < found[0].covered < 1
    assert found == sorted(found, key=lambda one: -one.separation)


def test_a_list_of_nothing_in_common_gives_nothing() -> None:
    mixed = {2: 3.0, 60: 3.0, 100: 2.5, 150: 3.0, 201: 2.0}
    assert generalise(mixed, LARGE) == []
    assert generalise({2: 3.0}, LARGE) == []  # one token has nothing in common with others
    with pytest.raises(InputError, match="without one above 0"):
        generalise({3: -1.0}, LARGE)
    with pytest.raises(InputError, match="token id 999"):
        generalise({999: 1.0}, LARGE)
    with pytest.raises(
        InputError, match=f"full scores of 3 tokens: the vocabulary has {len(LARGE)}"
    ):
        generalise({3: 1.0}, LARGE, torch.zeros(3))


# -- GPT-2 -------------------------------------------------------------------------------------


@pytest.mark.slow  # fetches GPT-2's tokens, once
def test_the_papers_hypotheses_are_said_of_gpt2s_tokens() -> None:
    ranks = gpt2_ranks()
    texts = [
        token.decode("utf-8", errors="replace") for token in sorted(ranks, key=ranks.__getitem__)
    ]
    gpt2 = Vocabulary((*texts, "<|endoftext|>"), len(texts))
    found = {one.feature: one for one in paper_hypotheses(gpt2)}
    assert list(found) == [355, 235, 1447, 6569, 4911, 6414, 2725, 479, 9030]
    grades = [one.grade for one in found.values()]
    assert [grades.count(grade) for grade in ("success", "mostly", "failure")] == [5, 2, 2]

    def said_of(feature: int, *pieces: str) -> str:
        rows = torch.tensor([[gpt2.bos_id, *(texts.index(piece) for piece in pieces)]])
        held = found[feature].condition.holds(rows, gpt2)[0, 1:]
        return "".join("x" if one else "." for one in held)

    assert said_of(355, " (", "Le", "ism", "an", ",", " 1976", ";", " Lee", ";") == "......x.."
    assert said_of(235, " He", " was", " caught", " then", " released") == "..x.."
    assert said_of(1447, "All", " All", " all") == "xx."
    assert said_of(6569, " said", " in", " an", " interview", ",", " he", " said") == "......x"
    assert said_of(4911, " It", " was", ",", " although", " warm", " though") == "...x.."
    assert said_of(6414, " in", "о") == ".x"
    assert said_of(2725, " does", " not", " provide", " offers", " the", " provision") == "..xx.."
    assert said_of(479, " with", " a", " total", " estimated", " cost", " of") == "....x."
    assert said_of(9030, " studied", " biology", " chemistry") == ".x."
    assert all(one.condition.in_words(gpt2) for one in found.values())
    assert all(from_dict(one.condition.as_dict()) == one.condition for one in found.values())
