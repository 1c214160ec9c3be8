"""The training log is whole after a kill, whichever byte it fell on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tclib.support.errors import InputError
from tclib.training.log import LOG, append_log, truncate_log
from tclib.training.trainer import Measurement

NAMES = ("one", "two")


def log(path: Path, *steps: int, names: tuple[str, ...] = NAMES) -> None:
    for step in steps:
        measured = {name: Measurement(0.5 + step, 3.25, 0.125, 0.0) for name in names}
        append_log(path, step, step * 10, measured, 100.0)


@pytest.mark.parametrize("checkpoint", [0, 20])
def test_no_line_stands_twice_and_none_is_cut_whichever_byte_a_kill_fell_on(
    checkpoint: int, tmp_path: Path
) -> None:
    steps = [5, 10, 20, 25, 30]
    log(tmp_path / "whole.csv", *steps)
    whole = (tmp_path / "whole.csv").read_bytes()
    log(tmp_path / "before.csv", *(step for step in steps if step <= checkpoint))
    at_checkpoint = (tmp_path / "before.csv").stat().st_size if checkpoint else 0
    for n_bytes in range(at_checkpoint, len(whole) + 1):
        path = tmp_path / LOG
        path.write_bytes(whole[:n_bytes])
        truncate_log(path, checkpoint, NAMES)
        log(path, *(step for step in steps if step > checkpoint))
        assert path.read_bytes() == whole, n_bytes


def test_the_lines_of_other_dictionaries_stay(tmp_path: Path) -> None:
    path = tmp_path / LOG
    log(path, 5, 10, names=("another",))
    log(path, 5, 10)
    truncate_log(path, 5, NAMES)
    kept = [line.split(",")[:3] for line in path.read_text().splitlines()[1:]]
    assert kept == [
        ["5", "50", "another"],
        ["10", "100", "another"],
        ["5", "50", "one"],
        ["5", "50", "two"],
    ]


@pytest.mark.parametrize("text", ["my own notes", "epoch,loss\n1,0.5\n", "\x00\xff"])
def test_a_file_that_is_no_training_log_is_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / LOG
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="training_log.csv is no training log: move it away"):
        truncate_log(path, 0, NAMES)
    assert path.read_bytes() == text.encode("latin-1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / LOG).symlink_to("/dev/full")
    with pytest.raises(InputError, match="training_log.csv could not be written .*No space left"):
        log(tmp_path / LOG, 5)
