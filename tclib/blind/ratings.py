"""Rating features by hand, blind to where they come from (paper Section 4.1, Table 1).

A rater sees dashboards in a shuffled order without their origin and answers `interpretable`, `maybe` or `not`,
and whether the feature is context-free. Every rating is on disk before the next item is shown, so a restarted
kernel goes on where it stopped; two raters' files can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tclib.support.checked import checked
from tclib.support.declared import Count, Name, declared, parse
from tclib.support.errors import InputError
from tclib.support.files import check_name, new_file
from tclib.support.paths import read_json
from tclib.support.statistics import cohens_kappa

Rating = Literal["interpretable", "maybe", "not"]
KEYS: dict[str, Rating] = {"i": "interpretable", "m": "maybe", "n": "not"}
FORMAT = "tclib-ratings-1"


@declared(frozen=True)
class _Answer:
    rating: Rating
    context_free: bool


@declared(frozen=True)
class _Held:
    """What a ratings file holds."""

    format: Literal["tclib-ratings-1"]
    rater: str
    n_items: Count
    answers: dict[int, _Answer]


@dataclass(frozen=True)
class Item:
    """One feature as a rater sees it: a number and a page. The origin is kept elsewhere."""

    number: int
    html: str


class RatingStore:
    """One rater's answers, on disk after each.

    Args:
        path: a JSON file; made if it is not there.
        n_items: how many items there are.
        rater: whose answers they are.

    Errors: `InputError` for a name that no file can have, a file of another rater or another number of
    items.
    """

    @checked
    def __init__(self, path: Path, n_items: Count, rater: Name) -> None:
        check_name("rater", rater, "-_. ")
        self.path, self.n_items, self.rater = path, n_items, rater
        self.answers: dict[int, dict[str, Any]] = {}
        if not path.exists():
            return
        held = parse(_Held, read_json(path, "move it away"), f"{path} is no ratings file")
        if (held.rater, held.n_items) != (rater, n_items):
            raise InputError(
                f"{path} holds {held.n_items} items of rater {held.rater!r}, not {n_items} of "
                f"{rater!r}: choose another file"
            )
        if beyond := [number for number in held.answers if not 0 <= number < n_items]:
            raise InputError(
                f"{path} is no ratings file: items {beyond} of {n_items}; move it away"
            )
        self.answers = {number: asdict(answer) for number, answer in held.answers.items()}

    @checked
    def rate(self, number: int, rating: Rating, context_free: bool = False) -> None:
        """Record an answer (again, to change it) and save. Errors: `InputError` for an unknown one."""
        if not 0 <= number < self.n_items:
            raise InputError(f"item {number}: expected 0 to {self.n_items - 1}")
        self.answers[number] = {"rating": rating, "context_free": context_free}
        held = {"format": FORMAT, "rater": self.rater, "n_items": self.n_items}
        with new_file(self.path) as temporary:
            temporary.write_text(json.dumps({**held, "answers": self.answers}), encoding="utf-8")

    def next_item(self) -> int | None:
        """The first item without an answer; None when all have one."""
        return next((i for i in range(self.n_items) if i not in self.answers), None)

    def table(self) -> pd.DataFrame:
        """A line an answer: number, rating, context_free."""
        lines = [{"number": number, **answer} for number, answer in sorted(self.answers.items())]
        return pd.DataFrame(lines, columns=["number", "rating", "context_free"])


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
        columns=["interpretable", "maybe", "not"], fill_value=0
    )
    return counts.assign(context_free=table.groupby("kind")["context_free"].sum())


def rating_widget(items: Sequence[Item], store: RatingStore) -> Any:
    """The rating page for JupyterLab: dashboards, buttons, a key field, and the progress.

    In the key field i, m and n rate and go on; a capital letter also marks context-free; b goes back.
    """
    import ipywidgets as widgets

    view, bar = widgets.HTML(), widgets.IntProgress(max=len(items), description="rated")
    free = widgets.Checkbox(description="context-free")
    keys = widgets.Text(
        placeholder="i, m, n (capital: context-free), b: back", continuous_update=True
    )
    shown = [store.next_item()]

    def show() -> None:
        bar.value = len(store.answers)
        free.value = False
        view.value = "<h2>All items are rated.</h2>"
        if shown[0] is not None:
            view.value = f"<h3>Item {shown[0] + 1}</h3>{items[shown[0]].html}"

    def rate(rating: Rating, context_free: bool) -> None:
        if shown[0] is not None:
            store.rate(items[shown[0]].number, rating, context_free)
            shown[0] = store.next_item()
            show()

    def on_key(change: Mapping[str, Any]) -> None:
        key = str(change["new"])[-1:]
        if key:
            keys.value = ""
        if key.lower() in KEYS:
            rate(KEYS[key.lower()], free.value or key.isupper())
        elif key == "b":
            current = len(items) if shown[0] is None else shown[0]
            shown[0] = max(0, current - 1)
            show()

    buttons = [widgets.Button(description=rating) for rating in KEYS.values()]
    for button in buttons:
        button.on_click(lambda pressed: rate(pressed.description, free.value))
    keys.observe(on_key, names="value")
    show()
    return widgets.VBox([bar, widgets.HBox([*buttons, free, keys]), view])
