"""A step of the sequence is made once: its outputs first, its manifest last, then read from there."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tclib.support.errors import InputError
from tclib.support.files import exclusive, file_hash, json_ready, new_file
from tclib.support.paths import read_json
from tclib.support.places import CHECKOUT

MANIFEST = "manifest.json"
SOURCE, SOURCE_STATE = "source", "source_state"
MAKING, NOTING = "step", "manifest"  # what a step's folder is held for, besides training
RECORDED_PACKAGES = ("tclib", "torch", "transformers", "datasets", "safetensors", "numpy", "pandas")


@dataclass(frozen=True)
class Step:
    """One step of a preset's run, and the command that makes the whole run."""

    preset: str
    name: str
    folder: Path
    run_command: str

    @property
    def command(self) -> str:
        """What makes this step alone, to be pasted into a shell."""
        return f"{self.run_command} --only {self.name[:2]}"

    @property
    def remedy(self) -> str:
        return f"delete {self.folder} and run `{self.command}`"


def ensure(
    step: Step,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Call `make` unless the step is there already; return its manifest.

    `make` writes its outputs into step.folder, each of them whole or not at all, and returns a
    summary for the manifest, which is written last. A second run waits for one that is making the step,
    and loads what that made. Errors: `InputError` if the folder holds the step made from other parameters
    or inputs: nothing is overwritten.
    """
    path = step.folder / MANIFEST
    if not path.is_file():
        with exclusive(step.folder, is_patient=True, purpose=MAKING):
            if not path.is_file():  # which another run may have written meanwhile
                began = time.perf_counter()
                summary = make()
                wall_seconds = time.perf_counter() - began
                return write_manifest(step, parameters, inputs, wall_seconds, summary)
    manifest = read_manifest(step)
    held = _what_it_is_of(manifest["parameters"], manifest["inputs"])
    wanted = _what_it_is_of(json_ready(parameters), inputs)
    if held == wanted:
        return manifest
    other = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
    raise InputError(
        f"{step.folder} was made with other parameters or inputs ({', '.join(other[:5])}): keep it by "
        f"choosing another runs_dir, or {step.remedy} (--fresh makes every step anew)"
    )


def _what_it_is_of(parameters: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    return {**dict(parameters), **{f"input {name}": value for name, value in inputs.items()}}


def source_input(step: Step, files: Sequence[Path]) -> dict[str, str]:
    """Of the files that a step copies from: {"source": their hash}, for `ensure`; empty without any.

    A finished step's own hash stands where they lie as it left them (`source_state`), and where they are
    gone: a run holds its own copy. The cache of the hub names its files by their content.
    """
    path = step.folder / MANIFEST
    if path.is_file():
        manifest = _manifest(path, step.remedy)
        held = manifest["inputs"].get(SOURCE)
        as_it_was = manifest.get("summary", {}).get(SOURCE_STATE) == source_state(files)
        if held is None or not files or as_it_was:
            return {} if held is None else {SOURCE: held}
    if not files:
        return {}
    named = [(path.name, _content_name(path)) for path in files]
    return {SOURCE: hashlib.sha256(json.dumps(named).encode()).hexdigest()}


def _content_name(path: Path) -> str:
    return path.resolve().name if path.is_symlink() else file_hash(path)


def source_state(files: Sequence[Path]) -> str:
    """A hash of the names, sizes and times of files."""
    stats = [(str(path), path.stat()) for path in files]
    states = [f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in stats]
    return hashlib.sha256("\n".join(states).encode()).hexdigest()


def save_table(table: pd.DataFrame, step: Step, name: str) -> pd.DataFrame:
    """Write `<name>.csv` into the step's folder and its manifest; return the table."""
    save_extra(step, f"{name}.csv", lambda path: table.to_csv(path, index=False))
    return table


def write_csv(table: pd.DataFrame, step: Step, name: str) -> None:
    """Write `<name>.csv` into the step's folder, whole or not at all."""
    with new_file(step.folder / f"{name}.csv") as path:
        table.to_csv(path, index=False)


def write_manifest(
    step: Step,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    wall_seconds: float,
    summary: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write manifest.json for everything that lies in the step's folder; return it."""
    folder = step.folder
    outputs = {
        str(path.relative_to(folder)): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    manifest = {
        "preset": step.preset,
        "step": step.name,
        "parameters": json_ready(parameters),
        "summary": json_ready(summary or {}),
        "inputs": dict(inputs),
        "outputs": outputs,
        "versions": package_versions(),
        "commit": current_commit(),
        "wall_seconds": round(wall_seconds, 2),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with new_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def read_manifest(step: Step) -> dict[str, Any]:
    """The manifest of a finished step, with every output's hash checked.

    Errors: `InputError` naming the file and the command if something is missing or was altered.
    """
    path = step.folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{step.folder} has not been made yet: run `{step.command}`")
    manifest = _manifest(path, step.remedy)
    for output in _altered(step.folder, manifest["outputs"]):
        raise InputError(f"{output} is missing or was altered: {step.remedy}")
    return manifest


def _manifest(path: Path, remedy: str) -> dict[str, Any]:
    held = read_json(path, remedy)
    if not isinstance(held, dict) or not {"parameters", "inputs", "outputs"} <= held.keys():
        raise InputError(f"{path} is truncated or corrupted: {remedy}")
    return held


def _altered(folder: Path, named: Mapping[str, str]) -> Iterator[Path]:
    """Files of `folder` that are missing or have another hash than the one `named`."""
    for name, expected in named.items():
        path = folder / name
        if not path.is_file() or file_hash(path) != expected:
            yield path


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest in `folder` names, figures too, is there as it was written."""
    try:
        manifest = _manifest(folder / MANIFEST, "")
    except InputError:
        return False
    named = {**manifest["outputs"], **manifest.get("extras", {})}
    return not any(_altered(folder, named))


def save_extra(step: Step, name: str, write: Callable[[Path], object]) -> None:
    """Have `write` make a figure or table of a finished step, and note its hash in the manifest.

    These may be made anew any time; where a finished run cannot be written, nothing is.
    """
    if not os.access(step.folder, os.W_OK):
        return
    with new_file(step.folder / name) as temporary:
        write(temporary)
        # Before the file has its name, so that no kill leaves a file there that nobody knows.
        _note(step, name, file_hash(temporary))


def _note(step: Step, name: str, digest: str) -> None:
    """Add a file's hash to the manifest; two runs that draw at once do it one after the other."""
    path = step.folder / MANIFEST
    with exclusive(step.folder, is_patient=True, purpose=NOTING):
        manifest = _manifest(path, step.remedy)
        manifest.setdefault("extras", {})[name] = digest
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2) + "\n")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def current_commit() -> str | None:
    """The commit of this checkout, marked `+` when the tree differs from it.

    None for an installed package, whatever repository it lies in, and outside git.
    """
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None
    git = ["git", "-C", str(CHECKOUT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty.strip() else "")
