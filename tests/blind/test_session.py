"""Nothing that a blind session returns, prints, raises or stores gives text; its ledger cannot be forged."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import random_rows, random_transcoder, tiny_lm, unchecked_types

from tclib.blind.grading import grade_predicate
from tclib.blind.investigator import _in_words, investigate
from tclib.blind.ledger import BlindnessError, Position, load_ledger
from tclib.blind.predicates import Predicate
from tclib.blind.replay import replay
from tclib.blind.session import BlindSession
from tclib.features.examples import feature_activations
from tclib.features.from_weights import LoneTokens
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError

ROWS = random_rows(40)
POSITION = Position(3, 9)


def make_session(restricted: bool = False) -> BlindSession:
    transcoders = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    return BlindSession(tiny_lm(), transcoders, ROWS, 2, 5, restricted)


def ask_everything(session: BlindSession) -> list[Any]:
    return [
        session.examples(5, 0.2),
        session.activation(POSITION),
        session.activation(POSITION, 1, 4),
        session.sources(POSITION),
        session.sources(POSITION, 3, rest=True),
        session.paths(POSITION),
        session.de_embedding(),
        session.de_embedding(1, 3, head=(0, 2)),
        session.de_embedding(extended=True),
        session.lone_token(),
        session.pullback(0),
        session.pullback(0, head=(1, 1)),
        session.logits(),
        session.ov_norms(),
    ]


INPUT_DEPENDENT = 6  # the first answers; what follows is about the vocabulary alone


def leaves(value: Any, depth: int = 0) -> list[Any]:
    """Every plain value inside an answer or an object's public attributes."""
    if isinstance(value, pd.DataFrame):
        return [*value.columns, *value.to_numpy().flatten().tolist()]
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in leaves(part, depth)]
    if isinstance(value, (list, tuple, set)):
        return [leaf for part in value for leaf in leaves(part, depth)]
    if hasattr(value, "__dict__") and depth < 3:
        return leaves(vars(value), depth + 1)
    return [value]


def hidden_words() -> set[str]:
    return {f"w{i}" for i in range(2, 100)} | {"<bos>"}


@pytest.mark.parametrize("restricted", [False, True])
def test_answers_about_the_corpus_hold_no_token_and_no_text(restricted: bool) -> None:
    session = make_session(restricted)
    answers = ask_everything(session)[:INPUT_DEPENDENT] if not restricted else []
    answers += [session.sources(POSITION), session.paths(POSITION), session.examples(3)]
    for answer in answers:
        for leaf in leaves(answer):
            assert not (isinstance(leaf, str) and any(word in leaf for word in hidden_words()))
            assert not isinstance(leaf, torch.Tensor)
        if isinstance(answer, pd.DataFrame):
            assert not {"id", "token", "token_id", "text"} & set(answer.columns)


def test_nothing_reachable_from_a_session_holds_the_rows() -> None:
    session = make_session()
    ask_everything(session)
    tokens = ROWS.tolist()
    for name in dir(session):
        if name.startswith("__"):
            continue
        value = getattr(session, name)
        assert not isinstance(value, (torch.Tensor, np.ndarray, LanguageModel)), name
        if callable(value):
            continue
        for leaf in leaves(value):
            assert not isinstance(leaf, (torch.Tensor, np.ndarray))
        text = str(value)
        assert not any(str(row)[1:-1] in text for row in tokens), name
    assert not hasattr(session, "__dict__")
    assert "w3" not in repr(session) and "blind" in repr(session)


def test_exceptions_and_copies_give_nothing_away() -> None:
    session = make_session()
    for make in (pickle.dumps, copy.copy, copy.deepcopy, lambda s: json.dumps(s)):
        with pytest.raises((BlindnessError, TypeError)) as caught:
            make(session)
        assert not any(f" {word} " in str(caught.value) for word in hidden_words())
    for position in (Position(40, 3), Position(0, 16), Position(0, 0)):
        with pytest.raises(BlindnessError, match="outside the corpus"):
            session.activation(position)
    with pytest.raises(BlindnessError, match="hidden until unblind"):
        session.text(POSITION)
    with pytest.raises(BlindnessError, match="no transcoder at layer 7"):
        session.de_embedding(7, 0)


