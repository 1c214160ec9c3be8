"""Steps 04 and 05 on the bundled model: ledgers, grades, pages that hide where a feature comes from."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from tiny import random_rows, small_preset

from tclib.blind.investigator import Hypothesis
from tclib.blind.language import OneOf
from tclib.blind.latents import LabelledRows
from tclib.blind.ledger import load_ledger
from tclib.blind.predicates import Predicate
from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import attribution_graph
from tclib.circuits.interventions import ablation_table
from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary
from tclib.figures.comparison import proxy_figure
from tclib.replication import case_studies, circuits, comparison, comparison_tables, known_latents
from tclib.replication.artifacts import CaseStudies, Comparison
from tclib.replication.comparison import proxy_rating, rating_of
from tclib.replication.run import Run
from tclib.support.errors import InputError

mpl.use("Agg")
pytestmark = pytest.mark.slow


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
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(small_preset(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def compared(run: Run) -> Comparison:
    return run.comparison


def test_pages_do_not_tell_where_a_feature_comes_from(compared: Comparison) -> None:
    pages = compared.pages()
    shown = [compared.origin[page.number] for page in pages]
    assert len(pages) == 8 and shown.count("transcoder") == shown.count("sae_mlp_in") == 4
    assert list(compared.origin.values()).count("sae_mlp_out") == 6
    shapes = set()
    for page in pages:
        assert not re.search("transcoder|sae|layer|embedding", page.html, re.IGNORECASE)
        shapes.add(tuple(re.findall(r"<h3>([^(<]*)", page.html)))
    assert len(shapes) == 1
    order = [compared.origin[i] for i in range(8)]
    assert order != sorted(order)


def test_proxy_shares_and_intervals_are_of_the_items(run: Run, compared: Comparison) -> None:
    shares = comparison_tables.proxy_shares(compared)
    items = compared.items.assign(kind=compared.items["number"].map(compared.origin))
    for line in shares.itertuples():
        own = items[items["kind"] == line.kind]["f1"].fillna(0)
        assert line.interpretable == pytest.approx((own >= line.threshold).mean())
        assert line.low <= line.interpretable <= line.high
    measured = comparison.measured(run)["interpretability"]
    assert measured.low <= measured.estimate <= measured.high
    at_threshold = shares[shares["threshold"] == comparison_tables.INTERPRETABLE_F1].set_index(
        "kind"
    )
    own = at_threshold["interpretable"]
    assert measured.estimate == pytest.approx(own["transcoder"] - own["sae_mlp_in"])
    for word in ("*Paper:*", "*Ours:*"):
        assert word in comparison.comparison_in_words(run)
    assert len(proxy_figure(shares).axes) == 2
    assert set(compared.latents["kind"]) == {"transcoder", "sae_mlp_in", "sae_mlp_out"}
    assert compared.pairs["n_drawn"].tolist() == [6, 6, 6]
    assert (compared.pairs["n_live"] >= 6).all()
    assert set(comparison.measured(run)) == {"interpretability", "interpretability (sae_mlp_out)"}
    assert "d_model" in comparison.pairs_in_words(compared)
    assert len(comparison.claims(run)) == 3 and compared.items["latent_f1"].between(0, 1).all()
    assert len(known_latents.latent_differences(compared).columns) == 5
    assert comparison_tables.calibration(compared)["n"].max() == 18
    assert compared.latents["f1"].between(0, 1).all()


def test_case_studies_leave_ledgers_dashboards_and_grades(run: Run) -> None:
    studies = run.studies
    assert studies.table["kind"].tolist() == ["full", "restricted", "restricted", "restricted"]
    features, kinds = studies.table["feature"], studies.table["dictionary"].tolist()
    assert features[0] == features[1] != features[2]
    assert kinds == ["transcoder", "transcoder", "transcoder", "sae_mlp_in"]
    assert set(studies.table["grade"]) <= {"success", "mostly", "failure"}
    manifest = json.loads((studies.folder / "manifest.json").read_text())
    for line in studies.table.itertuples():
        entries = load_ledger(studies.ledger_path(line.study), line.seal)
        assert manifest["summary"]["seals"][line.study] == line.seal
        order = [entry.kind for entry in entries]
        assert order.index("hypothesis") < order.index("unblind")
        assert f"feature {line.feature}" in studies.dashboard(line.feature, line.dictionary)
        assert line.f1 <= 1 and line.floor <= 1 and line.ceiling <= 1
        assert len(case_studies.first_sources(entries))
    counts = case_studies.grade_counts(studies.table)
    assert counts["paper"].tolist() == [5, 2, 2]
    assert counts.sum().tolist() == [9, 1, 2, 1]
    assert case_studies.score_summary(studies.table)["n"].tolist() == [1, 2, 1]
    assert case_studies.studies_in_words(run).startswith("*Ours:* 4 studies of layer 2")
    assert len(studies.leaks) and not len(case_studies.leaks(run))
    told = case_studies.told(studies.table)
    assert 1 <= len(told) <= 2
    study, feature = told.iloc[0][["study", "feature"]]
    assert case_studies.circuit_figure(run, study, int(feature)).axes
    missing = replace(run.preset, case_studies=replace(run.preset.case_studies, layer=9, n_sae=0))
    (run.step(case_studies.STEP).folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="case_studies.layer 9: expected 0 to 3 for demo"):
        _ = Run(missing).studies
    # As after a kill in front of the manifest, when ledgers lie there already.
    pd.testing.assert_frame_equal(Run(run.preset).studies.table, studies.table)


def test_a_pair_needs_both_kinds(run: Run) -> None:
    rows = run.corpus.evaluation
    with pytest.raises(InputError, match="that fire: transcoder; expected a transcoder and an SAE"):
        comparison.choose_matched(run.lm, run.transcoders, rows)
    silent = {name: silenced(one) for name, one in run.swept.dictionaries.items()}
    with pytest.raises(InputError, match="that fire: none; expected a transcoder and an SAE"):
        comparison.choose_matched(run.lm, silent, rows)


def test_all_live_features_are_drawn_where_there_are_fewer_and_too_few_to_rate_are_said(
    run: Run,
) -> None:
    one = next(iter(run.swept.dictionaries.values()))
    many = replace(run.preset.comparison, n_features=100_000)
    found = comparison._draw(
        Run(replace(run.preset, comparison=many)), one, torch.Generator().manual_seed(0)
    )
    assert len(found.features) == found.n_live == len(found.acts)
    more = replace(many, n_rated=10_000)
    with pytest.raises(
        InputError, match=r"comparison.n_rated 10000: transcoder has \d+ live features"
    ):
        comparison._draw(
            Run(replace(run.preset, comparison=more)), one, torch.Generator().manual_seed(0)
        )


def silenced(one: Dictionary) -> Dictionary:
    """The same dictionary with features that never fire."""
    return Dictionary(one.config, **{**one.parameters(), "b_enc": torch.full_like(one.b_enc, -1e3)})


def test_features_that_never_fire_on_the_held_out_rows_are_said_to_be_ungraded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run.corpus.evaluation[:2]
    held_out = LabelledRows(rows, torch.full_like(rows, -1), ())
    studies = case_studies._Studies(run)
    studies.held_out = held_out
    silent = replace(studies.subjects[0], held_out_acts=torch.zeros(rows.shape))
    session = case_studies.session_on(run, silent.feature, restricted=True)
    said = Hypothesis("a word", OneOf(frozenset({20})), 0.0, 1.0)
    line = case_studies._graded(studies, said, session, silent, OneOf(frozenset({20})))
    origin = {
        "study": "5_full",
        "dictionary": "transcoder",
        "layer": 2,
        "feature": 5,
        "kind": "full",
    }
    table = pd.DataFrame([{**origin, "seal": "", **line}])
    assert set(run.studies.table) - {*table} <= {
        name for name in run.studies.table if "latent" in name
    }
    with monkeypatch.context() as patch:
        patch.setattr(
            run,
            "studies",
            CaseStudies(table, run.studies.leaks, run.studies.papers, run.studies.folder),
        )
        words = case_studies.studies_in_words(run)
        assert "0 of 1 full" in words and words.endswith(
            "1 never fire there and could not be graded."
        )
        assert len(case_studies.why_failed(run)) == len(case_studies.claims(run)) == 1


def test_a_prompt_without_a_feature_over_another_is_said_to_lack_it(run: Run) -> None:
    frozen, root = run.prompt
    (found,) = sources(frozen, [root])
    layer, feature, pos = circuits.strongest_feature(found)
    assert (
        layer > 0
        and frozen.parts[layer].dictionary.encode(frozen.cache.mlp_in[layer])[0, pos, feature] > 0
    )
    by_layer = {one.config.layer: one for one in run.transcoders.values()}
    for active, message in (((0,), r"layers \[0\], two are needed"), ((), "layers none, two are")):
        ones = [one if layer in active else silenced(one) for layer, one in by_layer.items()]
        alone = FrozenPrompts(run.lm, frozen.cache.tokens, ones)
        with pytest.raises(InputError, match=f"features at the prompt's last token: {message}"):
            circuits.strongest_feature(sources(alone, [root])[0])
    with pytest.raises(InputError, match="no feature is active on the prompt"):
        ablation_table(alone, attribution_graph(alone, [root]), root)


def test_the_l0_of_a_pair_leaves_out_every_bos(run: Run) -> None:
    """Packed rows have BOS inside them too."""
    rows = run.corpus.evaluation[:16].long()
    assert int((rows[:, 1:] == run.lm.bos_id).sum()) > 0
    name, one = next(iter(run.swept.dictionaries.items()))
    site = one.config.input_site
    z = one.encode(run.lm.read(rows, {site})[site])
    expected = float((z > 0).sum(-1)[rows != run.lm.bos_id].double().mean())
    assert comparison.mean_l0s(run.lm, {name: one}, rows)[name] == pytest.approx(expected, rel=1e-6)
