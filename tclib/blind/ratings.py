"""Rating features by hand, blind to where they come from (paper Section 4.1, Table 1).

A rater sees dashboards in a shuffled order without their origin and answers `interpretable`, `maybe` or `not`,
and whether the feature is context-free. Every rating and every note is on disk before the next item is shown, so a
restarted kernel goes on where it stopped; two raters' files can be compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tclib.support.checked import checked
from tclib.support.declared import Count, Name, Natural, declared, parse
from tclib.support.errors import InputError
from tclib.support.files import check_name, new_file
from tclib.support.paths import read_json
from tclib.support.statistics import cohens_kappa

Rating = Literal["interpretable", "maybe", "not"]
RATINGS: tuple[Rating, ...] = ("interpretable", "maybe", "not")
FORMAT = "tclib-ratings-3"
EXPORTED = ("number", "rating", "context_free", "note", "rater")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute


@declared(frozen=True)
class _Answer:
    rating: Rating
    context_free: bool


@declared(frozen=True)
class _Held:
    """What a ratings file holds; older formats lack the pages' hash, the first also notes and `n_when_shown`."""

    format: Literal["tclib-ratings-1", "tclib-ratings-2", "tclib-ratings-3"]
    rater: str
    n_items: Count
    answers: dict[int, _Answer]
    notes: dict[int, str] = field(default_factory=dict)
    n_when_shown: Natural | None = None
    pages: str = ""


@dataclass(frozen=True)
class Item:
    """One feature as a rater sees it: a number and a page. The origin is kept elsewhere."""

    number: int
    html: str


def pages_hash(items: Sequence[Item]) -> str:
    """By what a ratings file knows the pages that were rated."""
    return hashlib.sha256(json.dumps([item.html for item in items]).encode()).hexdigest()


class RatingStore:
    """One rater's answers and notes, on disk after each.

    Args:
        path: a JSON file; made if it is not there.
        n_items: how many items there are.
        rater: whose answers they are.
        pages: `pages_hash` of what is rated; "" if it is not known.

    Errors: `InputError` for a name that no file can have, a file of another rater, of another number of
    items or of other pages.
    """

    @checked
    def __init__(self, path: Path, n_items: Count, rater: Name, pages: str = "") -> None:
        check_name("rater", rater, "-_. ")
        self.path, self.n_items, self.rater, self.pages = path, n_items, rater, pages
        self.answers: dict[int, dict[str, Any]] = {}
        self.notes: dict[int, str] = {}
        self.n_when_shown: int | None = None
        if path.exists():
            self._load()

    def _load(self) -> None:
        held = parse(_Held, read_json(self.path, "move it away"), f"{self.path} is no ratings file")
        if (held.rater, held.n_items) != (self.rater, self.n_items):
            raise InputError(
                f"{self.path} holds {held.n_items} items of rater {held.rater!r}, not {self.n_items} of "
                f"{self.rater!r}: choose another file"
            )
        if held.pages and self.pages not in ("", held.pages):
            raise InputError(
                f"{self.path} holds ratings of other pages ({held.pages[:12]}, not {self.pages[:12]}), which have "
                "been made anew since: move it away, and rate these"
            )
        self.pages = self.pages or held.pages
        numbers = sorted({*held.answers, *held.notes})
        if beyond := [number for number in numbers if not 0 <= number < self.n_items]:
            raise InputError(
                f"{self.path} is no ratings file: items {beyond} of {self.n_items}; move it away"
            )
        self.answers = {number: asdict(answer) for number, answer in held.answers.items()}
        self.notes, self.n_when_shown = dict(held.notes), held.n_when_shown

    @property
    def is_complete(self) -> bool:
        """Whether every item has an answer."""
        return len(self.answers) == self.n_items

    @property
    def may_show(self) -> bool:
        """Whether origins may be told: all is rated, or the rater has asked for them."""
        return self.is_complete or self.n_when_shown is not None

    @checked
    def rate(self, number: int, rating: Rating, context_free: bool = False) -> None:
        """Record an answer (again, to change it) and save. Errors: `InputError` for an unknown one."""
        self._check(number)
        self.answers[number] = {"rating": rating, "context_free": context_free}
        self._save()

    @checked
    def annotate(self, number: int, note: str) -> None:
        """Record what the rater wrote beside an item, rated or not, and save; an empty note goes."""
        self._check(number)
        self.notes[number] = note
        if not note.strip():
            del self.notes[number]
        self._save()

    def show(self) -> None:
        """Record, once, after how many ratings the rater asked for the results, and save."""
        if not self.may_show:
            self.n_when_shown = len(self.answers)
            self._save()

    def _check(self, number: int) -> None:
        if not 0 <= number < self.n_items:
            raise InputError(f"item {number}: expected 0 to {self.n_items - 1}")

    def _save(self) -> None:
        held = {
            "format": FORMAT,
            "rater": self.rater,
            "n_items": self.n_items,
            "pages": self.pages,
            "answers": self.answers,
            "notes": self.notes,
            "n_when_shown": self.n_when_shown,
        }
        with new_file(self.path) as temporary:
            temporary.write_text(json.dumps(held, ensure_ascii=False), encoding="utf-8")

    def next_item(self) -> int | None:
        """The first item without an answer; None when all have one."""
        return next((i for i in range(self.n_items) if i not in self.answers), None)

    def table(self) -> pd.DataFrame:
        """A line an answer: number, rating, context_free, note."""
        lines = [
            {"number": number, **answer, "note": self.notes.get(number, "")}
            for number, answer in sorted(self.answers.items())
        ]
        return pd.DataFrame(lines, columns=["number", "rating", "context_free", "note"])