def test_the_ledger_holds_no_text_of_the_corpus(tmp_path: Path) -> None:
    session = make_session()
    ask_everything(session)[:INPUT_DEPENDENT]
    session.save_ledger(tmp_path / "ledger.jsonl")
    for line in (tmp_path / "ledger.jsonl").read_text().splitlines()[: 1 + INPUT_DEPENDENT]:
        assert not any(f'"{word}"' in line for word in hidden_words())


def test_a_hypothesis_comes_before_the_unblinding() -> None:
    session = make_session()
    with pytest.raises(BlindnessError, match="no hypothesis yet"):
        session.unblind()
    assert session.is_blind
    with pytest.raises(BlindnessError, match="empty hypothesis"):
        session.hypothesise("  ")
    session.hypothesise("the token is w5")
    board = session.unblind(5)
    assert board.feature == 5 and not session.is_blind
    assert session.text(POSITION) == "".join(tiny_lm().token_strings(ROWS[3, :10].tolist()))
    session.examples(3)
    blind = [(entry.kind, entry.is_blind) for entry in session.ledger]
    assert blind == [
        ("begin", True),
        ("hypothesis", True),
        ("unblind", False),
        ("question", False),
    ]
    with pytest.raises(BlindnessError, match="comes before"):
        session.hypothesise("too late")


def test_the_restricted_variant_refuses_input_dependent_facts_about_layer_0() -> None:
    session = make_session(restricted=True)
    with pytest.raises(BlindnessError, match="restricted"):
        session.activation(POSITION, 0, 3)
    with pytest.raises(BlindnessError, match="restricted"):
        session.sources(POSITION, layer=0, feature=3)
    table = session.sources(POSITION, 10_000)
    assert not ((table["kind"] == "feature") & (table["layer"] == 0)).any()
    assert not session.paths(POSITION, 3, 200)["path"].str.contains("L0.", regex=False).any()
    full = make_session()
    assert (full.sources(POSITION, 10_000)["layer"] == 0).any()
    assert full.paths(POSITION, 3, 200)["path"].str.contains("L0.", regex=False).any()
    assert len(session.pullback(0)) and len(session.de_embedding(0, 3))  # weights alone


def saved(tmp_path: Path) -> Path:
    session = make_session()
    ask_everything(session)
    session.hypothesise("something", {"current": [5]})
    session.unblind(5)
    session.examples(4)
    session.save_ledger(tmp_path / "ledger.jsonl")
    return tmp_path / "ledger.jsonl"


def test_a_ledger_can_be_replayed(tmp_path: Path) -> None:
    entries = load_ledger(saved(tmp_path))
    table = replay(entries, make_session())
    assert len(table) == 15 and table["agrees"].all()
    with pytest.raises(InputError, match="the ledger is about"):
        replay(entries, make_session(restricted=True))
    other = make_session()
    entries[2].answer and None
    changed = list(entries)
    changed[2] = type(entries[2])(**{**vars(entries[2]), "answer": 12345.0})
    assert not replay(changed, other)["agrees"].all()


def test_a_forged_ledger_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    lines = path.read_text().splitlines()

    def forged(new: list[str], message: str) -> None:
        path.write_text("\n".join(new) + "\n")
        with pytest.raises(InputError, match=message):
            load_ledger(path)

    changed = json.loads(lines[2]) | {"answer": 1.0}
    forged([*lines[:2], json.dumps(changed), *lines[3:]], "entry 2 was changed")
    forged([*lines[:4], *lines[5:]], "entry 4 was changed, dropped")
    forged([*lines[:4], lines[5], lines[4], *lines[6:]], "entry 4 was changed")
    late = json.loads(lines[-1]) | {"is_blind": True}
    forged([*lines[:-1], json.dumps(late)], f"entry {len(lines) - 1} was changed")
    forged(["not json"], "is no ledger")
    assert isinstance(session_ledger_copy(), tuple)


def session_ledger_copy() -> tuple[Any, ...]:
    """Changing what `ledger` returns changes nothing in the session."""
    session = make_session()
    session.ledger[0].arguments["layer"] = 99
    assert session.ledger[0].arguments["layer"] == 2
    return session.ledger


