"""Ctrl-C, sent to a real process: where it stopped in one sentence, status 130, and the next run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import write_notebook

from tclib.replication.presets import PRESETS
from tclib.training.log import LOG
from tclib.training.train import CHECKPOINT

pytestmark = pytest.mark.slow
PATIENCE = 120.0  # seconds for imports on a busy machine


def started(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that leads a group, as a shell's foreground command does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TCLIB_QUIET": "0"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload,no-any-return]


def interrupted(process: subprocess.Popen[str], when: Callable[[], bool]) -> list[str]:
    """Send Ctrl-C once `when` holds; the lines that the process printed as errors."""
    deadline = time.monotonic() + PATIENCE
    while not when():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130 and "Traceback" not in errors, errors
    return errors.strip().splitlines()


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "TCP" not in errors, errors
    return output


def test_training_says_at_which_step_it_stopped_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    values["companions"] = []
    values["corpus"].update(n_train_tokens=12_800, n_eval_tokens=1_280)
    values["transcoders"].update(expansion=2)
    values["transcoders"]["training"].update(
        n_tokens=256 * 600, batch_size=256, checkpoint_every_steps=20, log_every_steps=10
    )
    preset = tmp_path / "small.yaml"
    preset.write_text(yaml.safe_dump(values))

    def train(out: str) -> subprocess.Popen[str]:
        options = ["--preset", str(preset), "--runs-dir", str(tmp_path / "runs"), "--layer", "1"]
        return started("from tclib.cli import main; main()", "train", str(tmp_path / out), *options)

    whole, one = tmp_path / "whole", tmp_path / "one"
    finished(train("whole"))
    *_, said = interrupted(train("one"), (one / CHECKPOINT).is_file)
    step, n_steps, kept = (int(word.strip(":,")) for word in said.split() if word[0].isdigit())
    assert said == (
        f"tclib: stopped at step {step} of 600: run again, it goes on from step {kept}, its last checkpoint"
    )
    assert n_steps == 600 and kept <= step < 600 and kept % 20 == 0
    assert (one / CHECKPOINT).is_file() and not list(one.glob("*L1*.safetensors"))
    assert "ce_recovered" in finished(train("one"))
    weights = [next(folder.glob("*L1*.safetensors")).read_bytes() for folder in (one, whole)]
    assert weights[0] == weights[1] and not (one / CHECKPOINT).exists()
    logs = [pd.read_csv(folder / LOG).drop(columns="tokens_per_s") for folder in (one, whole)]
    pd.testing.assert_frame_equal(*logs)


RUN = """
import sys
from pathlib import Path
from tclib import cli
cli.NOTEBOOKS = Path(sys.argv.pop(1))
cli.main()
"""
NOTES = "import os, time; open(runs_dir + '/{name}', 'a').write(str(os.getpid()))\n"
WAITS = "time.sleep(0 if os.path.exists(runs_dir + '/ok') else 300)"


def test_a_run_says_in_which_notebook_it_stopped_and_leaves_no_kernel(tmp_path: Path) -> None:
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    write_notebook(notebooks / "00_a.ipynb", NOTES.format(name="00_a"))
    write_notebook(notebooks / "01_b.ipynb", NOTES.format(name="01_b") + WAITS)

    def run() -> subprocess.Popen[str]:
        return started(RUN, str(notebooks), "run", "--runs-dir", str(tmp_path))

    *others, said = interrupted(run(), (tmp_path / "01_b").is_file)
    command = f"`tclib run --preset demo --runs-dir {tmp_path}`"
    assert said == f"tclib: stopped in notebook 01_b: {command} goes on from there"
    assert not any("TCP" in line for line in others)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "01_b").read_text()), 0)
    assert json.loads((tmp_path / "demo" / "progress.json").read_text()) == {"failed": "01"}
    assert [path.name for path in (tmp_path / "demo" / "notebooks").iterdir()] == ["00_a.ipynb"]
    (tmp_path / "ok").touch()
    began = (tmp_path / "00_a").read_text()
    assert "The last run stopped in notebook 01: going on from there." in finished(run())
    assert (tmp_path / "00_a").read_text() == began
    assert not (tmp_path / "demo" / "progress.json").exists()
