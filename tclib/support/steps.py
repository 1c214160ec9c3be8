"""A step of the sequence is made once: its outputs first, its manifest last, then read from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from tclib.dictionaries.dictionary import Dictionary
from tclib.support.runs import (
    MANIFEST,
    InputError,
    Step,
    is_current,
    new_file,
    read_manifest,
    record_extra,
    tensors_hash,
    write_manifest,
)


def ensure(
    step: Step,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Call `make` unless the step is there already; return its manifest.

    `make` writes its outputs into step.folder, each of them whole or not at all, and returns a
    summary for the manifest, which is written last. Errors: `InputError` if the folder holds the
    step made from other parameters or inputs: nothing is overwritten.
    """
    if (step.folder / MANIFEST).is_file():
        if is_current(step, parameters, inputs):
            return read_manifest(step)
        raise InputError(
            f"{step.folder} was made with other parameters or inputs: keep it by choosing another "
            f"runs_dir, or {step.remedy} (--fresh makes every step anew)"
        )
    began = time.perf_counter()
    summary = make()
    write_manifest(step, parameters, inputs, time.perf_counter() - began, summary=summary)
    return read_manifest(step)


def weight_hashes(dictionaries: Mapping[str, Dictionary]) -> dict[str, str]:
    """A hash of each dictionary's weights, by name: what a step made from them depends on."""
    return {name: tensors_hash(d.parameters()) for name, d in dictionaries.items()}


def save_table(table: pd.DataFrame, step: Step, name: str) -> pd.DataFrame:
    """Write `<name>.csv` into the step's folder and its manifest; return the table."""
    write_csv(table, step, name)
    record_extra(step, step.folder / f"{name}.csv")
    return table


def write_csv(table: pd.DataFrame, step: Step, name: str) -> None:
    """Write `<name>.csv` into the step's folder, whole or not at all."""
    with new_file(step.folder / f"{name}.csv") as path:
        table.to_csv(path, index=False)
