"""What of earlier runs is deleted, and what never is; what a kill or a damaged file leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tclib.replication import sequence
from tclib.replication.executed import execute, is_current
from tclib.replication.presets import Preset, load_preset
from tclib.replication.sequence import check_all_ready, delete, earlier_runs, stopped_at
from tclib.support.errors import InputError
from tclib.support.files import exclusive, file_hash
from tclib.support.places import NOTEBOOKS
from tclib.support.steps import ensure, is_whole

MADE = (
    *("00_model_and_data/train.npy", "05_interpretability_comparison/items.csv"),
    *("notebooks/.ipynb_checkpoints/x", "activations/a/x.npy", "progress.json"),
    *(".01_train_transcoders.lock", ".x.1.tclib-tmp", ".ipynb_checkpoints/x"),
)


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """A preset with an earlier run, and another folder beside it."""
    preset = load_preset("demo", runs_dir=tmp_path / "runs")
    for name in (*(f"demo/{made}" for made in MADE), "other/file"):
        path = preset.runs_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return preset


def left(preset: Preset) -> set[str]:
    return {path.name for path in preset.runs_dir.iterdir()}


def test_a_run_is_deleted_and_nothing_beside_it(preset: Preset) -> None:
    assert earlier_runs(preset, own=False, companions=False) == []
    folders = earlier_runs(preset, own=True, companions=True)
    assert [folder.name for folder in folders] == ["demo", "demo-neox"]
    delete(folders)
    assert left(preset) == {"other"}


@pytest.mark.parametrize(
    "name",
    [
        "notes.md",
        "thesis/chapter.tex",
        ".git/config",
        "05_interpretability_comparison/ratings_a.json",
        "00_model_and_data/my_notes.txt",
        "03_my_own/p.jpg",
        "03_my_own/table.csv",
        "04_blind_case_studies/notes.md",
        "activations/notes.md",
        "notebooks/my_analysis.ipynb",
    ],
)
def test_what_no_run_can_make_again_is_not_deleted(name: str, preset: Preset) -> None:
    path = preset.folder / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(InputError, match=f"{name.split('/')[0]}.* was not made by a run"):
        earlier_runs(preset, own=True, companions=False)
    assert path.exists()


def test_a_run_in_whose_step_somebody_works_is_not_deleted(preset: Preset) -> None:
    at_work = exclusive(preset.folder / "00_model_and_data")
    with at_work, pytest.raises(InputError, match="another run is working in .*00_model"):
        delete([preset.folder])
    assert (preset.folder / MADE[0]).exists()


def test_a_run_that_cannot_be_deleted_is_not_taken_for_deleted(
    preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for where, name, stays in ((os, "replace", True), (shutil, "rmtree", False)):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, refuses)
            with pytest.raises(InputError, match="demo could not be deleted .*Permission denied"):
                delete([preset.folder])
        assert preset.folder.exists() == stays


def test_of_two_runs_of_which_one_cannot_be_deleted_both_stay(
    preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.replace

    def refuses(source: Path, target: Path) -> None:
        if source == preset.runs_dir / "other":
            raise PermissionError(13, "Permission denied")
        original(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    with pytest.raises(InputError, match="other could not be deleted .*Permission denied"):
        delete([preset.folder, preset.runs_dir / "other"])
    assert (preset.folder / MADE[0]).exists() and left(preset) == {"demo", "other"}


def test_a_run_whose_step_is_being_made_is_not_deleted(preset: Preset) -> None:
    one = preset.step("00_model_and_data")

    def make() -> dict[str, Any]:
        with pytest.raises(InputError, match="another run is working in .*00_model"):
            delete([preset.folder])
        return {}

    assert ensure(one, {}, {}, make)["outputs"] == {
        "train.npy": file_hash(one.folder / "train.npy")
    }


def test_a_pipe_in_a_run_is_not_read(preset: Preset) -> None:
    os.mkfifo(preset.folder / "notebooks" / "own.ipynb")
    with pytest.raises(InputError, match="own.ipynb was not made by a run"):
        earlier_runs(preset, own=True, companions=False)


def test_a_kill_amid_deletion_leaves_no_half_of_a_run(preset: Preset) -> None:
    """What is being deleted has no run's name any more, and is swept at the next start."""
    script = f"""
import os, shutil
from pathlib import Path
from tclib.replication.sequence import delete
shutil.rmtree = lambda path: os._exit(9)
delete([Path({str(preset.folder)!r})])
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    assert not preset.folder.exists() and len(left(preset)) == 2
    with exclusive(preset.folder):
        pass
    assert left(preset) - {".demo.lock"} == {"other"}


def test_companions_are_looked_for_before_anything_is_made_where_they_will_be_needed(
    preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sequence, "check_ready", lambda one: asked.append(one.name))
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    check_all_ready(preset, every[:2])
    check_all_ready(replace(preset, skipped={"02": "no sweep"}), every)
    assert asked == ["demo", "demo"]
    check_all_ready(preset, every)
    assert asked == ["demo", "demo", "demo", "demo-neox"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"other": 1}', "null"])
def test_damaged_records_are_not_relied_on(text: str, preset: Preset) -> None:
    for name in ("progress.json", "00_model_and_data/manifest.json", "notebooks/00_a.ipynb"):
        (preset.folder / name).write_text(text)
    assert stopped_at(preset) is None
    assert not is_whole(preset.folder / "00_model_and_data")
    assert not is_current(preset.folder / "notebooks" / "00_a.ipynb", "x")


def test_an_executed_copy_is_current_as_long_as_it_and_its_steps_are_there(tmp_path: Path) -> None:
    notebook, output = tmp_path / "00_a.ipynb", tmp_path / "runs" / "x" / "notebooks" / "00_a.ipynb"
    manifest = tmp_path / "runs" / "x" / "00_step" / "manifest.json"
    source = f"from pathlib import Path\np = Path({str(manifest)!r})\np.parent.mkdir(); p.write_text('{{}}'); print(1)"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), notebook)
    output.parent.mkdir(parents=True)
    execute(notebook, output, {}, "made from")
    assert is_current(output, "made from") and not is_current(output, "other")
    text = output.read_text()
    held = json.loads(text)
    held["cells"][-1]["outputs"] = []
    output.write_text(json.dumps(held))
    assert not is_current(output, "made from")  # its outputs were emptied
    output.write_text(text)
    manifest.unlink()
    assert not is_current(output, "made from")  # its step is gone
