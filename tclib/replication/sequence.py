"""The notebooks of a preset in their order: where the last run stopped, and what of it may be deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tclib.replication.executed import (
    FINGERPRINT,
    FIRST_WITH_COMPANIONS,
    are_intact,
    execute,
    fingerprint,
    is_current,
)
from tclib.replication.model_and_data import SAMPLES, check_ready
from tclib.replication.presets import Preset
from tclib.replication.run import Run
from tclib.support.errors import InputError
from tclib.support.files import TEMPORARY, exclusive, new_file, temporary_path
from tclib.support.places import NOTEBOOKS
from tclib.support.progress import progress
from tclib.support.steps import MAKING, MANIFEST
from tclib.training.log import LOG
from tclib.training.train import CACHE, CHECKPOINT

EXECUTED = "notebooks"
PROGRESS = "progress.json"
# Names of what runs, and who looks at them, leave in a run's folder, at its top and anywhere.
_MADE = re.compile(rf"\d\d_.*|{EXECUTED}|{CACHE}")
_HIDDEN = re.compile(rf"\..*\.(lock|{TEMPORARY})|\.ipynb_checkpoints|\.DS_Store")
_KINDS = (".safetensors", ".npy", ".csv", ".json", ".jsonl", ".html", ".png", ".parquet")
_STEPS = (
    *(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")),
    *(SAMPLES, "07_published_checks", "08_seeds"),
)


def check_all_ready(preset: Preset, notebooks: Sequence[Path]) -> None:
    """Raise `InputError`, before anything is written, if a model or corpus of the run cannot be had."""
    check_ready(preset)
    first = FIRST_WITH_COMPANIONS
    if first not in preset.skipped and notebooks[-1].name >= first:
        for companion in Run(preset).companions:
            check_ready(companion.preset)


def earlier_runs(preset: Preset, own: bool, companions: bool) -> list[Path]:
    """Folders of earlier runs, to be deleted.

    Errors: `InputError` for a link, which leads out of runs_dir, and for what no run can make again.
    """
    others = [run.preset.folder for run in Run(preset).companions] if companions else []
    folders = [preset.folder, *others] if own else others
    for folder in folders:
        if folder.is_symlink():
            raise InputError(f"{folder} is a link: delete it, and what it leads to, yourself")
        if folder.is_dir():
            _check_made_by_runs(folder)
    return folders


def _check_made_by_runs(folder: Path) -> None:
    foreign = [
        path for path in sorted(folder.rglob("*")) if not _is_made(path.relative_to(folder), path)
    ]
    if foreign:
        raise InputError(
            f"{foreign[0]} was not made by a run and would be deleted with {folder}: move it away, "
            "or choose another runs_dir"
        )


def _is_made(inside: Path, path: Path) -> bool:
    """Whether a file or folder of a run's folder is what runs, and who looks at them, leave there."""
    top, hidden = inside.parts[0], any(_HIDDEN.fullmatch(part) for part in inside.parts)
    if path.is_dir():
        return len(inside.parts) > 1 or hidden or bool(_MADE.fullmatch(top))
    if not (path.is_file() or path.is_symlink()):
        return False  # a pipe, which would be read for ever
    if hidden or inside == Path(PROGRESS):
        return True
    if top == CACHE:
        return len(inside.parts) == 3 and path.suffix == ".npy"
    if top == EXECUTED:
        is_ours = (NOTEBOOKS / inside.name).is_file()
        return len(inside.parts) == 2 and (
            is_ours or FINGERPRINT in path.read_text("utf-8", "replace")
        )
    step = path.parents[len(inside.parts) - 2]
    return bool(re.match(r"\d\d_", top)) and len(inside.parts) > 1 and _is_steps(path, step)


def _is_steps(path: Path, step: Path) -> bool:
    """Whether a file is of those that the step's manifest names; of an unfinished step, of their kinds."""
    if path.name in (MANIFEST, LOG, CHECKPOINT):
        return True
    try:
        held = json.loads((step / MANIFEST).read_text(encoding="utf-8"))
        return path.relative_to(step).as_posix() in {**held["outputs"], **held.get("extras", {})}
    except (OSError, ValueError, LookupError, TypeError):
        is_known = step.name.startswith(_STEPS) and not path.name.startswith("ratings_")
        return is_known and path.suffix in _KINDS or path.name == "results.md"


def delete(folders: Iterable[Path]) -> None:
    """Delete runs, all of them at once or none. Errors: `InputError` if one is at work or stays."""
    there = [folder for folder in folders if folder.is_dir()]
    with ExitStack() as locks:
        for step in (path for folder in there for path in folder.iterdir() if path.is_dir()):
            for purpose in ("", MAKING):
                locks.enter_context(exclusive(step, purpose=purpose))
    aside = {folder: temporary_path(folder) for folder in there}
    try:
        for folder in there:
            os.replace(folder, aside[folder])
        for folder in there:
            shutil.rmtree(aside[folder])
    except OSError as error:
        for earlier in there[: there.index(folder)] if folder.exists() else ():
            os.replace(aside[earlier], earlier)
        raise InputError(
            f"{folder} could not be deleted ({error}): delete it yourself, or choose another runs_dir"
        ) from error


def stopped_at(preset: Preset) -> str | None:
    """The number of the notebook at which the last run stopped, if it did not come to its end."""
    try:
        held = json.loads((preset.folder / PROGRESS).read_text(encoding="utf-8"))
        return str(held["failed"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def execute_all(
    preset: Preset, notebooks: Sequence[Path], parameters: Mapping[str, Any], anew: bool
) -> None:
    """The notebooks in order; those whose executed copy is current stay, unless `anew`."""
    run = Run(preset)
    anew = anew or not are_intact(run)
    bar = progress(notebooks, f"preset {preset.name}", unit="notebook")
    for notebook in bar:
        bar.set_postfix_str(notebook.stem)
        if notebook.name[:2] in preset.skipped:
            bar.write(f"{notebook.stem} is skipped: {preset.skipped[notebook.name[:2]]}")
            continue
        output = preset.folder / EXECUTED / notebook.name
        made_from = fingerprint(run, notebook, parameters)
        if not anew and is_current(output, made_from):
            bar.write(f"{notebook.stem} is executed already")
            continue
        anew = True  # what stands behind a notebook reads what it makes
        try:
            execute(notebook, output, parameters, made_from)
        except BaseException as error:
            with new_file(preset.folder / PROGRESS) as path:
                path.write_text(json.dumps({"failed": notebook.name[:2]}))
            if isinstance(error, KeyboardInterrupt):
                bar.close()
                raise KeyboardInterrupt(
                    f"stopped in notebook {notebook.stem}: `{preset.command}` goes on from there"
                ) from error
            raise
    if (preset.folder / PROGRESS).exists():  # a finished run may lie where nothing can be written
        (preset.folder / PROGRESS).unlink()
