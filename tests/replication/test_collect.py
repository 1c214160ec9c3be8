"""What is kept of a run: small files, and nothing that names the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from tclib.cli import app
from tclib.replication import collect as collect_module
from tclib.replication.collect import collect
from tclib.replication.presets import load_preset
from tclib.support.errors import InputError


def test_small_files_are_kept_and_weights_and_paths_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = replace(load_preset("demo"), runs_dir=tmp_path / "runs")
    monkeypatch.setattr(collect_module, "MAX_BYTES", 5_000)
    step = preset.folder / "06_greater_than"
    (preset.folder / "activations" / "x").mkdir(parents=True)
    step.mkdir()
    (preset.folder / "notebooks").mkdir()
    for place in (
        step / "curves.csv",
        step / "figure_4.png",
        step / "manifest.json",
        step / "one.safetensors",
        step / ".lock.json",
        preset.folder / "activations" / "x" / "list.json",
    ):
        place.write_text("{}")
    (step / "large.csv").write_text("x" * 6_000)
    cell = nbformat.v4.new_code_cell(f"runs_dir = {str(preset.runs_dir)!r}")
    cell.metadata["papermill"] = {"duration": 1.0}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/a"}})
    nbformat.write(notebook, preset.folder / "notebooks" / "06.ipynb")
    kept = collect(preset, tmp_path / "kept")
    assert {path.relative_to(tmp_path / "kept").as_posix() for path in kept} == {
        "collected.json",
        "06_greater_than/curves.csv",
        "06_greater_than/figure_4.png",
        "06_greater_than/manifest.json",
        "notebooks/06.ipynb",
    }
    text = (tmp_path / "kept" / "notebooks" / "06.ipynb").read_text()
    assert str(tmp_path) not in text and "papermill" not in text and "data/runs" in text
    nbformat.validate(nbformat.from_dict(json.loads(text)))


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: run `tclib run --preset demo` first"):
        collect(replace(load_preset("demo"), runs_dir=tmp_path), tmp_path / "kept")
    arguments = ["collect", str(tmp_path / "kept"), "--runs-dir", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code != 0
    assert not (tmp_path / "kept").exists()


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    preset = replace(load_preset("demo"), runs_dir=tmp_path / "runs")
    preset.folder.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        collect_module.collect(preset, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").is_file()


def test_a_run_is_not_replaced_by_a_collection_and_a_collection_is(tmp_path: Path) -> None:
    preset = replace(load_preset("demo"), runs_dir=tmp_path / "runs")
    for name, suffix in (("demo", "csv"), ("other", "safetensors")):
        for file in ("manifest.json", f"table.{suffix}"):
            path = tmp_path / "runs" / name / "01_train_transcoders" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    with pytest.raises(InputError, match="holds other .* 01_train_transcoders/manifest.json"):
        collect(preset, tmp_path / "runs" / "other")
    assert (tmp_path / "runs" / "other" / "01_train_transcoders" / "table.safetensors").is_file()
    first = collect(preset, tmp_path / "kept")
    assert collect(preset, tmp_path / "kept") == first
    for mine in ("my_notes.md", "01_train_transcoders/manifest.json"):  # added, and edited
        (tmp_path / "kept" / mine).write_text("mine")
        with pytest.raises(InputError, match=f"holds other files .* {mine}"):
            collect(preset, tmp_path / "kept")
        assert (tmp_path / "kept" / mine).read_text() == "mine"
        (tmp_path / "kept" / mine).unlink()
    (tmp_path / "a_file").touch()
    with pytest.raises(InputError, match="a_file is a file: expected a folder"):
        collect(preset, tmp_path / "a_file")


def test_some_steps_alone_can_be_collected(tmp_path: Path) -> None:
    preset = replace(load_preset("demo"), runs_dir=tmp_path / "runs")
    for name in ("02_a", "02_a_evaluation", "08_seeds"):
        (preset.folder / name).mkdir(parents=True)
        (preset.folder / name / "table.csv").write_text("x")
    kept = collect(preset, tmp_path / "out", ["08", "02_a_"])
    inside = {path.relative_to(tmp_path / "out").as_posix() for path in kept}
    assert inside == {"02_a_evaluation/table.csv", "08_seeds/table.csv", "collected.json"}
    with pytest.raises(InputError, match="step '03': expected the beginning of one of"):
        collect(preset, tmp_path / "out", ["03"])
