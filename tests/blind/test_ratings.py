"""Ratings that survive a restart, agreement by hand, pages that hide where a feature comes from."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from tiny import unchecked_types

from tclib.blind.ratings import Item, RatingStore, agreement, counts_by_origin, rating_widget
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


def test_the_widget_rates_by_key_and_by_button(tmp_path: Path) -> None:
    store = RatingStore(tmp_path / "ratings.json", 3, "anna")
    items = [Item(i, f"<b>page {i}</b>") for i in range(3)]
    bar, row, view = rating_widget(items, store).children
    keys = row.children[-1]
    assert "page 0" in view.value
    keys.value = "I"
    assert store.answers[0] == {"rating": "interpretable", "context_free": True}
    assert "page 1" in view.value and bar.value == 1 and keys.value == ""
    keys.value = "x"  # no rating
    assert 1 not in store.answers
    row.children[2].click()
    assert store.answers[1] == {"rating": "not", "context_free": False}
    keys.value = "b"
    assert "page 1" in view.value
    keys.value = "m"
    assert store.answers[1]["rating"] == "maybe"
    keys.value = "n"
    assert "All items are rated" in view.value
    again = rating_widget(items, RatingStore(tmp_path / "ratings.json", 3, "anna"))
    assert "All items are rated" in again.children[2].value
