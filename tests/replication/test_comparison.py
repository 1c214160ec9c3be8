"""Step 05: matched pairs, Table 1 line by line, its power, the proxy against known latents, ratings exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import make_lm, random_rows, random_transcoder

from tclib.dictionaries.dictionary import Dictionary
from tclib.replication import comparison, comparison_tables
from tclib.replication.artifacts import Comparison
from tclib.replication.comparison import choose_matched, proxy_rating
from tclib.replication.comparison_tables import COMPARATORS, LINES, Hits, table_1
from tclib.replication.export_ratings import export_ratings
from tclib.replication.presets import Preset, load_preset
from tclib.replication.verdicts import verdict
from tclib.support.errors import InputError

KINDS = ("transcoder", *COMPARATORS)


def made(**counts: tuple[int, int, int, int]) -> tuple[pd.DataFrame, dict[int, str]]:
    """Ratings by kind: how many interpretable, maybe, not, and how many of the first context-free."""
    lines, origin = [], {}
    for kind, (interpretable, maybe, bad, free) in counts.items():
        ratings = ["interpretable"] * interpretable + ["maybe"] * maybe + ["not"] * bad
        for i, rating in enumerate(ratings):
            origin[len(lines)] = kind
            line = {"number": len(lines), "rating": rating, "context_free": i < free}
            lines.append({**line, "n_tokens": i + 1 if i < free else 0})
    return pd.DataFrame(lines), origin


PAPERS = {"transcoder": (41, 8, 1, 6), "sae_mlp_in": (38, 8, 4, 16)}


def compared(ratings: pd.DataFrame, origin: dict[int, str], **columns: object) -> Comparison:
    items = ratings.assign(has_page=True, f1=1.0, **columns)  # type: ignore[arg-type]
    return Comparison(pd.DataFrame(), items, pd.DataFrame(), origin, Path("."))


def test_the_papers_counts_give_the_papers_table() -> None:
    table = table_1(*made(**PAPERS))
    assert table["line"].tolist() == list(LINES)
    assert table["transcoder"].tolist() == [41, 8, 1, 6, 2, 35]
    assert table["sae_count"].tolist() == [38, 8, 4, 16, 2, 22]
    own = table[table["line"] != comparison_tables.ON_FEW_TOKENS]
    assert (own["paper_transcoder"] == own["transcoder"]).all()
    assert (own["paper_sae_count"] == own["sae_count"]).all()
    assert own["p"].tolist() == own["paper_p"].tolist()
    first, free = table.iloc[0], table.iloc[3]
    assert first["p"] == pytest.approx(0.62, abs=0.01) and first["difference"] == pytest.approx(
        0.06
    )
    assert first["low"] < 0 < first["high"]
    assert free["p"] < 0.05 and free["high"] < 0  # 6 against 16: fewer


def test_the_other_sae_stands_beside_without_the_papers_counts() -> None:
    table = table_1(*made(**PAPERS, sae_mlp_out=(10, 0, 10, 0)))
    other = table[table["sae"] == "sae_mlp_out"]
    assert len(other) == len(LINES) and other["paper_p"].isna().all()
    assert other.iloc[0][["transcoder", "of", "sae_count", "sae_of"]].tolist() == [41, 50, 10, 20]
    ratings, origin = made(**PAPERS)
    by_hand = table_1(ratings.drop(columns="n_tokens"), origin)
    assert comparison_tables.ON_FEW_TOKENS not in set(by_hand["line"])


def test_the_papers_own_differences_need_so_many_features() -> None:
    found = compared(*made(**PAPERS))
    table = comparison_tables.power_table(found).set_index("line")
    assert table["needed"].tolist() == [756, 76] and table["drawn"].tolist() == [50, 50]
    assert table.loc["interpretable", "p"] == pytest.approx(0.62, abs=0.01)


def test_the_context_free_line_of_the_closing_table_follows_the_interval() -> None:
    fewer = comparison._context_free_claim(compared(*made(**PAPERS)))
    assert fewer["verdict"] == "fewer" and "6 of 50 against 16 of 50 (sae_mlp_in)" in fewer["ours"]
    swapped = dict(zip(PAPERS, reversed(PAPERS.values()), strict=True))
    assert comparison._context_free_claim(compared(*made(**swapped)))["verdict"] == "more"
    same = made(transcoder=(4, 0, 0, 1), sae_mlp_out=(4, 0, 0, 1))
    claim = comparison._context_free_claim(compared(*same))
    assert claim["verdict"] == "no difference seen" and "(sae_mlp_out)" in claim["ours"]


def test_without_features_a_difference_says_nothing() -> None:
    found = comparison_tables.difference(Hits(0, 0), Hits(1, 2))
    assert np.isnan(found.estimate) and verdict("interpretability", found) == "not applicable"


def test_passes_are_context_free_or_not() -> None:
    shares = comparison_tables.proxy_shares(compared(*made(**PAPERS)))
    parts = shares["context_free"] + shares["with_context"]
    assert parts.tolist() == pytest.approx(shares["interpretable"].tolist())


def test_the_proxy_is_calibrated_by_hand() -> None:
    ratings, origin = made(transcoder=(3, 1, 2, 0))
    latent_f1 = [0.9, 0.5, 0.1, 0.7, 0.49, 0.0]  # three of which stand for a latent
    table = comparison_tables.calibration(compared(ratings, origin, latent_f1=latent_f1))
    own = table[table["kind"] == "all"].set_index("measure")
    assert own.loc["sensitivity", ["n_hits", "n"]].tolist() == [2, 3]
    assert own.loc["specificity", ["n_hits", "n"]].tolist() == [2, 3]
    assert own.loc["agreement", ["n_hits", "n"]].tolist() == [4, 6]
    assert (own["low"] < own["share"]).all() and (own["share"] < own["high"]).all()
    assert comparison_tables.calibration(compared(ratings, origin, latent_f1=np.nan)).empty


def test_the_relative_l0_is_of_the_papers_model() -> None:
    assert comparison_tables.relative_l0() == pytest.approx(44.04 / 1024)


def test_bos_counts_nowhere_in_the_proxy() -> None:
    """BOS stands inside packed rows too, and fires strongest of all."""
    rows = random_rows(300, 24)
    planted = torch.isin(rows, torch.tensor([20, 21])).float() * 3
    loud = planted.where(rows != 0, 1e3)
    loud[:, 12], rows[:, 12] = 1e3, 0
    quiet = loud.where(rows != 0, 0.0)
    texts = (rows[:200], loud[:200], rows[200:], loud[200:])
    assert proxy_rating(*texts, 0) == proxy_rating(
        rows[:200], quiet[:200], rows[200:], quiet[200:], 0
    )
    only = torch.where(rows == 0, 1e3, 0.0)
    silent = proxy_rating(rows[:200], only[:200], rows[200:], only[200:], 0)
    assert silent["rating"] == "not" and silent["predicate"] == ""
    held = proxy_rating(rows[:200], quiet[:200], rows[200:], only[200:], 0)
    assert held["rating"] == "not" and held["predicate"] and np.isnan(held["f1"])


def dictionaries() -> dict[str, Dictionary]:
    one = random_transcoder(1, "relu", torch.float32)
    config = one.config
    site = {"sae_mlp_in": config.d_in, "sae_mlp_out": config.d_out}
    assert site["sae_mlp_in"] == site["sae_mlp_out"]
    return {
        f"{kind} {i}": Dictionary(replace(config, kind=kind), **one.parameters())  # type: ignore[arg-type]
        for kind in KINDS
        for i in range(3)
    }


@pytest.mark.parametrize(
    ("near", "expected"), [(None, ["a0", "b0", "c1"]), (30.0, ["a1", "b1", "c1"])]
)
def test_the_transcoder_is_near_the_papers_sparsity_and_each_sae_near_to_it(
    near: float | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = dictionaries()
    names = dict(zip(ours, (f"{letter}{i}" for letter in "abc" for i in range(3)), strict=True))
    named = {names[name]: one for name, one in ours.items()}
    paper = comparison_tables.relative_l0() * next(iter(ours.values())).config.d_out
    values = dict(zip(named, (paper, 30, 90, paper, 30, 0, 200, 2 * paper, 0), strict=True))
    values |= {"c1": 20.0} if near else {}
    monkeypatch.setattr(comparison, "mean_l0s", lambda *_: values)
    found = choose_matched(make_lm("gpt2"), named, random_rows(2), near)
    assert list(found) == list(KINDS)
    assert [next(n for n, d in named.items() if d is one) for one in found.values()] == expected


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """A run with the pages of three items and no more."""
    preset = load_preset("demo", runs_dir=tmp_path)
    folder = preset.step(comparison.STEP).folder
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    items = pd.DataFrame({"number": range(5), "has_page": [True] * 3 + [False] * 2})
    for name, table in {"items": items, "pairs": items, "latents": items}.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    kinds = ["transcoder", "sae_mlp_in", "transcoder", "transcoder", "sae_mlp_in"]
    (folder / "origin.json").write_text(json.dumps(dict(enumerate(kinds))))
    for number in range(3):
        (folder / f"item_{number}.html").write_text(f"<p>{number}</p>")
    return preset


def test_ratings_are_exported_for_spreadsheets(preset: Preset, tmp_path: Path) -> None:
    folder, out = preset.step(comparison.STEP).folder, tmp_path / "out.csv"
    with pytest.raises(InputError, match="has no ratings: rate in notebook 05"):
        export_ratings(preset, (), False, out)
    store = comparison.read_comparison(folder).ratings("Zoë")
    store.rate(0, "maybe", True)
    store.annotate(0, 'says "war", then\na year')
    with pytest.raises(InputError, match="rater 'ben': expected one of Zoë, whose ratings lie in"):
        export_ratings(preset, ["ben"], False, out)
    with pytest.raises(InputError, match="rater '../x': expected letters"):
        export_ratings(preset, ["../x"], False, out)
    with pytest.raises(InputError, match="'Zoë' has rated 1 of 3 items"):
        export_ratings(preset, ["Zoë"], True, out)
    assert not out.exists()
    export_ratings(preset, (), False, out)
    assert out.read_bytes().startswith(b"\xef\xbb\xbf")
    (line,) = pd.read_csv(out, encoding="utf-8-sig").to_dict("records")
    assert line == {
        "number": 1,
        "rating": "maybe",
        "context_free": True,
        "note": 'says "war", then\na year',
        "rater": "Zoë",
    }
    store.rate(1, "not")
    store.rate(2, "not")
    told = export_ratings(preset, (), True, tmp_path / "all.csv")
    assert told["origin"].tolist() == ["transcoder", "sae_mlp_in", "transcoder"]
    (folder / "item_1.html").write_text("<p>another</p>")
    with pytest.raises(InputError, match="ratings_Zoë.json holds ratings of other pages"):
        export_ratings(preset, (), True, tmp_path / "all.csv")


def test_a_run_without_pages_has_no_ratings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no pages: run `tclib run .*--only 05` first"):
        export_ratings(load_preset("demo", runs_dir=tmp_path), (), False, tmp_path / "out.csv")
