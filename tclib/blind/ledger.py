"""The ledger of a blind study: entries chained by hashes, on disk, and checked when read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tclib.support.checked import checked
from tclib.support.declared import Natural, declared
from tclib.support.errors import InputError
from tclib.support.paths import check_file

GENESIS = "0" * 64


class BlindnessError(InputError):
    """A question that the rules forbid. The message names the rule, never the text."""


@declared(frozen=True)
class Position:
    """An opaque place in the corpus."""

    example: Natural
    pos: Natural


@declared(frozen=True)
class Entry:
    """One line of a ledger. `digest` is the hash of the line before it and of everything in this one."""

    index: Natural
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


@checked
def load_ledger(path: Path) -> list[Entry]:
    """Read a ledger and check its chain.

    Errors: `InputError` naming the first entry that was changed, dropped or reordered, or a question
    asked after unblinding that claims to be blind.
    """
    check_file(path, "save it again")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        entries = [Entry(**line) for line in lines]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no ledger ({error}): save it again") from error
    if not entries:
        raise InputError(f"{path} is no ledger (it is empty): save it again")
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
