"""Checks of published figures, on a synthetic checkpoint of exactly the published format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import authors_file, random_rows, random_transcoder, small_preset

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.released_sets import GPT2_FILE, GPT2_FREQUENCIES
from tclib.evaluation import metrics
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.replication import published
from tclib.replication.checks import check_line, printed_tolerance
from tclib.replication.model_and_data import check_ready
from tclib.replication.paper import paper_table
from tclib.replication.presets import Preset, load_preset
from tclib.replication.published import (
    _token_id,
    activation_table,
    circuit_table,
    counts,
    dead_feature_table,
    live_feature_table,
    mean_acts_where_active,
    overlap_table,
)
from tclib.replication.run import Run, open_run
from tclib.support.errors import InputError

D_MODEL, N_FEATURES = 128, 300


def write_released(folder: Path, config_class: type) -> None:
    """Four files of the published format, for the bundled model."""
    folder.mkdir()
    for layer in range(4):
        generator = torch.Generator().manual_seed(layer)

        def normal(*shape: int, g: torch.Generator = generator) -> torch.Tensor:
            return 0.2 * torch.randn(*shape, generator=g)

        authors_file(
            folder / GPT2_FILE.format(layer=layer),
            config_class,
            layer=layer,
            model_name="demo",
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=N_FEATURES,
            W_enc=normal(D_MODEL, N_FEATURES),
            b_enc=normal(N_FEATURES),
            W_dec=normal(N_FEATURES, D_MODEL),
            b_dec=normal(D_MODEL),
            b_dec_out=normal(D_MODEL),
        )
    frequencies = torch.full((N_FEATURES,), -2.0)
    frequencies[[0, 1, 7]] = torch.tensor([-10.0, -10.0, -5.0])
    torch.save(frequencies, folder / GPT2_FREQUENCIES.format(layer=2))


@pytest.fixture
def preset(tmp_path: Path, runner_config: type) -> Preset:
    """gpt2-published on the bundled model, its files in a folder, on a few rows of text."""
    write_released(tmp_path / "released", runner_config)
    small, given = small_preset(tmp_path / "runs"), load_preset("gpt2-published")
    return replace(
        given,
        model="demo",
        runs_dir=tmp_path / "runs",
        corpus=small.corpus,
        transcoders=replace(
            given.transcoders, published=str(tmp_path / "released"), layers=tuple(range(4))
        ),
        circuits=small.circuits,
        greater_than=small.greater_than,
        case_studies=replace(small.case_studies, layer=2, features=(3, 5), n_sae=0),
    )


PAPER: dict[str, list[dict[str, str]]] = {
    "prompt_activations": [
        {
            "layer": "2",
            "feature": "89",
            "prompt": "The war lasted",
            "at_token": " war",
            "prepend_bos": "false",
            "transcoder_layers_replaced": "0-1",
            "activation": "1.5",
            "printed_as": "float16",
        }
    ],
    "paths": [
        {
            "notebook": "walkthrough",
            "prompt": "The war lasted",
            "path": "mlp2tc[89]@-1: 7.6 <- attn1[2]@1: 0.6 <- mlp0tc[4]@1: 0.2",
        },
        {
            "notebook": "walkthrough",
            "prompt": "The war lasted",
            "path": "mlp2tc[89]@-1: 7.6 <- embed0@3: 2e-01",
        },
    ],
    "edges": [
        {
            "source_node": "mlp0tc[4]@1",
            "target_node": "attn1[2]@1",
            "contribution": "0.2",
        }
    ],
    "closure": [
        {"quantity": name, "value": "1.5"}
        for name in ("node", "edges", "transcoder_errors", "bias", "prune_error", "shown_sources")
    ],
    "whole_model": [
        {"what": "original", "layers": "none", "ce": "3.5", "kl": ""},
        {"what": "transcoders", "layers": "0-2 (all)", "ce": "4.2", "kl": "0.7"},
        {"what": "zero-ablated", "layers": "0-2", "ce": "10.9", "kl": ""},
    ],
    "pullback_overlap": [
        {
            "name": "a",
            "layer": "2",
            "feature": "89",
            "earlier_layer": "0",
            "k": "10",
            "overlap": "0.3",
        }
    ],
    "dead_features": [{"model": "gpt2", "layer": "2", "n_dead": "9"}],
    "live_features": [
        {"layer": "2", "position": position, "feature": feature}
        for position, feature in (("0", "2"), ("5", "8"), ("6", "8"), ("296", "299"))
    ],
}


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up figures where data/paper's would need GPT-2's tokens and layers."""
    monkeypatch.setattr(published, "paper_table", lambda name: PAPER.get(name) or paper_table(name))
    monkeypatch.setattr(published, "WALKTHROUGH_FEATURE", (2, 89))


