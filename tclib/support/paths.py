"""What is said of a path before anything is read from it or written to it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from tclib.support.errors import InputError

MAX_NAME = 255  # bytes, of the usual file systems


def expanded(path: str | Path) -> Path:
    """`path`, with ~ written out.

    Errors: `InputError` for what no file system takes: parts of more than 255 bytes, NUL, half a
    surrogate pair, the home of somebody who is not there.
    """
    reason = ""
    try:
        found = Path(path).expanduser()
        if max(map(len, map(os.fsencode, found.parts)), default=0) > MAX_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.lstat(found)  # which goes no further than what is there
    except OSError as error:
        reason = str(error.strerror) if error.errno == errno.ENAMETOOLONG else ""
    except (ValueError, RuntimeError) as error:
        reason = str(error)
    if reason:
        raise InputError(f"{str(path)[:60]!r}: no possible path ({reason}); give another")
    return found


def check_file(path: Path, remedy: str) -> None:
    """Raise `InputError` unless `path` is a plain file: a pipe or a device would be read for ever."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: expected a file; {remedy}")
    if not path.is_file():
        what = "is a pipe or a device: expected a file;" if path.exists() else "does not exist:"
        raise InputError(f"{path} {what} {remedy}")


def check_folder(path: Path) -> None:
    """Raise `InputError` unless `path` is a folder or can become one: neither it nor what is above it is a file."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file: expected a folder; choose another place, or move it")


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds. Errors: `InputError` naming the file, what is wrong with it, and `remedy`."""
    check_file(path, remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is truncated or corrupted ({error}): {remedy}") from error
