"""Step 06 on the bundled model: found, not assumed; curves and figures from what was computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import small_preset

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary, new_dictionary
from tclib.features.from_weights import Head
from tclib.figures.greater_than import (
    ablation_figure,
    component_figure,
    feature_curve_figure,
    harmful_figure,
)
from tclib.greater_than.feature_curves import feature_curves
from tclib.greater_than.lags import best_lags
from tclib.greater_than.task import GreaterThan
from tclib.models.controls import with_shuffled_mlp
from tclib.models.language_model import LanguageModel
from tclib.replication import greater_than
from tclib.replication import greater_than_words as words
from tclib.replication.artifacts import GreaterThanResults
from tclib.replication.greater_than import greater_than_claims, greater_than_table
from tclib.replication.run import Run
from tclib.support.errors import InputError

mpl.use("Agg")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    small = small_preset(tmp_path_factory.mktemp("runs"))
    config = replace(small.greater_than, templates=small.greater_than.templates[:1], sae_l1=(1e-3,))
    return Run(replace(small, greater_than=config))


@pytest.fixture(scope="module")
def lm(run: Run) -> LanguageModel:
    return run.lm


@pytest.fixture(scope="module")
def results(run: Run) -> GreaterThanResults:
    return run.greater_than


def test_the_mlp_and_the_head_are_those_that_matter(results: GreaterThanResults) -> None:
    """Head 2.2 of the bundled model carries the year; without it the behaviour suffers most."""
    heads = results.components[results.components["head"] >= 0]
    assert results.summary["head"] == [2, 2]
    strongest = heads.sort_values("mean_drop").iloc[-1]
    assert (strongest["layer"], strongest["head"]) == (2, 2)
    mlps = results.components[(results.components["head"] < 0) & (results.components["layer"] > 0)]
    assert results.summary["layer"] == mlps.sort_values("mean_drop").iloc[-1]["layer"]


def test_curves_begin_and_end_where_they_must(results: GreaterThanResults) -> None:
    curves, summary = results.curves, results.summary
    neurons = curves[(curves["units"] == "neurons") & (curves["ranking"] == "variance")]
    by_k = neurons.set_index("k")["value"]
    assert by_k.iloc[-1] == pytest.approx(summary["original"], abs=1e-5)
    assert by_k[0] == pytest.approx(summary["mlp_bias_only"])
    assert (curves["low"] <= curves["value"]).all() and (curves["value"] <= curves["high"]).all()
    for units in ("transcoder features", "neurons"):
        own = curves[curves["units"] == units]
        kept = own[own["ranking"] == "attribution"].set_index("k")["value"]
        removed = own[own["ranking"] == "removed, attribution"].set_index("k")["value"]
        assert kept.iloc[-1] == pytest.approx(removed[0], abs=1e-5)
        assert kept[0] == pytest.approx(removed.iloc[-1], abs=1e-5)
    assert {"SAE features", "random directions"} <= set(curves["units"])
    assert summary["n_prompts"] == 98


def test_replacing_one_mlp_after_the_other_agrees_with_the_curves_ends(
    run: Run, results: GreaterThanResults
) -> None:
    table = run.replacements.set_index("layer")
    assert list(table.index) == list(range(run.lm.n_layers))
    own = table.loc[results.summary["layer"]]
    assert own["replaced"] == pytest.approx(results.summary["all_features"], abs=1e-4)
    assert own["original"] == pytest.approx(results.summary["original"], abs=1e-5)
    assert own["kept"] == pytest.approx(own["replaced"] / own["original"])


def test_the_authors_score_is_a_brute_force_loop(lm: LanguageModel) -> None:
    """Σ over the ten strongest layer-0 features through the head: weight × W_E[YY] · f_enc."""
    task = GreaterThan.of(lm)
    one = task.subset(range(10, 20))
    generator = torch.Generator().manual_seed(0)
    first, later = (
        new_dictionary(_config(lm, layer), generator, torch.zeros(lm.d_model)) for layer in (0, 2)
    )
    frozen = FrozenPrompts(lm, one.tokens, [first, later])
    head = Head(1, 3)
    table = feature_curves(frozen, one, {0: first, 2: later}, later, head, [5])
    weights = lm.attention_weights(1)
    ov = weights.W_V[3] @ weights.W_O[3]
    reads = lm.final_norm.centre(later.W_enc[:, 5])
    scores = [float(first.W_dec[i] @ ov @ reads) for i in range(first.config.n_features)]
    top = np.argsort(scores)[::-1][:10]
    for answer in (0, 35, 99):
        embedding = lm.W_E[one.answer_ids[answer]]
        expected = sum(
            scores[i] * float(embedding @ lm.final_norm.centre(first.W_enc[:, i])) for i in top
        )
        line = table[table["answer"] == answer].iloc[0]
        assert line["de_embedding"] == pytest.approx(expected, rel=1e-4)
        assert line["dla"] == pytest.approx(
            float(later.W_dec[5] @ lm.W_U[:, one.answer_ids[answer]]), rel=1e-4
        )
    exact = table.dropna(subset="exact")
    assert exact["answer"].tolist() == list(range(10, 20))


def _config(lm: LanguageModel, layer: int):  # type: ignore[no-untyped-def]
    from tclib.dictionaries.dictionary import DictionaryConfig

    return DictionaryConfig("transcoder", layer, lm.d_model, lm.d_model, 64)


def test_a_second_time_everything_is_loaded(
    run: Run, results: GreaterThanResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(greater_than, "analyse", fail)
    again = Run(run.preset).greater_than
    pd.testing.assert_frame_equal(again.curves, results.curves)
    assert again.summary == results.summary


def test_a_layer_without_a_transcoder_is_named(run: Run, tmp_path: Path) -> None:
    config = replace(run.preset.transcoders, layers=(0, 1))
    studied = replace(run.preset.case_studies, layer=1, n_sae=0)
    preset = replace(run.preset, runs_dir=tmp_path, transcoders=config, case_studies=studied)
    elsewhere = Run(preset)
    with pytest.raises(
        InputError, match=r"MLP 2, which has no transcoder: .* \[0, 1\].*set greater_than.layer"
    ):
        _ = elsewhere.greater_than
    assert not (elsewhere.step(greater_than.STEP).folder / "manifest.json").exists()


def test_figures_and_captions_hold_what_was_computed(results: GreaterThanResults) -> None:
    summary, curves = results.summary, results.curves
    axes = ablation_figure(curves, summary).axes
    assert axes[0].get_xlim() == (0, 60) and axes[1].get_xscale() == "symlog"
    controls = {"random directions", "transcoder of the shuffled MLP"}
    for axis in (axes[0], axes[1], axes[3]):  # wherever units are kept
        assert controls <= {line.get_label() for line in axis.lines}
    shown = {line.get_label(): line for line in axes[0].lines}
    own = curves[(curves["units"] == "neurons") & (curves["ranking"] == "variance")]
    np.testing.assert_allclose(shown["neurons"].get_ydata(), own["value"])
    lags = best_lags(results.feature_curves)
    large = feature_curve_figure(results.feature_curves, lags.assign(lag=range(-1, 9))).axes
    said = [axis.get_title().split(": ") for axis in large]
    assert said[0] == [f"feature {summary['top_features'][0]}", "1 earlier"]
    assert [one[1] for one in said[1:4]] == ["same year", "1 later", "2 later"]
    assert len(large) == 10
    assert harmful_figure(curves, results.feature_curves, results.held_out_harm, summary).axes
    assert component_figure(results.components).axes
    ours = (words.components, words.feature_curves, words.ablation, words.harmful)
    for word in ours:
        assert word(results).startswith("*Ours:*") and len(word(results)) < 320
    assert f"{summary['all_features']:.3f} becomes {summary['without_harmful']:.3f}" in ours[3](
        results
    )
    assert f"{summary['original'] - summary['mlp_removed']:.3f} over 0" in words.worth(results)


def test_published_figures_are_checked_and_mismatches_shown(results: GreaterThanResults) -> None:
    summary = dict(results.summary, original=0.88298, all_features=0.70)
    summary |= {"crossing": 23, "nearest_approach": 24, "harmful_feature": 5316}
    table = greater_than_table(summary, results.curves, is_published=True)
    verdicts = table.set_index("quantity")["verdict"]
    assert verdicts["probability_difference_original"] == "reproduced"
    assert verdicts["first_k_where_features_fall_behind"] == "reproduced"
    assert verdicts["k_where_the_curves_are_nearest"] == "mismatch"
    assert verdicts["feature_that_hurts"] == "mismatch"
    near = greater_than_table(dict(summary, original=0.8835), results.curves, is_published=True)
    assert near.iloc[0]["verdict"] == "mismatch"  # all printed digits count, not 0.005
    assert verdicts["probability_difference_transcoder_all_features"] == "mismatch"
    elsewhere = greater_than_table(summary, results.curves, is_published=False)
    assert set(elsewhere["verdict"]) == {"other model"}


def test_verdicts_follow_the_numbers(results: GreaterThanResults) -> None:
    evidence = results.summary["evidence"]

    def claims_of(summary: dict[str, Any]) -> list[dict[str, str]]:
        return greater_than_claims(summary, results.ahead, results.feature_curves, "x")

    def verdicts(**changed: tuple[float, float, float]) -> list[str]:
        summary = {**results.summary, "evidence": {**evidence, **changed}}
        return [line["verdict"] for line in claims_of(summary)]

    good = (0.9, 0.85, 0.95)
    worth, original = (0.3, 0.2, 0.4), good
    found = verdicts(original=original, worth=worth, kept=good, first_features=good, harmful=good)
    assert found[:4] == ["reproduced"] * 4
    bad = (-0.1, -0.2, 0.0)
    found = verdicts(original=bad, worth=worth, kept=bad, first_features=bad, harmful=bad)
    assert found[:4] == [*["not reproduced"] * 3, "not applicable"]  # nothing kept: some unit hurts
    assert verdicts(worth=worth, kept=good, harmful=bad)[3] == "not reproduced"
    nothing = verdicts(worth=(0.01, -0.02, 0.04), kept=good, first_features=good, harmful=good)
    assert nothing[1:4] == ["not applicable"] * 3


def test_words_follow_the_numbers(results: GreaterThanResults) -> None:
    """What is said of the feature that hurts is what its curve shows; a tie is no lead."""
    curves, feature = results.feature_curves, results.summary["harmful_feature"]
    own = curves["feature"] == feature
    for third, low in (("early", 0), ("late", 70)):
        made = curves.copy()
        made.loc[own, "dla"] = made.loc[own, "answer"].between(low, low + 29).astype(float)
        assert f"promotes {third} years most" in words.harmful(
            replace(results, feature_curves=made)
        )
    ahead = results.ahead.assign(lead=[1, 0, 0, -1, -1, -1, 0, 0, 0, 0] * 3)
    said = words.ablation(replace(results, ahead=ahead))
    assert "features lead at 1, neurons at 3, ties at 6" in said
    worst = results.harmful.assign(gain=np.where(results.harmful["is_steepest"], -1.0, 1.0))
    assert "not " + str(feature) in words.confirmed(replace(results, harmful=worst))


def test_the_control_is_of_the_shuffled_mlp(run: Run, results: GreaterThanResults) -> None:
    step = run.step(greater_than.CONTROL_STEP)
    manifest = json.loads((step.folder / "manifest.json").read_text())
    assert manifest["parameters"]["teacher"] == "MLP 2 shuffled by seed 42"
    (path,) = step.folder.glob("*.safetensors")
    control = Dictionary.load(path, "", is_checked=True)
    shuffled = with_shuffled_mlp(run.lm, 2, 42)
    assert control.config.model_hash == shuffled.content_hash != run.lm.content_hash
    shown = greater_than.controls_shown(results)
    assert shown.index[0] == "transcoder features" and "untrained model" in shown.index
    assert results.summary["control"]["n_tokens"] <= run.preset.transcoders.training.n_tokens


def test_no_control_for_released_transcoders(run: Run) -> None:
    config = replace(run.preset.transcoders, published="hub")
    elsewhere = Run(replace(run.preset, transcoders=config))
    elsewhere.__dict__["components"] = run.components
    assert greater_than._control(elsewhere) is None


def test_the_evidence_is_that_of_the_curves(results: GreaterThanResults) -> None:
    summary = results.summary
    evidence = summary["evidence"]
    worth = summary["original"] - summary["mlp_bias_only"]
    assert evidence["original"][0] == pytest.approx(summary["original"], abs=1e-5)
    assert evidence["worth"][0] == pytest.approx(worth, abs=1e-5)
    kept = (summary["all_features"] - summary["mlp_bias_only"]) / worth
    assert evidence["kept"][0] == pytest.approx(kept, abs=1e-4)
    by_k = {
        units: results.curves[
            (results.curves["units"] == units) & (results.curves["ranking"] == "variance")
        ].set_index("k")["value"]
        for units in ("transcoder features", "neurons")
    }
    ahead = (by_k["transcoder features"] - by_k["neurons"]).loc[1:10].mean() / worth
    assert evidence["first_features"][0] == pytest.approx(ahead, abs=1e-4)
    for value, low, high in evidence.values():
        assert low <= value <= high