@pytest.mark.slow
def test_the_whole_preset_runs_on_files_of_the_published_format(
    preset: Preset, paper: None
) -> None:
    check_ready(preset)
    run = Run(preset)
    checks = run.published_checks
    assert set(checks["source"]) == {"greater_than", *PAPER}
    own = checks[checks["source"] != "greater_than"]
    known = {"reproduced", "mismatch", "silent here"}
    assert own["ours"].notna().all() and set(checks["verdict"]) <= known
    by_quantity = checks.set_index("quantity")["ours"]
    lm, corpus = run.lm, run.corpus
    with torch.no_grad():
        logits = lm.logits(corpus.evaluation.long())
        original = float(metrics.next_token_losses(logits, corpus.evaluation.long()).mean())
    assert by_quantity["CE, original, layers none"] == pytest.approx(original, rel=1e-5)
    assert by_quantity["KL, transcoders, layers 0-2 (all)"] > 0
    one = run.transcoders["transcoder-L2-published"]
    assert by_quantity["bias"] == pytest.approx(float(one.b_enc[89]), rel=1e-5)
    tokens = lm.tokenize("The war lasted")
    acts = lm.read(tokens, [Site("mlp_in", 2)])[Site("mlp_in", 2)][0, -1]
    assert by_quantity["node"] == pytest.approx(float(one.encode(acts)[89]), rel=1e-4)
    assert by_quantity["dead features of layer 2, by the released frequencies"] == 2
    assert by_quantity["live features of layer 2 in their published places"] == 3
    # Loaded, not made again; and the table of all claims can be made too, studies among them.
    pd.testing.assert_frame_equal(Run(preset).published_checks, checks)
    results = run.results
    assert not results["claim"].str.startswith("Fig. 3").any() and len(results) >= 8


@pytest.mark.parametrize(
    ("printed", "printed_as", "rounding"),
    [
        ("6.9", ".2", 0.05),
        ("0.3", ".2", 0.005),  # 0.30: Python drops the zero
        ("0.094", ".2", 0.0005),
        ("1.6e+01", ".2", 0.5),
        ("8.3952", "decimals", 0.00005),
        ("-7.1e-03", "decimals", 0.00005),
        ("13.78", "float16", 2.0**-7),
        ("9.", "float16", 2.0**-7),  # not half of a unit
        ("0.8145", "float16", 2.0**-11),
    ],
)
def test_the_tolerance_is_what_printing_and_float16_lose(
    printed: str, printed_as: str, rounding: float
) -> None:
    numerical = 1e-4 * max(1.0, abs(float(printed)))
    assert printed_tolerance(printed, printed_as) == pytest.approx(rounding + numerical)


def test_indices_and_counts_are_exact() -> None:
    assert printed_tolerance("21238") == 0.0


def test_verdicts_follow_the_tolerance() -> None:
    near = check_line("a", "x", 1.0, 1.04, 0.05)
    far = check_line("a", "y", 1.0, 1.06, 0.05)
    assert (near["verdict"], far["verdict"]) == ("reproduced", "mismatch")
    silent = [check_line("a", "z", paper, 0.0, 0.05, is_silent=True) for paper in (1.0, 0.04)]
    assert [line["verdict"] for line in silent] == ["silent here", "reproduced"]
    counted = counts(pd.DataFrame([near, far]))
    assert counted.to_dict("records") == [{"source": "a", "reproduced": 1, "checked": 2}]


