"""Steps are made once, loaded afterwards, and never overwritten by other parameters."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny import small_preset

from tclib.circuits.files import load_json, load_parquet
from tclib.models.locate import BUNDLED
from tclib.replication import circuits, executed, model_and_data, sweep, transcoders
from tclib.replication import run as run_module
from tclib.replication.presets import PRESETS, Preset, load_preset
from tclib.replication.results import markdown
from tclib.replication.run import Run, open_run
from tclib.support import files, steps
from tclib.support.errors import InputError
from tclib.support.places import NOTEBOOKS
from tclib.support.steps import read_manifest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Preset:
    return small_preset(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def results(small: Preset) -> pd.DataFrame:
    return Run(small).results


def test_results_are_made_from_nothing_with_every_earlier_step(
    small: Preset, results: pd.DataFrame
) -> None:
    assert list(results.columns) == ["claim", "paper", "ours", "verdict", "power"]
    assert len(results) == 18
    steps = {path.name for path in small.folder.iterdir() if path.is_dir()}
    made = {model_and_data.STEP, transcoders.STEP, sweep.STEP, circuits.STEP}
    assert made <= steps
    for name in steps:
        manifest = read_manifest(small.step(name))
        assert manifest["preset"] == "demo" and manifest["outputs"]


def test_a_second_time_everything_is_loaded(
    small: Preset, results: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(model_and_data, "build_corpus", fail)
    for name in ("train", "evaluate"):
        monkeypatch.setattr(transcoders, name, fail)
    monkeypatch.setattr(circuits, "attribution_graph", fail)
    pd.testing.assert_frame_equal(Run(small).results, results)


def test_the_circuit_step_holds_a_graph_that_adds_up(small: Preset, results: pd.DataFrame) -> None:
    folder = small.step(circuits.STEP).folder
    closure = pd.read_csv(folder / "closure.csv")
    assert closure["residual"].abs().max() < 1e-4
    connections = pd.read_csv(folder / "connections.csv")
    assert len(connections) == 6 * 3
    assert connections["overlap_10"].between(0, 1).all()
    assert {"random_overlap_10", "random_active_overlap_10"} <= set(connections)
    graph = load_parquet(folder)
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    assert pd.read_csv(folder / "ablations.csv")["name"].tolist() == features["name"].tolist()
    curves = pd.read_csv(folder / "faithfulness.csv")
    assert curves["prompt"].nunique() == 2 and small.circuits.year in set(curves["prompt"])
    assert load_json(folder / "graph.json").closure()["residual"].abs().max() < 1e-4
    assert (folder / "viewer" / "greater-than.json").is_file()


def change(folder: Path) -> None:
    """Other weights in a model's folder."""
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.2.mlp.c_proj.bias"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_folder_whose_weights_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED["demo"], folder)
    preset = replace(small_preset(tmp_path / "runs"), model=str(folder))
    before = Run(preset)
    made_from = executed.fingerprint(before, next(NOTEBOOKS.glob("00*")), {})
    assert len(before.corpus.train)
    change(folder)
    with pytest.raises(InputError, match="made with other parameters or inputs"):
        _ = Run(preset).corpus
    assert executed.fingerprint(Run(preset), next(NOTEBOOKS.glob("00*")), {}) != made_from


def test_notebooks_that_draw_a_companion_are_not_current_once_its_model_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (PRESETS / "demo.yaml").read_text()
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "demo.yaml").write_text(text)
    shutil.copytree(BUNDLED["demo"], tmp_path / "model")
    other = text.replace("model: demo", f"model: {tmp_path}/model").replace("[demo-neox]", "[]")
    (tmp_path / "presets" / "demo-neox.yaml").write_text(other)
    monkeypatch.setattr("tclib.replication.presets.PRESETS", tmp_path / "presets")

    def made_from() -> list[str]:
        run = Run(load_preset("demo", runs_dir=tmp_path))
        return [executed.fingerprint(run, next(NOTEBOOKS.glob(f"0{i}*")), {}) for i in range(8)]

    before = made_from()
    change(tmp_path / "model")
    assert [one == other for one, other in zip(before, made_from(), strict=True)] == (
        [True] * 2 + [False] * 6
    )


def test_other_parameters_are_refused_and_overwrite_nothing(
    small: Preset, results: pd.DataFrame
) -> None:
    before = sorted(p.stat().st_mtime_ns for p in small.folder.rglob("*.safetensors"))
    other = replace(small, corpus=replace(small.corpus, n_train_tokens=25_600))
    with pytest.raises(
        InputError, match=r"made with other parameters or inputs \(corpus\): .*delete .*--only 0"
    ):
        _ = Run(other).corpus
    wider = replace(small, transcoders=replace(small.transcoders, expansion=4))
    with pytest.raises(InputError, match="made with other parameters"):
        _ = Run(wider).trained
    assert sorted(p.stat().st_mtime_ns for p in small.folder.rglob("*.safetensors")) == before


