"""Artifacts: where results live, how they are written whole or not at all, and their manifests.

`data/runs/<preset>/<step>/` holds values, figures and `manifest.json`. A folder or a file is written
under a temporary name and renamed, so that a reader never sees half of one; tensors carry a checksum
of their own; a wrong hash names the file and what to run.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "data"
MANIFEST = "manifest.json"
HEADER_KEY = "tclib"
RECORDED_PACKAGES = ("tclib", "torch", "transformers", "datasets", "safetensors", "numpy", "pandas")


class InputError(ValueError):
    """Bad input. The message names the value, what was expected and what to do."""


# ---------------------------------------------------------------------------------------------
# Whole or not at all


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Errors: `InputError` when the disk is full or the folder cannot be written; what `path` held
    before is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} could not be written ({error}): free some disk space and run it again; "
            "what was there before is kept"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` on success, vanishes on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; a second run at the same time gets an `InputError`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another run is working in {folder}: wait for it to end, or choose another runs_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


# ---------------------------------------------------------------------------------------------
# Tensors


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file whose header holds `metadata` (as JSON) and a checksum."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"metadata": dict(metadata), "sha256": tensors_hash(whole)}
    with new_file(path) as temporary:
        # One key: safetensors writes several in no fixed order, and equal runs must give equal bytes.
        save_file(whole, temporary, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})


def load_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, metadata).

    Errors: `InputError` naming the file and `remedy` if it is missing, truncated or altered.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or corrupted ({error}): {remedy}") from error
    if "sha256" not in header:
        raise InputError(f"{path} was not written by tclib (no checksum in its header): {remedy}")
    if tensors_hash(tensors) != header["sha256"]:
        raise InputError(f"{path} is corrupted (its checksum does not match): {remedy}")
    return tensors, header["metadata"]


# ---------------------------------------------------------------------------------------------
# Manifests


@dataclass(frozen=True)
class Step:
    """One step of a preset's run and the command that makes it again."""

    preset: str
    name: str
    folder: Path

    @property
    def remedy(self) -> str:
        return (
            f"delete {self.folder} and run "
            f"`tclib run --preset {self.preset} --only {self.name[:2]}`"
        )


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    step: Step,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    wall_seconds: float,
    folder: Path | None = None,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Write manifest.json for everything that lies in `folder` (the step's own by default)."""
    folder = folder or step.folder
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


def read_manifest(step: Step) -> dict[str, Any]:
    """The manifest of a finished step, with every output's hash checked.

    Errors: `InputError` naming the file and the command if something is missing or was altered.
    """
    path = step.folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{step.folder} has not been made yet: run "
            f"`tclib run --preset {step.preset} --only {step.name[:2]}`"
        )
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is truncated or corrupted: {step.remedy}") from error
    for name, expected in manifest["outputs"].items():
        output = step.folder / name
        if not output.is_file() or file_hash(output) != expected:
            raise InputError(f"{output} is missing or was altered: {step.remedy}")
    return manifest


def record_extra(step: Step, path: Path) -> None:
    """Note a figure or table, and its hash, in the step's manifest; these may be made anew any time."""
    manifest_path = step.folder / MANIFEST
    manifest = json.loads(manifest_path.read_text())
    manifest.setdefault("extras", {})[path.name] = file_hash(path)
    with new_file(manifest_path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")


def is_current(step: Step, parameters: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Whether the step was already made, from these very parameters and inputs."""
    if not (step.folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(step)
    return manifest["parameters"] == json_ready(parameters) and manifest["inputs"] == dict(inputs)


def json_ready(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def current_commit() -> str | None:
    """The commit of this checkout, marked `+` when the tree differs from it; None outside git."""
    git = ["git", "-C", str(REPOSITORY)]
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


# ---------------------------------------------------------------------------------------------
# The paper's figures


def paper_table(name: str) -> list[dict[str, str]]:
    """The rows of data/paper/<name>.csv."""
    path = DATA / "paper" / f"{name}.csv"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.csv"))
        raise InputError(f"no paper table {name!r}: expected one of {', '.join(known)}")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