def ratings_path(folder: Path, rater: str) -> Path:
    """Where a rater's answers lie, beside the pages."""
    return folder / f"ratings_{rater}.json"


def raters_of(folder: Path) -> list[str]:
    """Whose answers lie beside the pages, by name."""
    return sorted(path.stem.removeprefix("ratings_") for path in folder.glob("ratings_*.json"))


def agreement(one: RatingStore, other: RatingStore) -> dict[str, float]:
    """κ of the ratings and of context-free over the items that both have rated."""
    pairs = one.table().merge(other.table(), on="number", suffixes=("_1", "_2"))
    if pairs.empty:
        raise InputError(f"{one.rater!r} and {other.rater!r} have rated no item in common")
    free = [pairs[f"context_free_{i}"].astype(str).tolist() for i in (1, 2)]
    return {
        "n_items": len(pairs),
        "kappa_rating": cohens_kappa(pairs["rating_1"].tolist(), pairs["rating_2"].tolist()),
        "kappa_context_free": cohens_kappa(*free),
    }


def counts_by_origin(ratings: pd.DataFrame, origin: Mapping[int, str]) -> pd.DataFrame:
    """Table 1: how many of each origin got each rating, and how many are context-free."""
    table = ratings.assign(kind=ratings["number"].map(origin))
    counts = pd.crosstab(table["kind"], table["rating"]).reindex(
        columns=list(RATINGS), fill_value=0
    )
    return counts.assign(context_free=table.groupby("kind")["context_free"].sum())


def export_table(
    stores: Iterable[RatingStore], origin: Mapping[int, str] | None = None
) -> pd.DataFrame:
    """All answers of some raters for a spreadsheet: `EXPORTED`, and with `origin` a column of that name.

    Numbers are those of the pages, from 1; what a spreadsheet would take for a formula stands behind an
    apostrophe. Errors: `InputError` for origins before all is rated.
    """
    tables = []
    for store in stores:
        if origin is not None and not store.is_complete:
            raise InputError(
                f"{store.rater!r} has rated {len(store.answers)} of {store.n_items} items: origins are told "
                "when all are rated; rate the rest, or leave the origins out"
            )
        own = store.table()
        own["note"] = own["note"].map(lambda note: f"'{note}" if note.startswith(FORMULA) else note)
        if origin is not None:
            own["origin"] = own["number"].map(origin)
        tables.append(own.assign(number=own["number"] + 1, rater=store.rater))
    columns = [*EXPORTED, *(["origin"] if origin is not None else [])]
    return pd.concat(tables, ignore_index=True)[columns]
