"""Top examples against a full sort, bands by hand, dashboards that escape what they show."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import random_rows, random_transcoder, tiny_lm

from tclib.dictionaries.dictionary import Dictionary
from tclib.features.dashboard import build_dashboard
from tclib.features.examples import (
    HISTOGRAM_EDGES,
    band_shares,
    feature_activations,
    sample_in_bands,
    top_examples,
)
from tclib.features.html import dashboard_html, save_page
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError


def transcoder(layer: int = 1, kind: str = "relu") -> Dictionary:
    return random_transcoder(layer, kind, torch.float32)


def dense(lm: LanguageModel, dictionary: Dictionary, rows: torch.Tensor) -> torch.Tensor:
    site = dictionary.config.input_site
    acts = dictionary.encode(lm.read(rows.long(), {site})[site])
    acts[rows == lm.bos_id] = 0.0
    return acts


def test_activations_are_the_dictionarys_with_bos_silent() -> None:
    lm, dictionary, rows = tiny_lm(), transcoder(), random_rows(20)
    found = feature_activations(lm, dictionary, [3, 7], rows)
    expected = dense(lm, dictionary, rows)[..., [3, 7]].permute(2, 0, 1)
    torch.testing.assert_close(found, expected)
    assert (found[:, :, 0] == 0).all()
    with pytest.raises(
        InputError, match="feature 40 is out of range: layer .* has features 0 to 39"
    ):
        feature_activations(lm, dictionary, [40], rows)
    with pytest.raises(InputError, match="raise memory_limit_gib above"):
        feature_activations(lm, dictionary, [1], rows, memory_limit_gib=1e-9)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_top_examples_are_those_of_a_full_sort(kind: str) -> None:
    lm, dictionary, rows = tiny_lm(), transcoder(kind=kind), random_rows(50)
    acts = dense(lm, dictionary, rows).flatten(0, 1)
    found = top_examples(lm, dictionary, rows, k=5)
    expected = acts.topk(5, dim=0).values.T.numpy()
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    for feature in range(40):
        for value, row, pos in zip(
            found.values[feature], found.row[feature], found.pos[feature], strict=True
        ):
            if value > 0:
                assert acts[row * 16 + pos, feature] == pytest.approx(value, rel=1e-6)
            else:
                assert (row, pos) == (-1, -1)
    fired = (acts > 0).sum(0).numpy()
    np.testing.assert_array_equal(found.n_fired, fired)
    np.testing.assert_array_equal(found.histogram.sum(1), fired)
    np.testing.assert_allclose(found.frequency, fired / (50 * 15))
    counts, _ = np.histogram(acts[:, 3][acts[:, 3] > 0].clamp(min=1e-3).numpy(), HISTOGRAM_EDGES)
    np.testing.assert_array_equal(found.histogram[3], counts)
    with pytest.raises(InputError, match="k 0"):
        top_examples(lm, dictionary, rows, 0)


def test_samples_are_spread_over_the_range_and_never_twice() -> None:
    acts = torch.zeros(10, 20)
    acts[:, 1:] = torch.linspace(0.1, 10.0, 190).view(10, 19)
    table = sample_in_bands(acts, 50)
    assert len(table) == 50 == len(table.drop_duplicates(["row", "pos"]))
    assert table["activation"].iloc[0] == pytest.approx(10.0)
    assert table["activation"].iloc[-1] == pytest.approx(0.1)
    gaps = -np.diff(table["activation"])
    assert gaps.max() < 0.3
    assert table["band"].value_counts().to_dict().keys() == set(range(5))
    assert table["band"].iloc[0] == 4  # the last band holds the maximum
    for line in table.itertuples():
        assert acts[line.row, line.pos] == pytest.approx(line.activation)
        assert 2.0 * line.band <= line.activation <= 2.0 * (line.band + 1) + 1e-9


def test_crowded_values_still_give_different_examples() -> None:
    acts = torch.zeros(1, 8)
    acts[0, 1:] = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    assert sorted(sample_in_bands(acts, 7)["pos"]) == list(range(1, 8))
    with pytest.raises(InputError, match="8 examples asked for, but the feature fires on 7 tokens"):
        sample_in_bands(acts, 8)
    with pytest.raises(InputError, match="never fires"):
        sample_in_bands(torch.zeros(1, 8), 1)


def test_equal_activations_are_sampled_in_their_order_in_the_text_whatever_rounding_says() -> None:
    """The same context twice gives the same activation, but for the batch it was computed in."""
    exact = torch.tensor([[0.0, 2.0, 1.0, 2.0], [0.0, 2.0, 1.0, 0.0]])
    expected = [[0, 1], [0, 2]]
    for seed in range(8):
        noise = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        found = sample_in_bands(exact * (1 + 1e-6 * noise), n_examples=2)
        assert found[["row", "pos"]].to_numpy().tolist() == expected


def test_shares_by_hand() -> None:
    acts = torch.tensor([[0.0, 1.0, 2.0, 9.0, 10.0]])
    shares = band_shares(acts, 10)
    assert shares["share"].tolist() == [0.1, 0.1, 0.0, 0.0, 0.2]
    assert shares["high"].iloc[-1] == 10.0


def test_a_dashboard_holds_what_was_computed() -> None:
    lm, dictionary, rows = tiny_lm(), transcoder(), random_rows(30)
    acts = feature_activations(lm, dictionary, [3], rows)[0]
    board = build_dashboard(lm, dictionary, 3, rows, {0: transcoder(0)}, n_examples=10)
    assert board.frequency == pytest.approx(float((acts > 0).sum()) / (30 * 15))
    assert sum(count for *_, count in board.histogram) == int((acts > 0).sum())
    assert set(board.tables) == {
        "logits",
        "de-embedding",
        "extended de-embedding",
        "pullback onto layer 0",
    }
    for example in board.examples:
        assert example.acts[example.centre] == pytest.approx(example.activation)
        own = lm.token_strings([int(rows[example.row, example.pos])])[0]
        assert example.tokens[example.centre] == own
    dead = transcoder()
    dead.b_enc[3] = -1e6
    with pytest.raises(InputError, match="feature 3 of layer 1 never fires on these 450 tokens"):
        build_dashboard(lm, dead, 3, rows)


def test_pages_escape_everything_and_load_nothing(tmp_path: Path) -> None:
    lm, dictionary, rows = tiny_lm(), transcoder(), random_rows(30)
    board = build_dashboard(lm, dictionary, 3, rows, n_examples=5)
    evil = "<script>alert('x')</script>&\""
    object.__setattr__(board.examples[0], "tokens", (evil,) * len(board.examples[0].tokens))
    object.__setattr__(board, "tables", {evil: pd.DataFrame({"token": [evil], "score": [1.0]})})
    path = save_page(tmp_path / "page.html", [dashboard_html(board, evil)], evil)
    text = path.read_text()
    assert "<script" not in text and "alert(&#x27;x&#x27;)" in text
    assert not re.search(r"(src|href|url)\s*[=(]|https?:", text)
    assert "prefers-color-scheme" in text or "color-scheme: light dark" in text
