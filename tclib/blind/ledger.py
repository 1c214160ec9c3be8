"""The ledger of a blind study: entries chained by hashes, sealed, on disk, and checked when read.

The chain shows an entry that was changed, dropped or moved. Who writes the whole file anew can chain it anew: that
is found by its *seal*, the hash in its last line, where the seal stands somewhere else as well (notebook 04 prints
it, and the manifest of its step holds it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tclib.support.checked import checked
from tclib.support.declared import Natural, declared
from tclib.support.errors import InputError
from tclib.support.files import new_file
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
    kind: str  # begin, question, hypothesis, unblind, text, seal
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
        return float(f"{answer:.5g}") if np.isfinite(answer) else None
    return answer.item() if isinstance(answer, np.generic) else answer


def digest_of(before: str, body: dict[str, Any]) -> str:
    """The hash of a line: of the line before it and of its body."""
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def next_entry(
    entries: Sequence[Entry],
    kind: str,
    is_blind: bool,
    question: str,
    arguments: dict[str, Any],
    answer: Any,
) -> Entry:
    """The entry that follows, chained to the last."""
    body = Entry(len(entries), kind, is_blind, question, dict(arguments), answer, "").body()
    return Entry(**body, digest=digest_of(entries[-1].digest if entries else GENESIS, body))


def sealed(entries: Sequence[Entry]) -> Entry:
    """The last line of a ledger; its digest is the seal."""
    return next_entry(
        entries, "seal", entries[-1].is_blind, "seal", {"n_entries": len(entries)}, None
    )


def save_ledger(path: Path, entries: Sequence[Entry]) -> str:
    """Write entries as JSON lines, sealed: the seal. Errors: `InputError` if something is there."""
    if path.is_file():
        raise InputError(f"{path} exists, and a ledger is never overwritten: choose another name")
    last = sealed(entries)
    with new_file(path) as temporary:
        lines = [json.dumps(vars(entry), ensure_ascii=False) for entry in (*entries, last)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return last.digest


@checked
def load_ledger(path: Path, seal: str | None = None) -> list[Entry]:
    """Read a ledger and check its chain, and that it ends in the `seal` that is known from elsewhere.

    Errors: `InputError` naming the first entry that was changed, dropped or reordered, for a question asked
    after unblinding that claims to be blind, a ledger that does not begin, was cut short, or has another seal.
    """
    check_file(path, "save it again")
    try:
        # Only these are ends of lines: text may hold others (U+2028, U+0085).
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        entries = [Entry(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no ledger ({error}): save it again") from error
    if not entries:
        raise InputError(f"{path} is no ledger (it is empty): save it again")
    _check_chain(path, entries)
    if entries[-1].kind != "seal":
        raise InputError(f"{path} ends without its seal: it was cut short, or never saved whole")
    if seal is not None and seal != entries[-1].digest:
        raise InputError(
            f"{path} has the seal {entries[-1].digest[:16]}, not {seal[:16]}: it was written anew since"
        )
    return entries[:-1]


KINDS = ("begin", "question", "hypothesis", "unblind", "text", "seal")


def _check_chain(path: Path, entries: Sequence[Entry]) -> None:
    before = GENESIS
    for index, entry in enumerate(entries):
        if entry.index != index or entry.digest != digest_of(before, entry.body()):
            raise InputError(
                f"{path}: entry {index} was changed, dropped or moved since it was written"
            )
        before = entry.digest
        if problem := _out_of_order(entries[:index], entry, index == len(entries) - 1):
            raise InputError(f"{path}: entry {index} {problem}")


def _out_of_order(before: Sequence[Entry], entry: Entry, is_last: bool) -> str:
    """What no session could have written at this place, if it is that."""
    kinds = {one.kind for one in before}
    if entry.kind not in KINDS:
        return f"is {entry.kind!r}: expected {', '.join(KINDS)}"
    if (entry.kind == "begin") == bool(before):
        return f"is {entry.kind}: a ledger begins once"
    if entry.is_blind and ("unblind" in kinds or entry.kind in ("unblind", "text")):
        return "claims to be blind after the unblinding"
    if entry.is_blind and before and not before[-1].is_blind:
        return "claims to be blind again"
    if entry.kind == "hypothesis" and "unblind" in kinds:
        return "is a hypothesis after the unblinding"
    if entry.kind == "unblind" and "hypothesis" not in kinds:
        return "is an unblinding without a hypothesis"
    if entry.kind == "unblind" and key_hash(str(entry.arguments.get("key"))) != before[
        0
    ].arguments.get("key"):
        return "has another key than the ledger began with"
    if entry.kind == "text" and "unblind" not in kinds:
        return "is text before the unblinding"
    is_whole = entry.arguments.get("n_entries") == len(before)
    if entry.kind == "seal" and not (is_last and is_whole):
        return "is a seal, and not the last line of as many entries as it says"
    return ""


# ---------------------------------------------------------------------------------------------
# The numbers of examples


def key_hash(key: str) -> str:
    """What a ledger says of its key before the unblinding."""
    return hashlib.sha256(key.encode()).hexdigest()


def example_order(key: str, n_rows: int) -> Int[Tensor, "row"]:
    """The row behind each example's number: a permutation by the key."""
    seed = int(hashlib.sha256(f"examples {key}".encode()).hexdigest()[:12], 16)
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))


def key_of(entries: Sequence[Entry]) -> str:
    """The key by which a study's examples were numbered. Errors: `InputError` unless it is unblinded."""
    for entry in entries:
        if entry.kind == "unblind":
            return str(entry.arguments["key"])
    raise InputError("the study was not unblinded: the numbers of its examples are a secret yet")


def ledger_summary(entries: list[Entry]) -> pd.DataFrame:
    """What was asked, in order of first asking: question, times, first arguments, first answer (cut)."""
    lines: dict[str, dict[str, Any]] = {}
    for entry in entries:
        shown = {"arguments": str(entry.arguments)[:80], "answer": str(entry.answer)[:80]}
        line = lines.setdefault(entry.question, {"question": entry.question, "times": 0, **shown})
        line["times"] += 1
    return pd.DataFrame(lines.values())