def test_text_that_was_edited_after_a_run_is_noticed(small: Preset, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    draw = np.random.default_rng(0)
    for name in "abcd":
        years = draw.integers(10, 99, (200, 9))
        wars = (" ".join(f"The war of 17{yy} was long." for yy in line) for line in years)
        (text / f"{name}.txt").write_text("\n\n".join(wars))
    corpus = replace(
        small.corpus, kind="text", source=str(text), eval_fraction=0.5, n_train_tokens=2_560
    )
    preset = replace(small, corpus=corpus, runs_dir=tmp_path)
    first = Run(preset).corpus.content_hash
    notebook = next(NOTEBOOKS.glob("01*"))
    made_from = executed.fingerprint(Run(preset), notebook, {})
    assert made_from == executed.fingerprint(Run(preset), notebook, {})
    os.utime(text / "a.txt")  # touched, not edited
    assert Run(preset).corpus.content_hash == first
    before = (text / "a.txt").read_text()
    (text / "a.txt").write_text(before.replace("war", "siege"))
    with pytest.raises(InputError, match=r"other parameters or inputs \(input source\)"):
        _ = Run(preset).corpus
    assert executed.fingerprint(Run(preset), notebook, {}) != made_from
    shutil.rmtree(text)  # the run holds a copy of its own
    assert Run(preset).corpus.content_hash == first
    assert executed.fingerprint(Run(preset), notebook, {}) == made_from


def test_a_damaged_dictionary_is_named_with_the_command(
    small: Preset, results: pd.DataFrame, tmp_path: Path
) -> None:
    file = next(small.step(transcoders.STEP).folder.glob("*.safetensors"))
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1])
        with pytest.raises(
            InputError, match=f"{file.name} is missing or was altered: .* --only 01"
        ):
            _ = Run(small).trained
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("transcoders", {"layers": (2, 4)}, "transcoders.layers 4: expected 0 to 3 for demo"),
        ("sweep", {"layer": 12}, "sweep.layer 12: expected 0 to 3"),
        ("case_studies", {"layer": 4, "n_sae": 0}, "case_studies.layer 4: expected 0 to 3"),
        ("greater_than", {"layer": 4}, "greater_than.layer 4: expected 0 to 3"),
        ("greater_than", {"head": (4, 0)}, "greater_than.head.0 4: expected 0 to 3"),
        ("greater_than", {"head": (0, 4)}, "greater_than.head.1 4: expected 0 to 3"),
    ],
)
def test_what_the_model_lacks_is_refused_before_anything_is_made(
    section: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    preset = load_preset("demo", runs_dir=tmp_path / "runs")
    bad = replace(preset, **{section: replace(getattr(preset, section), **changes)})
    with pytest.raises(InputError, match=message):
        model_and_data.check_ready(bad)
    with pytest.raises(InputError, match=message):
        _ = Run(bad).corpus
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["text", "docstrings", "wikipedia"])
def test_text_that_is_not_there_is_said_before_anything_is_made(kind: Any, tmp_path: Path) -> None:
    preset = load_preset("demo", runs_dir=tmp_path / "runs")
    bad = replace(preset, corpus=replace(preset.corpus, kind=kind, source=str(tmp_path / "none")))
    with pytest.raises(InputError, match="corpus.source .*none: no such file or folder"):
        model_and_data.check_ready(bad)
    assert not (tmp_path / "runs").exists()


def test_a_year_after_which_nothing_comes_is_refused_unless_no_circuit_is_asked_for(
    tmp_path: Path,
) -> None:
    preset = load_preset("demo", runs_dir=tmp_path / "runs")
    late = replace(preset, circuits=replace(preset.circuits, year=99))
    with pytest.raises(InputError, match="circuits.year 99: .* later answers, 0 to 98 for demo"):
        _ = Run(late).corpus
    assert not (tmp_path / "runs").exists()
    assert Run(replace(late, skipped={"03": "no circuit"})).lm.n_layers == 4


def test_a_finished_step_is_hashed_once_and_its_weights_are_not_hashed_again(
    small: Preset, results: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    original = steps.file_hash
    monkeypatch.setattr(steps, "file_hash", lambda path: (hashed.append(path), original(path))[1])

    def fail(*_arguments: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(files, "tensors_hash", fail)
    run = Run(small)
    _ = (run.layers, run.circuits, run.comparison, run.greater_than, run.replacements, run.studies)
    assert len(hashed) == len(set(hashed)) > 20


def test_a_run_opens_without_making_anything_and_keeps_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(
        run_module, "load_preset", lambda name, *a: (loaded.append(name), load_preset(name, *a))[1]
    )
    run = open_run("demo", seed=7, runs_dir=tmp_path)
    assert repr(run) == f"Run('demo-seed7' in {tmp_path}/demo-seed7)"
    assert [one.preset.name for one in run.companions] == ["demo-neox-seed7"]
    assert loaded == ["demo", "demo-neox"]
    assert not any(tmp_path.iterdir())
    assert run.lm is run.lm
    assert run.tells("02") and not open_run("pythia-410m").tells("03")


def test_a_finished_run_is_opened_without_writing_anything(
    small: Preset, results: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", lambda _self, timeout: refuses())
    for name in ("replace", "remove", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, refuses)
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    run = Run(small)
    pd.testing.assert_frame_equal(run.results, results)
    # As the notebooks draw: the figures are shown, and not saved.
    assert model_and_data.second_year_figure(run).axes
    assert transcoders.training_figure(run).axes and transcoders.layer_figure(run).axes
    assert circuits.graph_figure(run).axes and circuits.prediction_figure(run).axes
    assert circuits.faithfulness_figure(run).axes and circuits.connections_figure(run).axes
    assert len(sweep.gap_table(run)) == 0 and sweep.figure_3(run).axes


def test_markdown_has_a_line_a_row() -> None:
    table = pd.DataFrame({"claim": ["a"], "verdict": ["b"]})
    assert markdown(table) == "| claim | verdict |\n| --- | --- |\n| a | b |\n"