def test_dead_features_and_missing_layers_are_named() -> None:
    transcoders = {"t": random_transcoder(2, "relu", torch.float32)}
    transcoders["t"].b_enc[5] = -1e6
    with pytest.raises(InputError, match="feature 5 of layer 2 never fires"):
        BlindSession(tiny_lm(), transcoders, ROWS, 2, 5)
    with pytest.raises(InputError, match="no transcoder at layer 1"):
        BlindSession(tiny_lm(), transcoders, ROWS, 1, 5)


@pytest.mark.parametrize("n_sources", [0, 7, 10_000])
def test_listed_sources_and_the_rest_add_up_to_the_pre_activation(n_sources: int) -> None:
    full, restricted = make_session(), make_session(restricted=True)
    place = full.examples(5).iloc[0]
    position = Position(int(place["example"]), int(place["pos"]))
    value = full.activation(position)
    table = full.sources(position, n_sources, rest=True)
    everything = full.sources(position, 10_000)
    assert table["contribution"].sum() == pytest.approx(value, rel=1e-4)
    assert table["share"].sum() == pytest.approx(1.0)
    by_kind = [t.groupby(["kind", "pos"])["contribution"].sum() for t in (table, everything)]
    pd.testing.assert_series_equal(*by_kind, rtol=1e-4)
    of_layer_0 = everything[(everything["kind"] == "feature") & (everything["layer"] == 0)]
    shown = restricted.sources(position, n_sources, rest=True)["contribution"].sum()
    assert value - shown == pytest.approx(of_layer_0["contribution"].sum(), abs=1e-4 * value)


def test_a_session_with_shared_activations_answers_the_same() -> None:
    transcoders = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    lm = tiny_lm()
    acts = feature_activations(lm, transcoders["t2"], [4, 5], ROWS)
    lone = LoneTokens(lm, transcoders.values())
    shared = BlindSession(lm, transcoders, ROWS, 2, 5, acts=acts[1], lone=lone)
    ask_everything(shared)
    assert replay(list(shared.ledger), make_session())["agrees"].all()
    message = r"shape \(40, 15\) for rows of shape \(40, 16\)"
    with unchecked_types(), pytest.raises(InputError, match=message):
        BlindSession(lm, transcoders, ROWS, 2, 5, acts=acts[1][:, 1:])


def test_a_hypothesis_says_a_word_once_and_shows_white_space() -> None:
    names = {1: " North", 2: "North", 3: " ", 4: "\n"} | {i: f"w{i}" for i in range(10, 30)}
    said = _in_words(Predicate(frozenset({1, 2, 3, 4})), names)
    assert said == "the token is one of '\\n', ' ', 'North'"
    many = _in_words(Predicate(None, frozenset(range(10, 30)), 3), names)
    assert many.startswith("within 3 tokens before stands one of 'w10', 'w11'")
    assert many.endswith("'w21' … (20 tokens)")


@pytest.mark.slow
@pytest.mark.parametrize("restricted", [False, True])
def test_the_investigator_writes_a_predicate_through_the_ledger(restricted: bool) -> None:
    session = make_session(restricted)
    hypothesis = investigate(session)
    assert session.is_blind
    assert [entry.kind for entry in session.ledger].count("hypothesis") == 1
    assert session.ledger[-1].arguments["predicate"] == hypothesis.predicate.as_dict()
    assert all(entry.is_blind for entry in session.ledger)
    again = make_session(restricted)
    assert investigate(again).text == hypothesis.text


def test_grades_follow_the_thresholds() -> None:
    acts = torch.zeros(4, 10)
    rows = random_rows(4, 10)
    rows[:, 5] = 50
    rows[rows == 51] = 52
    acts[:, 5] = 2.0
    perfect = grade_predicate(Predicate(frozenset({50})), rows, acts, 0)
    assert perfect.grade == "success" and perfect.threshold == 0.5
    rows[:, 6:8] = 51
    wide = grade_predicate(Predicate(frozenset({50, 51})), rows, acts, 0)
    assert (wide.grade, wide.score.recall) == ("mostly", 1.0)
    assert grade_predicate(Predicate(frozenset({51})), rows, acts, 0).grade == "failure"


def test_an_empty_ledger_cannot_be_replayed() -> None:
    with pytest.raises(InputError, match="the ledger is empty"):
        replay([], make_session())