# -- tables -----------------------------------------------------------------------------------


def transcoders_of(n_layers: int = 3) -> dict[int, Dictionary]:
    return {layer: random_transcoder(layer, "relu", torch.float32) for layer in range(n_layers)}


def silenced(dictionary: Dictionary, feature: int) -> Dictionary:
    """Feature `feature` never fires."""
    dictionary.b_enc[feature] = -1e6
    return dictionary


def test_a_silent_feature_is_one_line_of_each_table(
    monkeypatch: pytest.MonkeyPatch, gpt2_lm: LanguageModel
) -> None:
    by_layer = transcoders_of()
    silenced(by_layer[2], 7)
    silenced(by_layer[0], 4)
    activation = {"layer": "2", "feature": "7", "prompt": "w5 w9", "at_token": "w9"}
    activation |= {"prepend_bos": "true", "transcoder_layers_replaced": "none"}
    overlap = {"name": "a", "layer": "2", "feature": "7", "earlier_layer": "0"}
    tables = {
        "prompt_activations": [{**activation, "activation": "2.5", "printed_as": "float16"}],
        "paths": [
            {"notebook": "walkthrough", "prompt": "w5 w9", "path": path}
            for path in (
                "r: 9 <- attn1[2]@1: 5e+02 <- mlp0tc[4]@1: 3e+02",
                "r: 9 <- attn1[2]@1: 5e+02",
            )
        ],
        "edges": [
            {"source_node": a, "target_node": b, "contribution": "3e+02"}
            for a, b in (("mlp0tc[4]@1", "attn1[2]@1"), ("attn1[2]@1", "r"))
        ],
        "closure": [{"quantity": "node", "value": "7.5"}],
        "pullback_overlap": [{**overlap, "k": "10", "overlap": "0.9"}],
    }
    monkeypatch.setattr(published, "paper_table", tables.__getitem__)
    monkeypatch.setattr(published, "WALKTHROUGH_FEATURE", (2, 7))
    acts = activation_table(gpt2_lm, by_layer)
    assert acts["verdict"].tolist() == ["silent here"] and acts["ours"].tolist() == [0.0]
    circuits = circuit_table(gpt2_lm, by_layer)
    assert circuits["source"].tolist() == ["paths"] * 2 + ["edges"] * 2 + ["closure"]
    silent, seen = "silent here", "mismatch"
    assert circuits["verdict"].tolist() == [silent, seen, silent, seen, silent]
    found = overlap_table(gpt2_lm, by_layer, random_rows(4))
    assert found["verdict"].tolist() == [silent]


def test_overlaps_are_counted_in_features_and_computed_as_the_authors_do(
    monkeypatch: pytest.MonkeyPatch, gpt2_lm: LanguageModel
) -> None:
    """Mean of z × pullback over tokens (BOS too) above the 20th percentile, token by token."""
    by_layer, rows = transcoders_of(), random_rows(6)
    later, earlier = by_layer[2], by_layer[0]
    sites = (later.config.input_site, earlier.config.input_site)
    acts = gpt2_lm.read(rows.long(), set(sites))
    z = later.encode(acts[sites[0]])[..., 7].flatten().half().float()
    least = z[z > 0].double().quantile(0.2)
    below = earlier.encode(acts[sites[1]]).flatten(0, 1)
    expected = torch.stack([one for one, value in zip(below, z, strict=True) if value > least])
    found = mean_acts_where_active(gpt2_lm, later, 7, earlier, rows)
    assert found is not None
    torch.testing.assert_close(found, expected.mean(0), rtol=1e-4, atol=1e-6)
    pullback = earlier.W_dec @ later.W_enc[:, 7]
    tops = [set(values.topk(10).indices.tolist()) for values in (pullback, pullback * found)]
    n_common = len(tops[0] & tops[1])
    row = {"name": "a", "layer": "2", "feature": "7", "earlier_layer": "0", "k": "10"}
    shares = [n_common - 3, n_common - 2, n_common, n_common + 2, n_common + 3]
    published_rows = [{**row, "overlap": str(n / 10)} for n in shares]
    monkeypatch.setattr(published, "paper_table", lambda _: published_rows)
    table = overlap_table(gpt2_lm, by_layer, rows)
    assert table["ours"].tolist() == [n_common] * 5 and table["paper"].tolist() == shares
    within = table["verdict"] == "reproduced"
    assert within.tolist() == [False, True, True, True, False]


