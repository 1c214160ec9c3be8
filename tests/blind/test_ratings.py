"""Ratings that survive a restart, agreement by hand, pages that hide where a feature comes from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from tiny import random_rows, small_preset, unchecked_types

from tclib.blind.ledger import load_ledger
from tclib.blind.predicates import Predicate
from tclib.blind.ratings import Item, RatingStore, agreement, counts_by_origin, rating_widget
from tclib.figures.comparison import proxy_figure
from tclib.models.language_model import LanguageModel
from tclib.replication import case_studies, comparison
from tclib.replication.comparison import Comparison, proxy_rating, rating_of
from tclib.replication.model_and_data import prepare_corpus
from tclib.replication.presets import Preset
from tclib.replication.sweep import train_sweep
from tclib.replication.transcoders import train_transcoders
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
    with pytest.raises(InputError, match="no ratings file"):
        RatingStore(path, 3, "anna")


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


# -- the proxy and the two steps on the bundled model ---------------------------------------------


def test_the_proxy_passes_a_planted_feature_and_fails_noise() -> None:
    rows = random_rows(300, 24)
    planted = Predicate(current=frozenset({20, 21})).holds(rows, 0).float() * 3
    passed = proxy_rating(rows[:200], planted[:200], rows[200:], planted[200:], 0)
    assert (passed["rating"], passed["f1"], passed["context_free"]) == ("interpretable", 1.0, True)
    noise = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0))
    noise = torch.where((noise > 0.97) & (rows != 0), noise, torch.zeros(()))
    assert proxy_rating(rows[:200], noise[:200], rows[200:], noise[200:], 0)["rating"] == "not"
    silent = torch.zeros(100, 24)
    assert proxy_rating(rows[:200], planted[:200], rows[200:], silent, 0)["rating"] == "not"
    assert [rating_of(f1) for f1 in (0.61, 0.6, 0.31, 0.29)] == [
        "interpretable",
        "interpretable",
        "maybe",
        "not",
    ]


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    return small_preset(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def compared(preset: Preset) -> Comparison:
    lm = LanguageModel.load("demo")
    corpus = prepare_corpus(preset, lm)
    sweep = train_sweep(preset, lm, corpus).dictionaries
    return comparison.make_comparison(preset, lm, corpus, sweep)


def test_pages_do_not_tell_where_a_feature_comes_from(compared: Comparison) -> None:
    pages = compared.pages()
    assert len(pages) == 8 and sorted(compared.origin.values()).count("transcoder") == 4
    shapes = set()
    for page in pages:
        assert not re.search("transcoder|sae|layer|embedding", page.html, re.IGNORECASE)
        shapes.add(tuple(re.findall(r"<h3>([^(<]*)", page.html)))
    assert len(shapes) == 1
    order = [compared.origin[i] for i in range(8)]
    assert order != sorted(order)


def test_proxy_shares_and_intervals_are_of_the_items(compared: Comparison) -> None:
    shares = comparison.proxy_shares(compared, seed=0)
    items = compared.items.assign(kind=compared.items["number"].map(compared.origin))
    for line in shares.itertuples():
        own = items[items["kind"] == line.kind]["f1"].fillna(0)
        assert line.interpretable == pytest.approx((own >= line.threshold).mean())
        assert line.low <= line.interpretable <= line.high
    value, low, high = comparison.difference_interval(compared, 0)
    assert low <= value <= high
    for word in ("*Paper:*", "*Ours:*", "*Differs because*"):
        assert word in comparison.caption(compared, 0)
    assert len(proxy_figure(shares).axes) == 2
    assert set(compared.latents["kind"]) == {"transcoder", "sae_mlp_out"}
    assert compared.latents["f1"].between(0, 1).all()


def test_case_studies_leave_ledgers_dashboards_and_grades(preset: Preset) -> None:
    lm = LanguageModel.load("demo")
    corpus = prepare_corpus(preset, lm)
    transcoders = train_transcoders(preset, lm, corpus).dictionaries
    studies = case_studies.make_case_studies(preset, lm, corpus, transcoders)
    assert studies.table["kind"].tolist() == ["full", "restricted"]
    assert set(studies.table["grade"]) <= {"success", "mostly", "failure"}
    for feature in studies.table["feature"]:
        entries = load_ledger(studies.ledger_path(int(feature)))
        kinds = [entry.kind for entry in entries]
        assert kinds.index("hypothesis") < kinds.index("unblind")
        assert f"feature {feature}" in studies.dashboard(int(feature))
    counts = case_studies.grade_counts(studies.table)
    assert counts["paper"].tolist() == [5, 2, 2] and counts["ours"].sum() == 2
    for word in ("*Paper:*", "*Ours:*", "*Differs because*"):
        assert word in case_studies.caption(studies)
    missing = replace(preset, case_studies=replace(preset.case_studies, layer=9), name="other")
    with pytest.raises(InputError, match="no transcoder at layer 9"):
        case_studies.make_case_studies(missing, lm, corpus, transcoders)


def test_a_pair_needs_both_kinds(preset: Preset) -> None:
    lm = LanguageModel.load("demo")
    corpus = prepare_corpus(preset, lm)
    transcoders = train_transcoders(preset, lm, corpus).dictionaries
    with pytest.raises(InputError, match="expected both kinds"):
        comparison.choose_pair(lm, transcoders, corpus.evaluation)
