"""Optional logging to Weights & Biases or TensorBoard; nothing of either is imported unless asked."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tclib.support.runs import InputError

_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


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