def test_released_frequencies_say_which_features_are_dead_and_live(
    monkeypatch: pytest.MonkeyPatch, gpt2_lm: LanguageModel
) -> None:
    tables = {
        "dead_features": [{"model": "gpt2", "layer": "1", "n_dead": "3"}],
        "live_features": [
            {"layer": "1", "position": position, "feature": feature}
            for position, feature in (("0", "1"), ("1", "4"), ("2", "5"), ("9", "3"))
        ],
    }
    monkeypatch.setattr(published, "paper_table", tables.__getitem__)
    released = torch.tensor([-10.0, -2.0, -10.0, -4.5, -3.9, -1.0, -10.0])
    rows, by_layer = random_rows(2), transcoders_of()
    dead = dead_feature_table(gpt2_lm, by_layer, rows, {1: released})
    assert dead.iloc[0][["ours", "verdict"]].tolist() == [3.0, "reproduced"]
    live = live_feature_table({1: released})
    assert live.iloc[0][["paper", "ours"]].tolist() == [4, 3]
    assert live_feature_table({1: None}).empty
    measured = dead_feature_table(gpt2_lm, by_layer, rows, {1: None}).iloc[0]
    assert measured["quantity"].endswith("on our rows")


# -- bad input ------------------------------------------------------------------------------


def test_a_missing_file_or_hub_ends_in_one_sentence_before_anything_is_written(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "released" / GPT2_FILE.format(layer=3)).unlink()
    short = replace(preset, transcoders=replace(preset.transcoders, layers=(2, 3)))
    with pytest.raises(InputError, match="blocks.3.*is missing: download"):
        check_ready(short)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from_hub = replace(preset, transcoders=replace(preset.transcoders, published="hub"))
    with pytest.raises(InputError, match="pchlenski/gpt2-transcoders"):
        check_ready(from_hub)
    assert not (tmp_path / "runs").exists()


def test_files_that_do_not_fit_the_model_leave_nothing_behind(
    preset: Preset,
    runner_config: type,
    tmp_path: Path,
) -> None:
    authors_file(
        tmp_path / "released" / GPT2_FILE.format(layer=2),
        runner_config,
        layer=2,
    )
    with pytest.raises(InputError, match="dictionary of width 16"):
        _ = Run(preset).trained
    assert not list(tmp_path.glob("runs/**/*.safetensors"))


def test_a_preset_that_trains_has_nothing_to_check() -> None:
    with pytest.raises(InputError, match="trains its own transcoders"):
        _ = open_run("demo").published_checks


def test_tokens_of_another_vocabulary_are_named(gpt2_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="expected GPT-2's single one"):
        _token_id(gpt2_lm, "w1 w2")


def test_a_dictionary_is_not_needed_to_count_dead_features_of_other_models(
    monkeypatch: pytest.MonkeyPatch, gpt2_lm: LanguageModel
) -> None:
    rows = [{"model": "pythia-410m", "layer": "15", "n_dead": "1"}]
    monkeypatch.setattr(published, "paper_table", lambda _: rows)
    empty: dict[int, Dictionary] = {}
    assert dead_feature_table(gpt2_lm, empty, torch.zeros(1, 4, dtype=torch.int32), {}).empty


def test_a_preset_of_fewer_layers_than_the_figures_need_is_refused_first(preset: Preset) -> None:
    short = replace(preset, transcoders=replace(preset.transcoders, layers=(0, 2)))
    with pytest.raises(InputError, match=r"leaves out layers \[1, 3\]: .*leave transcoders.layers"):
        _ = Run(short).published_checks
    assert not (preset.runs_dir / "gpt2-published").exists()
