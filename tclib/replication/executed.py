"""Notebooks of a run, executed: a copy is current as long as all that it came from is what it was.

That is its cells and parameters, the preset, its text, the model's weights (and the companions'), tclib's own
files, the packages that decide the numbers, and every file that the run's manifests name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import tclib
from tclib.replication.run import Run
from tclib.support.errors import InputError
from tclib.support.files import new_file, temporary_path, unwritten
from tclib.support.paths import read_json
from tclib.support.progress import is_quiet
from tclib.support.steps import MANIFEST, is_whole, package_versions

FIRST_WITH_COMPANIONS = "02"  # a notebook's number
FINGERPRINT = "tclib_fingerprint"  # in the executed copy's metadata, as the two below
CONTENT = "tclib_content"
STEPS = "tclib_steps"


def fingerprint(run: Run, notebook: Path, parameters: Mapping[str, Any]) -> str:
    """Names what an executed copy comes from, but for the run's artifacts."""
    digest = hashlib.sha256(_own_files())
    cells = [cell["source"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    runs = [run, *(run.companions if notebook.name >= FIRST_WITH_COMPANIONS else ())]
    identities = [(asdict(one.preset), one.model_hash, one.sources) for one in runs]
    held = [cells, dict(parameters), identities, package_versions()]
    digest.update(json.dumps(held, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@cache
def _own_files() -> bytes:
    """The hash of tclib's own files, which one process reads once."""
    digest = hashlib.sha256()
    for path in sorted(Path(tclib.__file__).parent.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".json", ".mplstyle"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def is_current(output: Path, expected: str) -> bool:
    """Whether `output` was executed from what `expected` names, is as it was then, and has its steps beside it."""
    if not output.is_file():
        return False
    try:
        held = read_json(output, "")
        noted = held["metadata"]
        return (
            noted[FINGERPRINT] == expected
            and noted[CONTENT] == _content(held)
            and set(noted[STEPS]) <= set(_finished_steps(output))
        )
    except (InputError, LookupError, TypeError):
        return False


def _content(notebook: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(notebook["cells"], sort_keys=True).encode()).hexdigest()


def _finished_steps(output: Path) -> list[str]:
    """The steps of the run to which an executed copy belongs that have their manifest."""
    return sorted(path.parent.name for path in output.parents[1].glob(f"*/{MANIFEST}"))


def are_intact(run: Run) -> bool:
    """Whether every artifact of the run and its companions is as its manifest says."""
    folders = [one.preset.folder for one in (run, *run.companions)]
    return all(is_whole(path.parent) for folder in folders for path in folder.glob(f"*/{MANIFEST}"))


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any], made_from: str) -> None:
    """Run one notebook through papermill. Errors: `InputError` with the failing cell's message."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    # A copy that a kill cut short must not be taken for one that was executed.
    partial = temporary_path(output.with_suffix("")) / output.name
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        executed = papermill.execute_notebook(
            str(notebook),
            str(partial),
            parameters,
            cwd=str(output.parent),
            kernel_name="python3",
            progress_bar=not is_quiet(),
            shutdown_kernel="immediate",  # what it writes is whole or absent, so that it need not be asked
            config=_kernel_config(),
        )
        executed.metadata[FINGERPRINT] = made_from
        executed.metadata[CONTENT] = _content(executed)
        executed.metadata[STEPS] = _finished_steps(output)
        with new_file(output) as temporary:
            temporary.write_text(
                json.dumps(executed, indent=1, ensure_ascii=False), encoding="utf-8"
            )
    except PapermillExecutionError as error:
        with new_file(output) as temporary:
            shutil.copyfile(partial, temporary)
        raise InputError(
            f"{notebook.name} stopped: {error.ename}: {error.evalue} (see {output}); "
            "run the same command again to go on from there"
        ) from error
    except DeadKernelError as error:
        raise InputError(
            f"{notebook.name} stopped: its kernel died, for want of memory perhaps; "
            "run the same command again to go on from there"
        ) from error
    except OSError as error:  # papermill writes after each cell
        raise InputError(unwritten(output, error)) from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _kernel_config() -> Any:
    """Encrypt what goes between here and a kernel, where that can be had: a kernel warns of plain TCP."""
    import zmq
    from jupyter_client.manager import KernelManager
    from traitlets.config import Config

    name = "transport_encryption"
    has_it = zmq.has("curve") and name in KernelManager.class_trait_names()
    return Config(KernelManager={name: "auto"} if has_it else {})
