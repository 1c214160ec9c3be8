"""Files and folders: whole or not at all, hashed, locked."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tclib.support.errors import InputError
from tclib.support.foreign import check_header, parse_json
from tclib.support.paths import check_file, check_folder
from tclib.support.progress import progress

HEADER_KEY = "tclib"
TEMPORARY = "tclib-tmp"  # the end of names that `sweep` may remove: no date or version of a user's
MAX_NAME = 100  # characters: a file's name, with what we add to it, may have 255 bytes


def check_name(what: str, name: str, besides: str) -> None:
    """Raise `InputError` unless `name` can be a file's: letters and digits, and `besides` after the first."""
    is_known = all(letter.isalnum() or letter in besides for letter in name)
    if not is_known or not name[:1].isalnum() or len(name) > MAX_NAME:
        signs = ", ".join({" ": "spaces"}.get(sign, sign) for sign in besides)
        raise InputError(
            f"{what} {name!r}: expected letters, digits, {signs}, a letter or digit first, {MAX_NAME} at most"
        )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Errors: `InputError` when the disk is full or the folder cannot be written; what `path` held
    before is left as it was.
    """
    check_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected a file")
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(_leftovers(path))
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{unwritten(path, error)}; what was there before is kept") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` on success, vanishes on failure."""
    check_folder(path)
    temporary = temporary_path(path)
    replaced = temporary.with_name(f".{path.name}.old.{os.getpid()}.{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(_leftovers(path))
        temporary.mkdir()
        yield temporary
        for written in temporary.rglob("*"):
            _to_disk(written)
        if path.exists():
            os.replace(path, replaced)
        try:
            os.replace(temporary, path)
        except OSError:
            os.replace(replaced, path)
            raise
        _to_disk(path.parent)
    except OSError as error:
        raise InputError(unwritten(path, error)) from error
    finally:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def temporary_path(path: Path) -> Path:
    """Where this process writes what is to become `path`; `sweep` knows it once the process is dead."""
    return path.with_name(f".{path.name}.{os.getpid()}.{TEMPORARY}")


def unwritten(path: Path, error: Exception) -> str:
    """The sentence for a file that could not be written."""
    in_words = re.search(r"os error (\d+)", str(error))  # safetensors, which has no errno
    number = int(in_words[1]) if in_words else getattr(error, "errno", errno.ENOSPC)
    is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some disk space" if is_full else "choose a place that can be written"
    return f"{path} could not be written ({error}): {remedy} and run it again"


def _to_disk(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk: a power cut could else lose them."""
    if path.is_file():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    elif os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(folder: Path) -> None:
    """Remove what `new_file` and `new_folder` of processes that were killed left below `folder`."""
    _remove_dead(folder.rglob(f".*.{TEMPORARY}"))


def _leftovers(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.*.{TEMPORARY}")


def _remove_dead(temporaries: Iterable[Path]) -> None:
    for leftover in temporaries:
        pid = leftover.name.split(".")[-2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            with suppress(OSError):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return True


@contextmanager
def exclusive(folder: Path, is_patient: bool = False, purpose: str = "") -> Iterator[None]:
    """Hold `folder` for one run; a second run at the same time waits, or gets an `InputError`.

    Holders for different purposes do not wait for each other.
    Temporary files that killed runs have left in it are removed. Where nothing can be written, no run can
    be at work, and a finished one can be read: there is no lock then. Errors: `InputError` for a file in
    the folder's place.
    """
    check_folder(folder)
    lock = FileLock(folder.with_name(f".{folder.name}{purpose and '.' + purpose}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, folder, is_patient)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(unwritten(folder, error)) from error
    try:
        if lock.is_locked:
            _remove_dead(_leftovers(folder))
            sweep(folder)
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path, is_patient: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not is_patient:
            raise InputError(
                f"another run is working in {folder}: wait for it to end, or choose another runs_dir"
            ) from error
        waiting = f"waiting for another run in {folder}"
        with progress(None, waiting, bar_format="{desc} {elapsed}", leave=False):
            lock.acquire()


def copy_folder(source: Path, target: Path) -> tuple[list[Path], list[Path]]:
    """Copy every file of `source` that `target` lacks: (files written, equal files left alone).

    Errors: `InputError` naming the files of `target` that differ; nothing is written then.
    """
    check_folder(target)
    wanted = {
        path: target / path.relative_to(source)
        for path in sorted(source.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(source).parts)
    }
    there = {path: copy for path, copy in wanted.items() if copy.exists()}
    changed = [
        copy
        for path, copy in there.items()
        if not copy.is_file() or file_hash(path) != file_hash(copy)
    ]
    if changed:
        raise InputError(
            f"{', '.join(map(str, changed))} would be overwritten: "
            "choose another folder, or move what is there"
        )
    missing = {path: copy for path, copy in wanted.items() if path not in there}
    for path, copy in missing.items():
        with new_file(copy) as temporary:
            shutil.copyfile(path, temporary)
    return list(missing.values()), list(there.values())


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
    try:
        header = json.dumps(
            {"metadata": dict(metadata), "sha256": tensors_hash(whole)}, sort_keys=True
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: expected metadata that JSON can hold ({error})") from error
    with new_file(path) as temporary:
        # One key: safetensors writes several in no fixed order, and equal runs must give equal bytes.
        save_file(whole, temporary, metadata={HEADER_KEY: header})


def load_tensors(
    path: Path, remedy: str, is_checked: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors, metadata).

    A file whose bytes have just been held against a manifest `is_checked`: it is not hashed again.
    Errors: `InputError` naming the file and `remedy` if it is missing, truncated or altered.
    """
    check_file(path, remedy)
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get(HEADER_KEY, "{}"), path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or corrupted ({error}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is not JSON ({error}): {remedy}") from error
    metadata = header.get("metadata") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or "sha256" not in header:
        raise InputError(f"{path} was not written by tclib (no checksum in its header): {remedy}")
    if not is_checked and tensors_hash(tensors) != header["sha256"]:
        raise InputError(f"{path} is corrupted (its checksum does not match): {remedy}")
    return tensors, metadata


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_ready(value: Any) -> Any:
    """`value` as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))
