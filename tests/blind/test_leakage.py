"""An arithmetic eye: numbers that name tokens are found out, and a session gives none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tclib.blind import secret
from tclib.blind.leakage import ALLOWED, HEADS, LISTED, leakage
from tclib.blind.ledger import (
    Entry,
    Position,
    example_order,
    key_of,
    load_ledger,
    next_entry,
    plain,
)
from tclib.blind.session import BlindSession
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.text.corpus import CorpusConfig, build_corpus

pytestmark = pytest.mark.slow
N_STUDIES, N_POSITIONS, N_FEATURES = 18, 6, 64
# A leak that one reading in a thousand would show by chance; some thirty are read.
SURE = 0.002


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load("demo", device="cpu")


@pytest.fixture(scope="module")
def transcoders(lm: LanguageModel) -> dict[str, Dictionary]:
    return {f"layer {layer}": random_transcoder(lm, layer) for layer in range(3)}


def random_transcoder(lm: LanguageModel, layer: int) -> Dictionary:
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / lm.d_model**0.5

    d, n = lm.d_model, N_FEATURES
    config = DictionaryConfig("transcoder", layer, d, d, n)
    return Dictionary(config, normal(d, n), normal(n), normal(n, d), torch.zeros(d))


@pytest.fixture(scope="module")
def rows(lm: LanguageModel) -> torch.Tensor:
    return build_corpus(
        CorpusConfig(n_ctx=64, n_train_tokens=64 * 128, n_eval_tokens=640), lm
    ).train


@pytest.fixture(scope="module")
def sessions(
    lm: LanguageModel, transcoders: dict[str, Dictionary], rows: torch.Tensor
) -> Iterator[list[BlindSession]]:
    """Every question about the input, at every position that a study looks at; every other one restricted."""
    yield [ask(lm, transcoders, rows, feature) for feature in range(N_STUDIES)]
    secret.SEEN.clear()


def ask(
    lm: LanguageModel, transcoders: dict[str, Dictionary], rows: torch.Tensor, feature: int
) -> BlindSession:
    restricted, key = feature % 2 == 0, f"study {feature}"
    session = BlindSession(lm, transcoders, rows, 2, feature, restricted, key=key)
    found = session.examples(N_POSITIONS, 0.3)
    for example, pos in zip(found["example"], found["pos"], strict=True):
        position = Position(int(example), int(pos))
        session.activation(position)
        table = session.sources(position, 50)
        for met in table[table["layer"] == 1]["feature"].head(2).astype(int):
            session.activation(position, 1, met)
            session.sources(position, 20, 1, met)
        session.paths(position)
    session.hypothesise("none")
    session.unblind(1)
    return session


def told_all(session: BlindSession, rows: torch.Tensor, asks: Sequence[Entry]) -> list[Entry]:
    """The same study as if sources were answered with all numbers of `sources`, as they once were."""
    held = secret.SECRETS[session]
    order = example_order(held.key, len(rows))
    study: list[Entry] = []
    for entry in asks:
        answer = entry.answer
        if entry.question == "sources":
            at = entry.arguments
            tokens = rows[[int(order[at["example"]])], : at["pos"] + 1].long()
            frozen = FrozenPrompts(held.lm, tokens, held.transcoders.values())
            (found,) = sources(
                frozen, [frozen.feature_target(at["layer"], at["feature"], at["pos"])]
            )
            is_token = found.table["kind"].isin(["embedding", "head"])
            table = found.table[is_token & (found.table["layer"] <= 0)]
            answer = plain(table)
        study.append(
            next_entry(study, entry.kind, entry.is_blind, entry.question, at_of(entry), answer)
        )
    return study


def at_of(entry: Entry) -> dict[str, Any]:
    return dict(entry.arguments)


def line(table: pd.DataFrame, given: str) -> pd.Series:
    return table.set_index("given").loc[given]


def test_the_attack_names_tokens_where_every_number_is_given(
    lm: LanguageModel,
    transcoders: dict[str, Dictionary],
    rows: torch.Tensor,
    sessions: list[BlindSession],
) -> None:
    studies = [told_all(session, rows, session.ledger) for session in sessions[:3]]
    found = leakage(lm, transcoders, studies, rows)
    for given in ("weight", "contribution"):
        own = line(found, f"sources: embedding, {given}")
        assert own["hits"] > 0.95 * own["n"] > 2 * own["chance"] and own["p"] < SURE
        assert own["bits"] > 3
    heads = line(found, "sources: head of layer 0, weight")
    assert heads["hits"] > 0.8 * heads["n"] and heads["p"] < SURE


def test_no_answer_of_a_session_names_tokens_but_what_the_rules_allow(
    lm: LanguageModel,
    transcoders: dict[str, Dictionary],
    rows: torch.Tensor,
    sessions: list[BlindSession],
) -> None:
    found = leakage(lm, transcoders, [session.ledger for session in sessions], rows)
    assert {"examples, activation", "the whole less all that is listed, contribution"} <= {
        *found["given"]
    }
    hidden = found[found["rule"] == ""]
    assert len(hidden) >= 7 and (hidden["n"] >= 100).all()
    assert (hidden["p"] > SURE).all(), hidden
    assert (hidden["bits"] < 0.6).all(), hidden  # of the 9.8 of this vocabulary
    allowed = found[found["rule"] != ""]
    assert set(allowed["given"]) <= set(ALLOWED)
    assert set(allowed["given"]) == set(ALLOWED)
    numbers = allowed[~allowed["given"].isin([HEADS, LISTED])]
    assert (numbers["hits"] < 0.25 * numbers["n"]).all()


def test_a_restricted_study_lists_nothing_of_layer_0(
    lm: LanguageModel,
    transcoders: dict[str, Dictionary],
    rows: torch.Tensor,
    sessions: list[BlindSession],
) -> None:
    restricted, full = (
        leakage(lm, transcoders, [s.ledger for s in sessions[:6] if s.restricted == kind], rows)
        for kind in (True, False)
    )
    assert LISTED not in set(restricted["given"])
    assert line(full, LISTED)["bits"] > 1


def test_a_saved_ledger_is_attacked_as_well_and_a_blind_one_cannot_be_yet(
    lm: LanguageModel,
    transcoders: dict[str, Dictionary],
    rows: torch.Tensor,
    sessions: list[BlindSession],
    tmp_path: Path,
) -> None:
    sessions[0].save_ledger(tmp_path / "ledger.jsonl")
    study = load_ledger(tmp_path / "ledger.jsonl")
    assert key_of(study)
    pd.testing.assert_frame_equal(
        leakage(lm, transcoders, [study], rows),
        leakage(lm, transcoders, [sessions[0].ledger], rows),
    )
    blind = [entry for entry in study if entry.kind != "unblind"]
    with pytest.raises(InputError, match="not unblinded"):
        leakage(lm, transcoders, [blind], rows)
