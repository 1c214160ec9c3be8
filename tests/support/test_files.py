"""Artifacts are whole or absent, verified when read, and say what to run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from filelock import FileLock

from tclib.replication.paper import paper_table
from tclib.support import steps
from tclib.support.errors import InputError
from tclib.support.files import (
    copy_folder,
    exclusive,
    file_hash,
    load_tensors,
    new_file,
    new_folder,
    save_tensors,
)
from tclib.support.places import CHECKOUT
from tclib.support.steps import (
    Step,
    current_commit,
    ensure,
    read_manifest,
    save_extra,
    write_manifest,
)


def step(tmp_path: Path) -> Step:
    name = "01_train_transcoders"
    return Step("demo", name, tmp_path / name, "tclib run --preset demo")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_file(tmp_path / "a" / "x.txt") as path:
        path.write_text("whole")
        assert not (tmp_path / "a" / "x.txt").exists()
    with pytest.raises(KeyError), new_file(tmp_path / "a" / "x.txt") as path:
        path.write_text("half")
        raise KeyError
    assert (tmp_path / "a" / "x.txt").read_text() == "whole"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with new_folder(tmp_path / "x") as folder:
            (folder / "a").write_text(content)
    with pytest.raises(KeyError), new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("third")
        raise KeyError
    assert (tmp_path / "x" / "a").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_is_being_replaced_is_there_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("first")

    def fails(_source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(InputError, match="No space left on device"),
        new_folder(tmp_path / "x") as folder,
    ):
        (folder / "a").write_text("second")
        monkeypatch.setattr(os, "replace", fails)
    assert (tmp_path / "x" / "a").read_text() == "first"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's /proc")
def test_where_nothing_can_be_written_another_place_is_advised_not_more_space() -> None:
    for path in (Path("/proc/x.safetensors"), Path("/proc/x/y.safetensors")):
        with pytest.raises(InputError, match="could not be written .*choose a place"):
            save_tensors(path, {"a": torch.zeros(2)}, {})


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_finished_run_on_a_disk_that_cannot_be_written_can_be_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_self: object, timeout: float) -> None:
        raise OSError(number, "cannot be written")

    monkeypatch.setattr(FileLock, "acquire", refuses)
    with exclusive(tmp_path / "run"):
        pass
    monkeypatch.setattr(
        FileLock, "acquire", lambda _self, timeout: (_ for _ in ()).throw(OSError(5, "I/O"))
    )
    with (
        pytest.raises(InputError, match=r"run could not be written \(.*I/O"),
        exclusive(tmp_path / "run"),
    ):
        pass


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "run"
    (folder / "step" / f".tables.{dead.pid}.tclib-tmp").mkdir(parents=True)
    for name in (
        f".a.csv.{dead.pid}.tclib-tmp",
        f".b.csv.{os.getpid()}.tclib-tmp",
        "c.tmp",
        ".d.tmp",
        ".notes.99999999.tmp",
    ):
        (folder / "step" / name).write_text("x")
    with exclusive(folder):
        pass
    left = {path.name for path in (folder / "step").iterdir()}
    assert left == {f".b.csv.{os.getpid()}.tclib-tmp", "c.tmp", ".d.tmp", ".notes.99999999.tmp"}


def test_what_is_written_where_nothing_is_locked_sweeps_what_a_killed_process_left_of_it(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [
        tmp_path / f".{name}.{dead.pid}.tclib-tmp"
        for name in ("[x].json", "other.json", "x", "x.old")
    ]
    for path in left[:2]:
        path.touch()
    for path in left[2:]:
        path.mkdir()
    with new_file(tmp_path / "[x].json") as path:
        path.write_text("whole")
    with new_folder(tmp_path / "x") as path:
        (path / "a").write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {"[x].json", "x", left[1].name}


def test_bytes_and_then_names_are_on_the_disk_when_a_file_or_folder_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(("replace", source.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with new_file(tmp_path / "x") as path:
        path.touch()
    assert done == [("fsync", path.name), ("replace", path.name), ("fsync", tmp_path.name)]
    done.clear()
    with new_folder(tmp_path / "y") as path:
        (path / "a").touch()
    assert done == [("fsync", "a"), ("replace", path.name), ("fsync", tmp_path.name)]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    below = tmp_path / "a_file" / "x"
    for attempt, sentence in (
        (new_file(below), "a_file is a file: expected a folder"),
        (new_folder(below), "a_file is a file: expected a folder"),
        (exclusive(below.parent), "a_file is a file: expected a folder"),
        (exclusive(below), "a_file is a file: expected a folder"),
    ):
        with pytest.raises(InputError, match=sentence), attempt:
            pass


@pytest.mark.slow
def test_a_write_beyond_the_limit_of_the_disk_is_one_error_and_loses_nothing(
    tmp_path: Path,
) -> None:
    """A real failed write, from a file-size limit, in a process of its own."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from tclib.support.errors import InputError
