"""The ledger of a blind study: entries chained by hashes, on disk, checked when read, and replayed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tclib.support.errors import InputError

if TYPE_CHECKING:
    from tclib.blind.session import BlindSession

GENESIS = "0" * 64


class BlindnessError(InputError):
    """A question that the rules forbid. The message names the rule, never the text."""


@dataclass(frozen=True)
class Position:
    """An opaque place in the corpus."""

    example: int
    pos: int


@dataclass(frozen=True)
class Entry:
    """One line of a ledger. `digest` is the hash of the line before it and of everything in this one."""

    index: int
    kind: str  # begin, question, hypothesis, unblind
    is_blind: bool
    question: str
    arguments: dict[str, Any]
    answer: Any
    digest: str

    def body(self) -> dict[str, Any]:
        """Everything but the digest."""
        return {name: value for name, value in vars(self).items() if name != "digest"}


def plain(answer: Any) -> Any:
    """A table as a list of lines, rounded so that a replay on another machine can agree."""
    if isinstance(answer, pd.DataFrame):
        return [
            {str(name): plain(value) for name, value in line.items()}
            for line in answer.to_dict(orient="records")
        ]
    if isinstance(answer, (float, np.floating)):
        return float(f"{answer:.5g}")
    return answer.item() if isinstance(answer, np.generic) else answer


def digest_of(before: str, body: dict[str, Any]) -> str:
    """The hash of a line: of the line before it and of its body."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def load_ledger(path: str | Path) -> list[Entry]:
    """Read a ledger and check its chain.

    Errors: `InputError` naming the first entry that was changed, dropped or reordered, or a question
    asked after unblinding that claims to be blind.
    """
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        entries = [Entry(**line) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no ledger ({error}): save it again") from error
    before, is_blind = GENESIS, True
    for index, entry in enumerate(entries):
        if entry.index != index or entry.digest != digest_of(before, entry.body()):
            raise InputError(
                f"{path}: entry {index} was changed, dropped or moved since it was written"
            )
        if entry.kind == "unblind":
            is_blind = False
        if entry.is_blind and not is_blind:
            raise InputError(f"{path}: entry {index} claims to be blind after the unblinding")
        before = entry.digest
    return entries


def ledger_summary(entries: list[Entry]) -> pd.DataFrame:
    """What was asked, in order of first asking: question, times, first arguments, first answer (cut)."""
    lines: dict[str, dict[str, Any]] = {}
    for entry in entries:
        shown = {"arguments": str(entry.arguments)[:80], "answer": str(entry.answer)[:80]}
        line = lines.setdefault(entry.question, {"question": entry.question, "times": 0, **shown})
        line["times"] += 1
    return pd.DataFrame(lines.values())


def replay(entries: list[Entry], session: BlindSession) -> pd.DataFrame:
    """Ask a new session every question of a ledger: index, question, agrees.

    Floats agree within one per mille. Errors: `InputError` for an empty ledger, or if the session
    studies something else.
    """
    if not entries:
        raise InputError(
            "the ledger is empty: expected at least the line with which a study begins"
        )
    if session.ledger[0].arguments != entries[0].arguments:
        raise InputError(
            f"the ledger is about {entries[0].arguments}, the session about {session.ledger[0].arguments}"
        )
    lines = []
    for entry in entries:
        if entry.kind != "question":
            continue
        ask: Callable[..., Any] = getattr(session, entry.question)
        arguments = dict(entry.arguments)
        if "example" in arguments:
            arguments["position"] = Position(arguments.pop("example"), arguments.pop("pos"))
        if arguments.get("head") is not None:
            arguments["head"] = tuple(arguments["head"])
        agrees = _same(plain(ask(**arguments)), entry.answer)
        lines.append({"index": entry.index, "question": entry.question, "agrees": agrees})
    return pd.DataFrame(lines, columns=["index", "question", "agrees"])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, (int, float)):
        return bool(np.isclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True))
    return bool(one == other)
