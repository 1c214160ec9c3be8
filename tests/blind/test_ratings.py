"""Ratings that survive a restart, agreement by hand, pages that hide where a feature comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from tiny import edit_json, unchecked_types

from tclib.blind.rating_widget import _LISTENER, rating_widget
from tclib.blind.ratings import (
    EXPORTED,
    Item,
    RatingStore,
    agreement,
    counts_by_origin,
    export_table,
    pages_hash,
    raters_of,
    ratings_path,
)
from tclib.support.errors import InputError
from tclib.support.statistics import cohens_kappa

mpl.use("Agg")


def test_ratings_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ratings.json"
    store = RatingStore(path, 3, "anna")
    store.rate(0, "interpretable", context_free=True)
    store.rate(1, "not")
    again = RatingStore(path, 3, "anna")
    assert again.next_item() == 2
    assert again.table()["rating"].tolist() == ["interpretable", "not"]
    assert again.table()["context_free"].tolist() == [True, False]
    again.rate(0, "maybe")
    again.rate(2, "maybe")
    assert again.next_item() is None
    assert RatingStore(path, 3, "anna").table()["rating"].tolist() == ["maybe", "not", "maybe"]


def test_files_of_others_and_bad_ratings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ratings.json"
    store = RatingStore(path, 3, "anna")
    store.rate(0, "not")
    with pytest.raises(InputError, match="3 items of rater 'anna', not 3 of 'ben'"):
        RatingStore(path, 3, "ben")
    with pytest.raises(InputError, match="not 4 of 'anna'"):
        RatingStore(path, 4, "anna")
    with pytest.raises(InputError, match="item 3: expected 0 to 2"):
        store.rate(3, "not")
    with unchecked_types(), pytest.raises(InputError, match="rating 'good'"):
        store.rate(1, "good")  # type: ignore[arg-type]
    assert json.loads(path.read_text())["answers"].keys() == {"0"}
    path.write_text("{")
    with pytest.raises(InputError, match="truncated or corrupted"):
        RatingStore(path, 3, "anna")


@pytest.mark.parametrize(
    "rater", ["/../../evil", "..", "a/b", "a\\b", "", " ", ".x", "a\n", "x" * 101]
)
def test_a_rater_whose_name_leads_elsewhere_is_refused(rater: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="^rater .*: expected (letters, digits, -, _, ., spaces|a name)"
    ):
        RatingStore(tmp_path / f"ratings_{rater}.json", 3, rater)
    assert list(tmp_path.iterdir()) == []
    for name in ("Anna Müller", "rater-2", "J. Doe"):
        RatingStore(tmp_path / f"ratings_{name}.json", 3, name).rate(0, "not")
    assert len(list(tmp_path.iterdir())) == 3


def test_kappa_by_hand() -> None:
    assert cohens_kappa(["a", "b", "a"], ["a", "b", "a"]) == 1.0
    # observed 3/4; chance (1/2)(1/4) + (1/2)(3/4) = 1/2
    assert cohens_kappa(["a", "a", "b", "b"], ["a", "b", "b", "b"]) == pytest.approx(0.5)
    assert np.isnan(cohens_kappa(["a", "a"], ["a", "a"]))
    with pytest.raises(InputError, match="2 and 1 ratings"):
        cohens_kappa(["a", "b"], ["a"])


def test_two_raters_are_compared_on_what_both_rated(tmp_path: Path) -> None:
    one, other = (RatingStore(tmp_path / f"{n}.json", 4, n) for n in ("anna", "ben"))
    for number, rating in enumerate(("interpretable", "not", "maybe")):
        one.rate(number, rating)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no item in common"):
        agreement(one, other)
    other.rate(0, "interpretable", True)
    other.rate(1, "not")
    found = agreement(one, other)
    assert (found["n_items"], found["kappa_rating"]) == (2, 1.0)
    counts = counts_by_origin(one.table(), {0: "transcoder", 1: "sae", 2: "sae"})
    assert counts.loc["sae"].tolist() == [0, 1, 1, 0]
    assert counts.loc["transcoder"].tolist() == [1, 0, 0, 0]


def test_notes_are_on_disk_and_belong_to_their_items(tmp_path: Path) -> None:
    store = RatingStore(tmp_path / "r.json", 3, "anna")
    store.annotate(2, "only „caught“?")
    store.rate(0, "not")
    store.annotate(0, "noise")
    again = RatingStore(tmp_path / "r.json", 3, "anna")
    assert again.notes == {2: "only „caught“?", 0: "noise"} and list(again.answers) == [0]
    assert again.table().to_dict("records") == [
        {"number": 0, "rating": "not", "context_free": False, "note": "noise"}
    ]
    again.annotate(0, " ")
    assert RatingStore(tmp_path / "r.json", 3, "anna").notes == {2: "only „caught“?"}
    with pytest.raises(InputError, match="item 3: expected 0 to 2"):
        store.annotate(3, "beyond")
    with unchecked_types(), pytest.raises(InputError, match="note 7: expected a valid string"):
        store.annotate(1, 7)  # type: ignore[arg-type]
    edit_json(tmp_path / "r.json", notes={"9": "beyond"})
    with pytest.raises(InputError, match=r"is no ratings file: items \[9\] of 3; move it away"):
        RatingStore(tmp_path / "r.json", 3, "anna")
    edit_json(tmp_path / "r.json", notes={}, format="tclib-ratings-4")
    with pytest.raises(InputError, match="is no ratings file.*tclib-ratings-4"):
        RatingStore(tmp_path / "r.json", 3, "anna")


def test_ratings_of_other_pages_are_not_taken_for_these(tmp_path: Path) -> None:
    mine, others = (pages_hash([Item(i, f"{said} {i}") for i in range(3)]) for said in ("a", "b"))
    RatingStore(tmp_path / "r.json", 3, "anna", mine).rate(0, "not")
    assert RatingStore(tmp_path / "r.json", 3, "anna", mine).answers.keys() == {0}
    with pytest.raises(InputError, match=f"of other pages .{mine[:12]}, not {others[:12]}"):
        RatingStore(tmp_path / "r.json", 3, "anna", others)
    RatingStore(tmp_path / "r.json", 3, "anna").rate(
        1, "not"
    )  # who does not say keeps what is known
    assert RatingStore(tmp_path / "r.json", 3, "anna", mine).answers.keys() == {0, 1}
    edit_json(tmp_path / "r.json", pages="")  # from a format that did not say
    RatingStore(tmp_path / "r.json", 3, "anna", others).rate(2, "not")
    with pytest.raises(InputError, match="of other pages"):
        RatingStore(tmp_path / "r.json", 3, "anna", mine)


def test_files_of_the_first_format_are_read_and_go_on(tmp_path: Path) -> None:
    answers = {"1": {"rating": "maybe", "context_free": True}}
    old = {"format": "tclib-ratings-1", "rater": "anna", "n_items": 3, "answers": answers}
    (tmp_path / "r.json").write_text(json.dumps(old))
    store = RatingStore(tmp_path / "r.json", 3, "anna")
    assert store.table()["rating"].tolist() == ["maybe"] and store.next_item() == 0
    store.annotate(1, "or not")
    again = RatingStore(tmp_path / "r.json", 3, "anna")
    assert again.answers == {1: answers["1"]} and again.notes == {1: "or not"}


def rated(folder: Path, rater: str, *ratings: str, n_items: int = 3) -> RatingStore:
    store = RatingStore(ratings_path(folder, rater), n_items, rater)
    for number, rating in enumerate(ratings):
        store.rate(number, rating)  # type: ignore[arg-type]
    return store


def test_a_spreadsheet_has_no_formulas_and_no_origin_before_all_is_rated(tmp_path: Path) -> None:
    anna, ben = rated(tmp_path, "anna", "not", "maybe", "not"), rated(tmp_path, "ben", "maybe")
    anna.annotate(1, "=HYPERLINK(1)")
    assert raters_of(tmp_path) == ["anna", "ben"]
    table = export_table([anna, ben])
    assert tuple(table) == EXPORTED
    assert table["number"].tolist() == [1, 2, 3, 1] and table["rater"].tolist()[-1] == "ben"
    assert table["note"].tolist() == ["", "'=HYPERLINK(1)", "", ""]
    origin = {0: "transcoder", 1: "sae_mlp_in", 2: "transcoder"}
    with pytest.raises(InputError, match="'ben' has rated 1 of 3 items: origins are told when all"):
        export_table([anna, ben], origin)
    assert export_table([anna], origin)["origin"].tolist() == list(origin.values())


class Page:
    """The widget's parts, and its keys as the listener presses them."""

    def __init__(self, widget: Any) -> None:
        top, self.row, self.note_row, _, self.results, self.view, self.listener = widget.children
        self.bar, self.progress, self.asking = top.children
        self.free = self.row.children[-1]
        self.classes = widget._dom_classes

    def press(self, key: str) -> None:
        name = f"tclib-key-{key}" if key.islower() else f"tclib-key-shift-{key.lower()}"
        (button,) = (b for b in self.row.children if name in b._dom_classes)
        button.click()

    @property
    def note(self) -> Any:
        (field,) = self.note_row.children
        return field


