"""A ledger, asked again: does a session of today give the answers that were written down?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tclib.blind.ledger import Entry, Position, plain
from tclib.blind.secret import is_question
from tclib.blind.session import BlindSession
from tclib.support.checked import checked
from tclib.support.errors import InputError


@checked
def replay(entries: Sequence[Entry], session: BlindSession) -> pd.DataFrame:
    """Ask a new session every question of a ledger: index, question, agrees.

    The session takes the key by which the study's examples are numbered (`key_of`). Numbers of two digits may
    differ by one in the second. Errors: `InputError` for an empty ledger, one with what is no
    question, or if the session studies something else.
    """
    if not entries:
        raise InputError(
            "the ledger is empty: expected at least the line with which a study begins"
        )
    own, asked = session.ledger[0].arguments, entries[0].arguments
    if own != asked:
        other = [name for name in own if own[name] != asked.get(name)] or sorted({*asked} - {*own})
        differing = ", ".join(
            f"{name} {str(asked.get(name))[:16]}, not {str(own.get(name))[:16]}" for name in other
        )
        raise InputError(
            f"the ledger is about something else ({differing}): begin a session with the same, and its key"
        )
    lines = []
    for entry in entries:
        if entry.kind != "question":
            continue
        agrees = _same(plain(_ask(session, entry)), entry.answer)
        lines.append({"index": entry.index, "question": entry.question, "agrees": agrees})
    return pd.DataFrame(lines, columns=["index", "question", "agrees"])


def _ask(session: BlindSession, entry: Entry) -> Any:
    if not is_question(entry.question):
        raise InputError(
            f"entry {entry.index} asks {entry.question!r}: expected a session's question"
        )
    ask: Callable[..., Any] = getattr(session, entry.question)
    arguments = dict(entry.arguments)
    try:
        if "example" in arguments:
            arguments["position"] = Position(arguments.pop("example"), arguments.pop("pos"))
        return ask(**arguments)
    except (TypeError, KeyError) as error:
        raise InputError(
            f"entry {entry.index} asks {entry.question} with {entry.arguments}: expected what it takes "
            f"({error})"
        ) from error


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, (int, float)):
        return bool(np.isclose(one, other, rtol=0.1, atol=1e-5, equal_nan=True))
    return bool(one == other)
