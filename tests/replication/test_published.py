"""Checks of published figures, on a synthetic checkpoint of exactly the published format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import authors_file, freeze, small_preset

from tclib.circuits.paths import Node, greedy_paths
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.published import FILE_NAME
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.replication import published
from tclib.replication.model_and_data import check_ready, load_model, prepare_corpus
from tclib.replication.paper import paper_table
from tclib.replication.presets import Preset, load_preset
from tclib.replication.published import (
    _token_id,
    check_line,
    counts,
    dead_feature_table,
    make_published_checks,
    parse_path,
    path_contribution,
    printed_tolerance,
)
from tclib.replication.results import make_results
from tclib.replication.transcoders import train_transcoders
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
            folder / FILE_NAME.format(layer=layer),
            config_class,
            hook_point=f"blocks.{layer}.ln2.hook_normalized",
            hook_point_layer=layer,
            d_in=D_MODEL,
            d_out=D_MODEL,
            d_sae=N_FEATURES,
            W_enc=normal(D_MODEL, N_FEATURES),
            b_enc=normal(N_FEATURES),
            W_dec=normal(N_FEATURES, D_MODEL),
            b_dec=normal(D_MODEL),
            b_dec_out=normal(D_MODEL),
        )


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
        case_studies=replace(small.case_studies, layer=2, features=(3, 5)),
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
    "closure": [{"quantity": name, "value": "1"} for name in ("node", "bias", "transcoder_errors")],
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
}


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up figures where data/paper's would need GPT-2's tokens and layers."""
    monkeypatch.setattr(published, "paper_table", lambda name: PAPER.get(name) or paper_table(name))
    monkeypatch.setattr(published, "CLOSURE_PROMPT", "The war lasted")
    monkeypatch.setattr(published, "CLOSURE_FEATURE", (2, 89))


def test_the_whole_preset_runs_on_files_of_the_published_format(
    preset: Preset, paper: None
) -> None:
    check_ready(preset)
    checks = make_published_checks(preset)
    assert set(checks["source"]) == {"greater_than", *PAPER}
    own = checks[checks["source"] != "greater_than"]
    assert own["ours"].notna().all() and set(checks["verdict"]) <= {"reproduced", "mismatch"}
    by_quantity = checks.set_index("quantity")["ours"]
    lm = load_model(preset)
    corpus = prepare_corpus(preset, lm)
    with torch.no_grad():
        logits = lm.logits(corpus.evaluation.long())
        original = float(
            published.metrics.next_token_losses(logits, corpus.evaluation.long()).mean()
        )
    assert by_quantity["CE, original, layers none"] == pytest.approx(original, rel=1e-5)
    assert by_quantity["KL, transcoders, layers 0-2 (all)"] > 0
    trained = train_transcoders(preset, lm, corpus)
    one = trained.dictionaries["transcoder-L2-published"]
    assert by_quantity["bias"] == pytest.approx(float(one.b_enc[89]), rel=1e-5)
    tokens = lm.tokenize("The war lasted")
    acts = lm.read(tokens, [Site("mlp_in", 2)])[Site("mlp_in", 2)][0, -1]
    assert by_quantity["node"] == pytest.approx(float(one.pre_acts(acts)[89]), rel=1e-4)
    # Loaded, not made again; and the table of all claims can be made too, studies among them.
    pd.testing.assert_frame_equal(make_published_checks(preset), checks)
    results = make_results(preset)
    assert not results["claim"].str.startswith("Fig. 3").any() and len(results) >= 8


def test_a_path_contributes_what_the_search_found() -> None:
    frozen = freeze("gpt2", "relu", n_prompts=1)
    root = frozen.feature_target(2, 3, 5)
    for paths in greedy_paths(frozen, root, n_iterations=3, n_branches=8):
        for path in paths:
            if path.nodes[-1].kind in ("feature", "head"):
                found = path_contribution(frozen, root, path.nodes[1:])
                assert found == pytest.approx(path.contribution, rel=1e-9)
    silent = Node("feature", 0, -1, 39, 4)
    z = frozen.transcoders[0].encode(frozen.cache.mlp_in[0])[0, 4]
    silent = replace(silent, feature=int((z == 0).nonzero()[0]))
    assert path_contribution(frozen, root, [silent]) == 0


def test_published_paths_are_parsed() -> None:
    text = "mlp11@-1 <- attn9[1]@6: 6.9 <- mlp0tc[17180]@-3: 4.7e+00 <- embed0@6: -0.31"
    nodes, printed = parse_path(text, n_pos=9)
    assert printed == "-0.31"
    assert nodes == [
        Node("head", 9, 1, -1, 6),
        Node("feature", 0, -1, 17180, 6),
        Node("embedding", -1, -1, -1, 6),
    ]
    with pytest.raises(InputError, match="'mlp3@2: 1.0' is no feature, head or embedding"):
        parse_path("mlp11@-1 <- mlp3@2: 1.0", 9)


@pytest.mark.parametrize(
    ("printed", "tolerance"), [("6.9", 0.05), ("0.094", 0.0005), ("1.6e+01", 0.5), ("16", 0.5)]
)
def test_the_tolerance_is_half_of_the_last_printed_digit(printed: str, tolerance: float) -> None:
    assert printed_tolerance(printed) == pytest.approx(tolerance, rel=0.02)


def test_every_published_path_can_be_parsed() -> None:
    rows = paper_table("paths")
    text = list(rows[0])[-1]
    lengths = [len(parse_path(row[text], 9)[0]) + 1 for row in rows]
    assert lengths == [int(row["path_length"]) for row in rows] and len(rows) == 135


def test_verdicts_follow_the_tolerance() -> None:
    near = check_line("a", "x", 1.0, 1.04, 0.05)
    far = check_line("a", "y", 1.0, 1.06, 0.05)
    assert (near["verdict"], far["verdict"]) == ("reproduced", "mismatch")
    counted = counts(pd.DataFrame([near, far]))
    assert counted.to_dict("records") == [{"source": "a", "reproduced": 1, "checked": 2}]


# -- bad input ------------------------------------------------------------------------------


def test_a_missing_file_or_hub_ends_in_one_sentence_before_anything_is_written(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "released" / FILE_NAME.format(layer=3)).unlink()
    short = replace(preset, transcoders=replace(preset.transcoders, layers=(0, 3)))
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
        tmp_path / "released" / FILE_NAME.format(layer=2),
        runner_config,
        hook_point="blocks.2.ln2.hook_normalized",
        hook_point_layer=2,
    )
    lm = load_model(preset)
    with pytest.raises(InputError, match="dictionary of width 16"):
        train_transcoders(preset, lm, _no_corpus())
    assert not list(tmp_path.glob("runs/**/*.safetensors"))


def _no_corpus() -> Any:
    """Released transcoders need no text."""
    return None


def test_a_preset_that_trains_has_nothing_to_check() -> None:
    with pytest.raises(InputError, match="trains its own transcoders"):
        make_published_checks(load_preset("demo"))


def test_tokens_of_another_vocabulary_are_named(gpt2_lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="expected GPT-2's single one"):
        _token_id(gpt2_lm, "w1 w2")


def test_a_dictionary_is_not_needed_to_count_dead_features_of_other_models(
    monkeypatch: pytest.MonkeyPatch, gpt2_lm: LanguageModel
) -> None:
    rows = [{"model": "pythia-410m", "layer": "15", "n_dead": "1"}]
    monkeypatch.setattr(published, "paper_table", lambda _: rows)
    empty: dict[int, Dictionary] = {}
    assert dead_feature_table(gpt2_lm, empty, torch.zeros(1, 4, dtype=torch.int32)).empty