ORIGIN = {0: "transcoder", 1: "sae_mlp_in", 2: "sae_mlp_in"}
ITEMS = [Item(i, f"<b>page {i}</b>") for i in range(3)]


def test_the_widget_rates_by_key_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    store = RatingStore(tmp_path / "r.json", 3, "anna")
    page = Page(rating_widget(ITEMS, store, ORIGIN))
    assert "page 0" in page.view.value and page.progress.value == "0 of 3"
    page.press("I")
    assert store.answers[0] == {"rating": "interpretable", "context_free": True}
    assert "page 1" in page.view.value and page.progress.value == "1 of 3" and page.bar.value == 1
    assert not page.free.value
    page.press("n")
    page.press("b")
    assert "page 1" in page.view.value and "rated not" in page.view.value
    page.press("m")
    assert store.answers[1] == {"rating": "maybe", "context_free": False}
    again = Page(rating_widget(ITEMS, RatingStore(tmp_path / "r.json", 3, "anna"), ORIGIN))
    assert "page 2" in again.view.value and again.progress.value == "2 of 3"
    again.press("b")
    again.press("b")
    assert "page 0" in again.view.value and again.free.value
    again.press("b")
    assert "page 0" in again.view.value
    again.free.value = False
    again.press("i")
    again.free.value = True
    again.press("n")
    assert "All items are rated" in again.view.value and not again.note_row.children
    held = RatingStore(tmp_path / "r.json", 3, "anna")
    assert held.answers[0] == {"rating": "interpretable", "context_free": False}
    assert held.answers[2] == {"rating": "not", "context_free": True}
    again.press("n")
    assert held.answers == again_answers(tmp_path)


