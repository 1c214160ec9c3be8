"""What is told of a run: training_log.csv, and Weights & Biases or TensorBoard where they are asked for."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tclib.support.errors import InputError
from tclib.support.files import new_file, unwritten
from tclib.training.trainer import Measurement

LOG = "training_log.csv"
LOG_COLUMNS = ("step", "n_tokens", "dictionary", "loss", "l0", "fvu", "dead_share", "tokens_per_s")


class Tracker(NamedTuple):
    """Takes the measurements of each logged step, and is closed after the last."""

    log: Callable[[int, Mapping[str, Mapping[str, float]]], object]
    close: Callable[[], object]


def open_tracker(kind: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker of a `TrainingConfig.track`. Errors: `InputError` if it is not installed."""
    if kind == "none":
        return Tracker(lambda step, measured: None, lambda: None)
    if importlib.util.find_spec(kind) is None:
        raise InputError(f"track {kind!r}: not installed; run `pip install {kind}`")
    if kind == "wandb":
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(project="tclib", dir=str(folder), config=dict(config))
        return Tracker(lambda step, measured: run.log(_flat(measured), step=step), run.finish)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, measured: Mapping[str, Mapping[str, float]]) -> None:
        for name, value in _flat(measured).items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _flat(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{d}/{k}": v for d, line in measured.items() for k, v in line.items()}


class Meter:
    """Tokens a second since the run (or its resumption) began."""

    def __init__(self) -> None:
        self._began: float = time.perf_counter()
        self._first_tokens: int | None = None

    def tokens_per_s(self, n_tokens: int) -> float:
        now = time.perf_counter()
        if self._first_tokens is None:
            self._first_tokens, self._began = n_tokens, now
            return math.nan
        return (n_tokens - self._first_tokens) / max(now - self._began, 1e-9)


def append_log(
    path: Path, step: int, n_tokens: int, measured: dict[str, Measurement], speed: float
) -> None:
    """Add a line a dictionary to the log, and the header if it is new.

    Errors: `InputError` if the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(LOG_COLUMNS)
            for name, line in measured.items():
                writer.writerow([step, n_tokens, name, *asdict(line).values(), round(speed, 1)])
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that stands for these lines
    except OSError as error:
        raise InputError(unwritten(path, error)) from error


def truncate_log(path: Path, step: int, names: Collection[str]) -> None:
    """Keep the whole lines up to `step` of the dictionaries `names`, and all of others.

    What was logged after the checkpoint (or by a run that never had one) will be logged again, and so
    will a line that a kill cut short: it was being written after the checkpoint. Errors: `InputError` for a
    file of this name that is no training log.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if ",".join(LOG_COLUMNS).startswith(text.rstrip("\n")):
        path.unlink()  # cut within its first line
        return
    whole, _, _ = text.rpartition("\n")
    header, *rows = list(csv.reader(whole.splitlines())) or [[]]
    if tuple(header) != LOG_COLUMNS:
        raise InputError(f"{path} is no training log: move it away, or choose another folder")
    own = LOG_COLUMNS.index("dictionary")
    kept = [header, *(row for row in rows if row[own] not in names or int(row[0]) <= step)]
    with new_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(kept)
