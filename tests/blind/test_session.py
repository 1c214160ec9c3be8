"""Nothing that a blind session returns, prints, raises or stores gives text; its ledger cannot be forged."""

from __future__ import annotations

import copy
import json
import math
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import random_rows, random_transcoder, tiny_lm, unchecked_types

from tclib.blind import secret
from tclib.blind.answers import GROUPS
from tclib.blind.grading import grade_predicate
from tclib.blind.investigator import investigate
from tclib.blind.ledger import (
    BlindnessError,
    Entry,
    Position,
    example_order,
    key_hash,
    key_of,
    load_ledger,
    next_entry,
    save_ledger,
)
from tclib.blind.predicates import Predicate
from tclib.blind.replay import replay
from tclib.blind.session import BlindSession
from tclib.blind.vocabulary import Vocabulary
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary
from tclib.features import from_weights as weights
from tclib.features.examples import feature_activations
from tclib.features.from_weights import LoneTokens
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError

ROWS = random_rows(40)
POSITION = Position(3, 9)


KEY = "a key for the tests"


@pytest.fixture(autouse=True)
def _nothing_was_seen() -> Iterator[None]:
    """A feature that one test has unblinded is new to the next."""
    yield
    secret.SEEN.clear()


def make_session(restricted: bool = False, **others: Any) -> BlindSession:
    transcoders = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    return BlindSession(tiny_lm(), transcoders, ROWS, 2, 5, restricted, **{"key": KEY, **others})


def met(session: BlindSession) -> int:
    """A feature of layer 1 that the session lists as a source at the position."""
    table = session.sources(POSITION, 50)
    return int(table[table["layer"] == 1]["feature"].iloc[0])