def again_answers(folder: Path) -> dict[int, Any]:
    return RatingStore(folder / "r.json", 3, "anna").answers


def test_a_note_that_arrives_late_goes_to_its_own_item(tmp_path: Path) -> None:
    store = RatingStore(tmp_path / "r.json", 3, "anna")
    page = Page(rating_widget(ITEMS, store, ORIGIN))
    first = page.note
    first.value = "on"
    page.press("n")
    first.value = "only at full stops"  # the browser had held it back
    assert page.note.value == "" and store.notes == {0: "only at full stops"}
    page.press("b")
    assert page.note.value == "only at full stops"


def test_origins_are_told_when_all_is_rated_or_the_rater_asks(tmp_path: Path) -> None:
    store, other = RatingStore(tmp_path / "r.json", 3, "anna"), rated(tmp_path, "ben", "not")
    page = Page(rating_widget(ITEMS, store, ORIGIN, other))
    page.press("n")
    assert page.results.value == ""
    assert "sae" not in page.view.value + page.progress.value
    page.asking.click()
    assert "sae_mlp_in" not in page.results.value and "transcoder" in page.results.value
    assert "the first 1 before any result was shown" in page.results.value
    page.press("m")
    assert "sae_mlp_in" in page.results.value and "on 1 items: κ nan" in page.results.value
    assert RatingStore(tmp_path / "r.json", 3, "anna").n_when_shown == 1
    blind = Page(rating_widget(ITEMS, rated(tmp_path, "eve", "not", "not", "maybe"), ORIGIN))
    assert "all blind" in blind.results.value and "sae_mlp_in" in blind.results.value


def test_a_second_rater_is_compared_in_the_results(tmp_path: Path) -> None:
    one = rated(tmp_path, "anna", "not", "maybe", "not")
    said = Page(rating_widget(ITEMS, one, ORIGIN, rated(tmp_path, "ben", "not", "maybe", "not")))
    assert "With ben, on 3 items: κ 1.00 for the ratings" in said.results.value
    none = Page(rating_widget(ITEMS, one, ORIGIN, rated(tmp_path, "eve")))
    assert "'anna' and 'eve' have rated no item in common" in none.results.value
    empty = Page(rating_widget(ITEMS, rated(tmp_path, "zoe")))
    empty.asking.click()
    assert empty.results.value == "<p>Nothing is rated yet.</p>"


def test_the_listener_presses_what_the_page_has(tmp_path: Path) -> None:
    page = Page(rating_widget(ITEMS, RatingStore(tmp_path / "r.json", 3, "anna"), ORIGIN))
    assert _LISTENER in page.listener.outputs[0]["data"]["text/html"]
    assert "tclib-rating" in page.classes and ".tclib-rating" in _LISTENER
    assert "data-item" in page.view.value and "[data-item]" in _LISTENER
    buttons = {name for button in page.row.children for name in button._dom_classes}
    assert buttons == {f"tclib-key-{key}" for key in ("i", "m", "n", "b")} | {
        f"tclib-key-shift-{key}" for key in ("i", "m", "n")
    }
