"""A run's small files, gathered for keeping: figures, tables, manifests and executed notebooks, no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tclib.replication.presets import Preset
from tclib.support.errors import InputError
from tclib.support.files import file_hash, new_folder
from tclib.support.paths import read_json

KEPT = (".png", ".csv", ".json", ".jsonl", ".md", ".ipynb")
COLLECTED = "collected.json"
MAX_BYTES = 2_000_000
NOT_KEPT_FOLDERS = ("activations", "viewer")


def collect(preset: Preset, out: Path, steps: Sequence[str] = ()) -> list[Path]:
    """Copy what a run made, folder by folder, into `out`; return the files there.

    `steps`: only folders that begin with one of these, or all. Weights, activations and files over 2 MB stay behind; notebooks lose the paths of the machine that
    ran them. `collected.json` lists what was written, by hash. Errors: `InputError` for a run or a step that is
    not there, or a folder that holds anything but an earlier collection as it was written.
    """
    if not preset.folder.is_dir():
        raise InputError(f"{preset.folder} does not exist: run `{preset.command}` first")
    there = [path.name for path in preset.folder.iterdir() if path.is_dir()]
    for step in steps:
        if not step or not any(name.startswith(step) for name in there):
            raise InputError(f"step {step!r}: expected the beginning of one of {', '.join(there)}")
    _check_replaceable(out)
    with new_folder(out) as temporary:
        for path in sorted(preset.folder.rglob("*")):
            inside = path.relative_to(preset.folder)
            if not _is_kept(path, inside) or (steps and not str(inside).startswith(tuple(steps))):
                continue
            place = temporary / inside
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ipynb":
                text = _without_machine(path.read_text(encoding="utf-8"), preset)
                place.write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(path, place)
        written = {name: file_hash(path) for name, path in _files(temporary).items()}
        (temporary / COLLECTED).write_text(json.dumps(written, indent=1), encoding="utf-8")
    return sorted(_files(out).values())


def _check_replaceable(out: Path) -> None:
    if out.is_file():
        raise InputError(f"{out} is a file: expected a folder")
    there = _files(out)
    written = read_json(out / COLLECTED, "choose a new folder") if COLLECTED in there else {}
    written = written if isinstance(written, dict) else {}
    other = [n for n, path in there.items() if n != COLLECTED and written.get(n) != file_hash(path)]
    if other:
        raise InputError(
            f"{out} holds other files than an earlier collection, {other[0]} among them: choose a new folder"
        )


def _files(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _is_kept(path: Path, inside: Path) -> bool:
    if not path.is_file() or path.suffix not in KEPT:
        return False
    hidden = any(part.startswith(".") for part in inside.parts)
    return (
        not hidden
        and not set(inside.parts) & set(NOT_KEPT_FOLDERS)
        and path.stat().st_size <= MAX_BYTES
    )


def _without_machine(text: str, preset: Preset) -> str:
    """A notebook without papermill's record of the run, and with runs_dir as it is in the checkout."""
    notebook: dict[str, Any] = json.loads(text)
    for holder in (notebook, *notebook["cells"]):
        holder["metadata"].pop("papermill", None)
        holder["metadata"].pop("execution", None)
    plain = json.dumps(notebook, indent=1, ensure_ascii=False)
    return plain.replace(str(preset.runs_dir), "data/runs").replace(str(Path.home()), "~") + "\n"