def ask_everything(session: BlindSession) -> list[Any]:
    return [
        session.examples(5, 0.2),
        session.activation(POSITION),
        session.sources(POSITION),
        session.activation(POSITION, 1, met(session)),
        session.sources(POSITION, 3),
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
    with pytest.raises(BlindnessError, match="half a surrogate pair"):
        session.hypothesise("a\ud800")
    session.hypothesise("the token is w5")
    board = session.unblind(5)
    assert board.feature == 5 and not session.is_blind
    row = ROWS[int(example_order(KEY, len(ROWS))[POSITION.example])]
    assert session.text(POSITION) == "".join(tiny_lm().token_strings(row[:10].tolist()))
    session.examples(3)
    blind = [(entry.kind, entry.is_blind) for entry in session.ledger]
    assert blind == [
        ("begin", True),
        ("hypothesis", True),
        ("unblind", False),
        ("text", False),
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
    with pytest.raises(InputError, match="restricted study of layer 0"):
        BlindSession(
            tiny_lm(), {"t": random_transcoder(0, "relu", torch.float32)}, ROWS, 0, 5, True
        )
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
    table = replay(entries, make_session(key=key_of(entries)))
    assert len(table) == 16 and table["agrees"].all()
    with pytest.raises(InputError, match="the ledger is about"):
        replay(entries, make_session(restricted=True))
    with pytest.raises(InputError, match="the ledger is about"):
        replay(entries, make_session(key="another"))
    changed = list(entries)
    changed[2] = type(entries[2])(**{**vars(entries[2]), "answer": 12345.0})
    assert not replay(changed, make_session())["agrees"].all()


def test_a_forged_ledger_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    lines = path.read_text().splitlines()

    def forged(new: list[str], message: str) -> None:
        path.write_text("\n".join(new) + "\n")
        with pytest.raises(InputError, match=message):
            load_ledger(path)

    changed = json.loads(lines[2]) | {"answer": 12345.0}
    forged([*lines[:2], json.dumps(changed), *lines[3:]], "entry 2 was changed")
    forged([*lines[:4], *lines[5:]], "entry 4 was changed, dropped")
    forged([*lines[:4], lines[5], lines[4], *lines[6:]], "entry 4 was changed")
    late = json.loads(lines[-1]) | {"is_blind": True}
    forged([*lines[:-1], json.dumps(late)], f"entry {len(lines) - 1} was changed")
    forged(["not json"], "is no ledger")
    forged([""], "it is empty")
    for n_kept in range(1, len(lines)):
        forged(lines[:n_kept], "ends without its seal: it was cut short")
    assert isinstance(session_ledger_copy(), tuple)


def chained_anew(entries: list[Entry], path: Path) -> Path:
    """What a forger does who writes the whole file: every hash in it is right."""
    chain: list[Entry] = []
    for entry in entries:
        body = {
            name: value for name, value in vars(entry).items() if name not in ("index", "digest")
        }
        chain.append(next_entry(chain, **body))
    path.unlink(missing_ok=True)
    save_ledger(path, chain)
    return path


def test_a_ledger_that_is_forged_as_a_whole_has_another_seal(tmp_path: Path) -> None:
    session = make_session()
    session.examples(3)
    session.hypothesise("the token is w5")
    session.unblind(2)
    seal = session.save_ledger(tmp_path / "ledger.jsonl")
    assert seal == session.seal and len(seal) == 64
    entries = load_ledger(tmp_path / "ledger.jsonl", seal)
    better = replace(entries[2], arguments={"text": "the token is w7", "predicate": None})
    forgeries = {
        "hypothesis": [*entries[:2], better, *entries[3:]],
        "cut": entries[:2],
        "never unblinded": entries[:3],
        "fewer questions": [entries[0], *entries[2:]],
    }
    for name, forged in forgeries.items():
        path = chained_anew(forged, tmp_path / f"{name}.jsonl")
        load_ledger(path)  # by itself it is whole
        with pytest.raises(InputError, match="has the seal .* it was written anew since"):
            load_ledger(path, seal)
    text = Entry(0, "text", True, "text", {}, None, "")
    other_key = replace(entries[3], arguments={"n_examples": 2, "key": "another"})
    for name, forged, problem in (
        ("two", [*entries, entries[0]], "entry 4 is begin: a ledger begins once"),
        ("none", entries[1:], "entry 0 is question: a ledger begins once"),
        (
            "late",
            [*entries, replace(entries[2], is_blind=False)],
            "hypothesis after the unblinding",
        ),
        ("again", [*entries, entries[1]], "claims to be blind after the unblinding"),
        ("text", [*entries[:2], text], "claims to be blind after the unblinding"),
        ("early", [*entries[:2], replace(text, is_blind=False)], "text before the unblinding"),
        ("bare", [*entries[:2], entries[3]], "an unblinding without a hypothesis"),
        ("key", [*entries[:3], other_key], "another key than the ledger began with"),
        ("kind", [*entries[:2], replace(text, kind="guess")], "is 'guess': expected begin"),
        (
            "seal",
            [*entries[:2], replace(text, kind="seal"), entries[2]],
            "is a seal, and not the last",
        ),
    ):
        with pytest.raises(InputError, match=problem):
            load_ledger(chained_anew(forged, tmp_path / f"{name}.jsonl"))


def test_signs_that_only_look_like_ends_of_lines_do_not_break_a_ledger(tmp_path: Path) -> None:
    session = make_session()
    session.hypothesise("one\u2028two\u0085three\x1cfour\nfive\r\nsix")
    session.save_ledger(tmp_path / "ledger.jsonl")
    assert load_ledger(tmp_path / "ledger.jsonl")[1].arguments["text"].count("\u2028") == 1


# -- what a user may try --------------------------------------------------------------------


def test_nothing_of_a_session_can_be_set() -> None:
    session = make_session(restricted=True)
    for name, value in {
        "restricted": False,
        "is_blind": False,
        "_is_blind": False,
        "layer": 1,
        "feature": 3,
        "_has_hypothesis": True,
        "ledger": (),
    }.items():
        with pytest.raises(AttributeError):
            setattr(session, name, value)


def test_a_feature_that_was_unblinded_is_not_blind_again() -> None:
    session = make_session()
    session.hypothesise("something")
    session.unblind(2)
    for again in (make_session(), make_session(restricted=True, key="another")):
        assert not again.is_blind
        again.examples(3)
        assert not any(entry.is_blind for entry in again.ledger)
        with pytest.warns(UserWarning, match="was unblinded before: the ledger says"):
            again.hypothesise("I knew")
        assert not any(entry.is_blind for entry in again.ledger)
        with pytest.raises(BlindnessError, match="hidden until unblind"):
            again.text(POSITION)
    other = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    assert BlindSession(tiny_lm(), other, ROWS, 2, 6).is_blind
    program = make_session(fresh_eyes=True)
    assert program.is_blind and program.ledger[0].arguments["fresh_eyes"]


def test_examples_have_numbers_of_their_own() -> None:
    one, again, other = make_session(), make_session(), make_session(key="another")
    assert one.examples(10).equals(again.examples(10))
    numbers = [set(session.examples(40)["example"]) for session in (one, other)]
    assert numbers[0] != numbers[1]
    drawn = make_session(key=None)
    assert drawn.ledger[0].arguments["key"] != one.ledger[0].arguments["key"]
    drawn.hypothesise("something")
    drawn.unblind(2)
    assert key_hash(key_of(list(drawn.ledger))) == drawn.ledger[0].arguments["key"]
    with pytest.raises(InputError, match="not unblinded: the numbers of its examples are a secret"):
        key_of(list(one.ledger))


def test_an_error_inside_brings_no_frame_that_holds_the_corpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = make_session()

    def fails(error: BaseException) -> Callable[..., Any]:
        def failing(*_args: Any, **_kwargs: Any) -> Any:
            raise error

        return failing

    problems = (ValueError(f"rows {ROWS.tolist()}"), KeyboardInterrupt(), InputError("a rule"))
    for problem in problems:
        monkeypatch.setattr("tclib.blind.session.sources", fails(problem))
        with pytest.raises((BlindnessError, KeyboardInterrupt, InputError)) as caught:
            session.sources(POSITION)
        assert caught.value.__cause__ is None and caught.value.__context__ is None
        assert str(ROWS[3].tolist())[1:-1] not in str(caught.value)
        frames = traceback.walk_tb(caught.value.__traceback__)
        for frame, _ in list(frames)[1:]:  # but this test's own
            assert not any(isinstance(value, torch.Tensor) for value in frame.f_locals.values())
            assert not any(isinstance(value, secret.Secret) for value in frame.f_locals.values())


def test_a_hook_that_reads_along_is_refused() -> None:
    lm, transcoders = tiny_lm(), {"t": random_transcoder(2, "relu", torch.float32)}
    session = BlindSession(lm, transcoders, ROWS, 2, 5)
    seen: list[Any] = []
    hook = lm.model.register_forward_pre_hook(lambda _, args: seen.append(args))
    with pytest.raises(InputError, match="something is attached to the model"):
        session.sources(POSITION)
    with pytest.raises(InputError, match="something is attached to the model"):
        BlindSession(lm, transcoders, ROWS, 2, 5)
    assert not seen
    hook.remove()
    assert len(session.sources(POSITION))


def test_a_feature_of_an_sae_on_the_same_site_is_studied_in_the_same_way() -> None:
    transcoders = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    config = replace(transcoders["t2"].config, kind="sae_mlp_in")
    planted = random_transcoder(1, "relu", torch.float32).parameters()
    sae = Dictionary(config, **planted)
    session = BlindSession(tiny_lm(), transcoders, ROWS, 2, 5, dictionary=sae)
    acts = feature_activations(tiny_lm(), sae, [5], ROWS)[0]
    place = session.examples(5).iloc[-1]
    position = Position(int(place["example"]), int(place["pos"]))
    key_of_session = secret.SECRETS[session].key
    row = int(example_order(key_of_session, len(ROWS))[position.example])
    assert session.activation(position) == pytest.approx(float(acts[row, position.pos]), rel=0.06)
    direct = weights.de_embedding(tiny_lm(), sae, 5)
    assert session.de_embedding()["score"].iloc[0] == pytest.approx(float(direct.max()))
    assert len(session.sources(position)) and len(session.paths(position))
    with pytest.raises(BlindnessError, match="writes nothing to the stream"):
        session.logits()
    session.hypothesise("something")
    assert session.unblind(2).feature == 5
    elsewhere = Dictionary(replace(config, kind="sae_mlp_out"), **planted)
    with pytest.raises(InputError, match="expected one that reads"):
        BlindSession(tiny_lm(), transcoders, ROWS, 2, 5, dictionary=elsewhere)


# -- numbers --------------------------------------------------------------------------------


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


@pytest.mark.parametrize("restricted", [False, True])
def test_no_number_and_no_sign_is_given_that_hangs_on_one_token(restricted: bool) -> None:
    session = make_session(restricted)
    place = session.examples(5).iloc[-1]
    position = Position(int(place["example"]), int(place["pos"]))
    table = session.sources(position, 10_000)
    assert table.columns.tolist() == [
        *("kind", "layer", "head", "feature", "pos", "rank", "contribution", "share")
    ]
    groups, listed = table[table["share"].notna()], table[table["share"].isna()]
    assert groups["kind"].tolist() == list(GROUPS)
    assert set(groups["share"] * 4) <= {-1.0, 0.0, 1.0, 2.0, 3.0, 4.0}
    assert set(listed["kind"]) == {"feature", "head"}
    is_deep = (listed["kind"] == "feature") & (listed["layer"] > 0)
    assert (listed["contribution"].notna() == (is_deep & (is_deep.cumsum() <= 3))).all()
    assert 3 < is_deep.sum() <= 50
    assert ((listed["kind"] == "head").sum() == 5) and listed["pos"].between(1, position.pos).all()
    assert (listed[listed["kind"] == "head"]["pos"] < position.pos).all()
    assert all(value == float(f"{value:.1g}") for value in listed["contribution"].dropna())
    assert all(value == float(f"{value:.2g}") for value in session.examples(9)["activation"])
    paths = session.paths(position, 3, 60)
    ends = paths["path"].str.split(" <- ").str[-1]
    is_deep_end = ends.str.match(r"L[1-9]")
    assert (is_deep_end | ~paths["contribution"].notna()).all()
    assert ends.str.match(r"L\d|attn").all()
    assert ends[~is_deep_end].index.tolist() == list(range(is_deep_end.sum(), len(ends)))
    assert paths["path"][~is_deep_end].tolist() == sorted(paths["path"][~is_deep_end])


def test_only_features_that_were_met_at_a_position_are_answered_for() -> None:
    """Five questions about features of one's choice would name the token."""
    session = make_session()
    with pytest.raises(
        BlindnessError, match="feature 3 of layer 1 has not been met at this position"
    ):
        session.activation(POSITION, 1, 3)
    with pytest.raises(BlindnessError, match="has not been met"):
        session.sources(POSITION, layer=1, feature=3)
    listed = met(session)
    assert session.activation(POSITION, 1, listed) > 0
    with pytest.raises(BlindnessError, match="has not been met"):
        session.activation(Position(POSITION.example, POSITION.pos - 1), 1, listed)
    table = session.sources(POSITION, 50)
    low = int(table[(table["kind"] == "feature") & (table["layer"] == 0)]["feature"].iloc[0])
    with pytest.raises(BlindnessError, match="activations of layer 0's features name the token"):
        session.activation(POSITION, 0, low)
    every = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    of_layer_0 = BlindSession(tiny_lm(), every, ROWS, 0, 5)
    assert of_layer_0.activation(POSITION) >= 0
    with pytest.raises(BlindnessError, match="has not been met"):
        of_layer_0.activation(POSITION, 0, 3)


def test_nothing_is_answered_past_the_ledger() -> None:
    session = make_session()
    for name in ("examples", "sources", "activation", "paths"):
        method = getattr(BlindSession, name)
        assert not hasattr(method, "__wrapped__")
    public = {name for name in vars(BlindSession) if not name.startswith("__")}
    assert not any(name.startswith("_") for name in public)
    with pytest.raises(BlindnessError, match="not to be subclassed"):
        type("Mine", (BlindSession,), {"__slots__": ()})
    before = session.n_questions
    session.examples(3)
    assert session.n_questions == before + 1


def test_a_second_session_that_is_open_does_not_stay_blind() -> None:
    one, other = make_session(), make_session(key="another")
    one.hypothesise("something")
    one.unblind(2)
    assert not other.is_blind
    sliced = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    assert not BlindSession(tiny_lm(), sliced, ROWS[:-1].flip(0), 2, 5).is_blind


def test_dictionaries_that_are_edited_and_activations_of_others_are_refused() -> None:
    transcoders = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    session = BlindSession(tiny_lm(), transcoders, ROWS, 2, 5)
    session.examples(3)
    transcoders["t1"].W_enc[:, 7] = 1.0
    with pytest.raises(BlindnessError, match="a dictionary was edited since the session began"):
        session.examples(3)
    forged = torch.arange(len(ROWS)).float()[:, None].expand(ROWS.shape).contiguous()
    with pytest.raises(InputError, match="acts are not those of feature 5"):
        make_session(acts=forged)


def test_groups_say_in_which_quarter_their_part_lies() -> None:
    """By hand, from the complete list of sources that no session gives."""
    session = make_session()
    place = session.examples(5).iloc[-1]
    position = Position(int(place["example"]), int(place["pos"]))
    row = int(example_order(KEY, len(ROWS))[position.example])
    transcoders = [random_transcoder(i, "relu", torch.float32) for i in range(3)]
    frozen = FrozenPrompts(tiny_lm(), ROWS[[row], : position.pos + 1].long(), transcoders)
    (found,) = sources(frozen, [frozen.feature_target(2, 5, position.pos)])
    table = found.table
    is_head, is_low = table["kind"] == "head", table["layer"] <= 0
    own = table["kind"].isin(["embedding", "feature", "error"]) & is_low
    parts = {
        "the token itself": own | (is_head & (table["pos"] == position.pos)),
        "earlier tokens": is_head & table["pos"].between(1, position.pos - 1),
        "features above layer 0": (table["kind"] == "feature") & ~is_low,
    }
    share = session.sources(position).set_index("kind")["share"]
    for name, which in parts.items():
        exact = table["contribution"][which].sum() / found.value
        assert share[name] == max(-0.25, min(1.0, math.floor(4 * exact) / 4)), name


def test_a_session_with_shared_activations_answers_the_same() -> None:
    transcoders = {f"t{i}": random_transcoder(i, "relu", torch.float32) for i in range(3)}
    lm = tiny_lm()
    acts = feature_activations(lm, transcoders["t2"], [4, 5], ROWS)
    lone = LoneTokens(lm, transcoders.values())
    shared = BlindSession(lm, transcoders, ROWS, 2, 5, key=KEY, acts=acts[1], lone=lone)
    ask_everything(shared)
    assert replay(list(shared.ledger), make_session())["agrees"].all()
    message = r"shape \(40, 15\) for rows of shape \(40, 16\)"
    with unchecked_types(), pytest.raises(InputError, match=message):
        BlindSession(lm, transcoders, ROWS, 2, 5, acts=acts[1][:, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("restricted", [False, True])
def test_the_investigator_writes_a_predicate_through_the_ledger(restricted: bool) -> None:
    session = make_session(restricted)
    hypothesis = investigate(session, Vocabulary.of(tiny_lm()))
    assert session.is_blind
    assert [entry.kind for entry in session.ledger].count("hypothesis") == 1
    assert session.ledger[-1].arguments["predicate"] == hypothesis.predicate.as_dict()
    assert all(entry.is_blind for entry in session.ledger)
    again = make_session(restricted)
    assert investigate(again, Vocabulary.of(tiny_lm())).text == hypothesis.text


def test_grades_follow_the_thresholds() -> None:
    acts = torch.zeros(4, 10)
    rows = random_rows(4, 10)
    rows[:, 5] = 50
    rows[rows == 51] = 52
    acts[:, 5] = 2.0
    vocabulary = Vocabulary.of(tiny_lm())
    perfect = grade_predicate(Predicate(frozenset({50})), rows, acts, vocabulary)
    assert perfect.grade == "success" and perfect.threshold == 0.5
    rows[:, 6:8] = 51
    wide = grade_predicate(Predicate(frozenset({50, 51})), rows, acts, vocabulary)
    assert (wide.grade, wide.score.recall) == ("mostly", 1.0)
    assert grade_predicate(Predicate(frozenset({51})), rows, acts, vocabulary).grade == "failure"


def test_an_empty_ledger_cannot_be_replayed() -> None:
    with pytest.raises(InputError, match="the ledger is empty"):
        replay([], make_session())
