"""Optional logging to Weights & Biases or TensorBoard; nothing of either is imported unless asked."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.training.trainer import Measurement

_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


@runtime_checkable
class Tracker(Protocol):
    """Takes the measurements of each logged step."""

    def log(self, step: int, measured: Mapping[str, Mapping[str, float]]) -> None: ...

    def close(self) -> None: ...


def open_tracker(kind: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker of the given kind. Errors: `InputError` if it is unknown or not installed."""
    if kind == "none":
        return _Silent()
    if kind not in _PACKAGES:
        raise InputError(f"track {kind!r}: expected 'none', 'wandb' or 'tensorboard'")
    if importlib.util.find_spec(_PACKAGES[kind]) is None:
        raise InputError(f"track {kind!r}: not installed; run `pip install {_PACKAGES[kind]}`")
    return _WandB(folder, config) if kind == "wandb" else _TensorBoard(folder)


class _Silent:
    def log(self, step: int, measured: Mapping[str, Mapping[str, float]]) -> None:
        pass

    def close(self) -> None:
        pass


class _WandB:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="tclib", dir=str(folder), config=dict(config))

    def log(self, step: int, measured: Mapping[str, Mapping[str, float]]) -> None:
        self._run.log(_flat(measured), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, measured: Mapping[str, Mapping[str, float]]) -> None:
        for name, value in _flat(measured).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def _flat(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{d}/{k}": v for d, line in measured.items() for k, v in line.items()}


LOG = "training_log.csv"


LOG_COLUMNS = (
    "step",
    "n_tokens",
    "dictionary",
    "loss",
    "l0",
    "fvu",
    "dead_share",
    "tokens_per_s",
)


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
    """Add a line a dictionary to the log, and the header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(LOG_COLUMNS)
        for name, line in measured.items():
            writer.writerow([step, n_tokens, name, *asdict(line).values(), round(speed, 1)])


def truncate_log(path: Path, step: int) -> None:
    """Keep the lines up to `step`: what was logged after the checkpoint will be logged again."""
    if not path.exists():
        return
    with open(path, newline="") as file:
        kept = [row for row in csv.reader(file) if row[:1] == ["step"] or int(row[0]) <= step]
    with new_file(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(kept)