from tclib.support.files import save_tensors
path = Path({str(tmp_path)!r}) / "t.safetensors"
save_tensors(path, {{"a": torch.ones(4)}}, {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_tensors(path, {{"a": torch.ones(1_000_000)}}, {{}})
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "could not be written" in done.stdout, done.stderr
    assert "free some disk space" in done.stdout
    assert torch.equal(load_tensors(tmp_path / "t.safetensors", "")[0]["a"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3), "b": torch.randn(2, 3).T, "c": torch.tensor(2.5)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"step": 7})
    loaded, metadata = load_tensors(tmp_path / "t.safetensors", "")
    assert metadata == {"step": 7}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "foreign"])
def test_damaged_tensors_are_named_with_the_remedy(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(100)}, {})
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:200])
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.arange(3)}, path)
    with pytest.raises(InputError, match=r"t\.safetensors .*: do this$"):
        load_tensors(path, "do this")


def test_a_manifest_records_what_it_took(tmp_path: Path) -> None:
    one = step(tmp_path)
    one.folder.mkdir()
    (one.folder / "values.csv").write_text("a\n1\n")
    write_manifest(one, {"n": 1, "seed": 3}, {"corpus": "abc"}, 1.25)
    manifest = read_manifest(one)
    assert manifest["parameters"] == {"n": 1, "seed": 3}
    assert set(manifest["outputs"]) == {"values.csv"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["wall_seconds"] == 1.25
    assert ensure(one, {"n": 1, "seed": 3}, {"corpus": "abc"}, dict) == manifest
    for other in (({"n": 2, "seed": 3}, {"corpus": "abc"}), ({"n": 1, "seed": 3}, {"corpus": "x"})):
        with pytest.raises(InputError, match="made with other parameters or inputs"):
            ensure(one, *other, dict)


def test_an_altered_artifact_is_named_with_the_command(tmp_path: Path) -> None:
    one = step(tmp_path)
    with pytest.raises(
        InputError, match="has not been made yet: run `tclib run --preset demo --only 01`"
    ):
        read_manifest(one)
    one.folder.mkdir()
    (one.folder / "values.csv").write_text("a\n1\n")
    write_manifest(one, {}, {}, 0.0)
    (one.folder / "values.csv").write_text("a\n2\n")
    with pytest.raises(
        InputError, match=r"values\.csv is missing or was altered: delete .* --only 01"
    ):
        read_manifest(one)
    (one.folder / "manifest.json").write_text('{"half')
    with pytest.raises(InputError, match=r"manifest\.json is truncated or corrupted"):
        read_manifest(one)


def test_figures_join_the_manifest_without_making_it_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = step(tmp_path)
    one.folder.mkdir()
    write_manifest(one, {}, {}, 0.0)
    save_extra(one, "figure.png", lambda path: path.write_bytes(b"png"))
    held = json.loads((one.folder / "manifest.json").read_text())
    assert held["extras"] == {"figure.png": file_hash(one.folder / "figure.png")}
    (one.folder / "figure.png").write_bytes(b"drawn again")
    assert ensure(one, {}, {}, dict)["parameters"] == {}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    save_extra(one, "figure.png", lambda path: path.write_bytes(b"where nothing can be written"))
    assert (one.folder / "figure.png").read_bytes() == b"drawn again"


def side_by_side(*calls: Callable[[], object]) -> None:
    threads = [Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_two_runs_one_makes_a_step_and_the_other_waits_and_loads_it(tmp_path: Path) -> None:
    one, made, manifests = step(tmp_path), [], []

    def make() -> dict[str, int]:
        made.append(1)
        time.sleep(0.3)
        return {"n": len(made)}

    side_by_side(*[lambda: manifests.append(ensure(one, {}, {}, make))] * 2)
    assert len(made) == 1 and manifests[0] == manifests[1]


def test_of_two_runs_that_draw_at_once_neither_loses_its_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = step(tmp_path)
    one.folder.mkdir()
    write_manifest(one, {}, {}, 0.0)
    original = steps._manifest
    monkeypatch.setattr(steps, "_manifest", lambda *a: (original(*a), time.sleep(0.2))[0])
    names = ["a.png", "b.png"]
    side_by_side(*(partial(save_extra, one, name, Path.touch) for name in names))
    held = json.loads((one.folder / "manifest.json").read_text())
    assert sorted(held["extras"]) == names


def test_a_figure_that_the_manifest_cannot_name_is_not_there(tmp_path: Path) -> None:
    """Else a kill between the two would leave a file that nobody can tell from a user's."""
    one = step(tmp_path)
    one.folder.mkdir()
    (one.folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json is truncated"):
        save_extra(one, "a.png", Path.touch)
    assert not (one.folder / "a.png").exists()


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "run"):
        with pytest.raises(InputError, match="another run"), exclusive(tmp_path / "run"):
            pass
        raise KeyError
    with exclusive(tmp_path / "run"):
        pass


def test_who_waits_for_another_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCLIB_QUIET", "0")
    is_held = Event()

    def hold() -> None:
        with exclusive(tmp_path / "run"):
            is_held.set()
            time.sleep(0.2)

    other = Thread(target=hold)
    other.start()
    is_held.wait()
    with exclusive(tmp_path / "run", is_patient=True):
        assert f"waiting for another run in {tmp_path}/run" in capsys.readouterr().err
    other.join()


def test_a_folder_is_copied_and_no_changed_file_overwritten(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("a.txt", "sub/b.txt", ".hidden/c.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    written, kept = copy_folder(source, target)
    assert (written, kept) == ([target / "a.txt", target / "sub" / "b.txt"], [])
    (target / "a.txt").unlink()
    (target / "mine.txt").touch()
    assert copy_folder(source, target) == ([target / "a.txt"], [target / "sub" / "b.txt"])
    (target / "a.txt").unlink()
    (target / "sub" / "b.txt").write_text("changed")
    with pytest.raises(InputError, match=r"b\.txt would be overwritten: choose another folder"):
        copy_folder(source, target)
    assert not (target / "a.txt").exists()
    assert (target / "sub" / "b.txt").read_text() == "changed"
    assert copy_folder(source, source)[0] == []


def test_paper_tables_are_read_and_unknown_ones_listed() -> None:
    rows = paper_table("fig3_pythia410m")
    assert len(rows) == 9
    assert rows[0]["kind"] == "sae_mlp_out"
    with pytest.raises(InputError, match="no paper table 'fig9': expected one of .*table1"):
        paper_table("fig9")


def test_the_commit_is_that_of_the_checkout() -> None:
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=CHECKOUT)
    commit = current_commit()
    assert commit is not None
    assert commit.rstrip("+") == git.stdout.strip()
