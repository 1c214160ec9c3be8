"""Text of Hugging Face data sets: from a folder, from the local cache, or streamed from the hub, in this order."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tclib.models.hub import cached_snapshot, check_hub_reachable, check_repository_id
from tclib.support.declared import shown
from tclib.support.errors import InputError, first_line
from tclib.support.paths import expanded

STREAM_SHUFFLE_BUFFER = 10_000
DATA_SUFFIXES = {".parquet", ".jsonl", ".json", ".txt", ".csv", ".arrow"}


def dataset_documents(
    source: str, seed: int, revision: str = "", data_files: Sequence[str] = ()
) -> Iterator[str]:
    """The `text` column of a data set's training split, streamed and shuffled.

    Errors: `InputError` for a data set that is nowhere to be had, cannot be read, or has no such column.
    """
    import datasets

    located = locate_dataset(source, revision, data_files)
    for file in dataset_files(source, revision, data_files):
        if file.suffix == ".parquet" and not file.stat().st_size:
            raise InputError(f"dataset {source!r}: {file} is empty: fetch it again")
    try:
        stream = datasets.load_dataset(**located, split="train", streaming=True)
        columns = stream.features or next(iter(stream), {"text": ""})
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"dataset {source!r} could not be read ({first_line(error)}): expected parquet, jsonl or text "
            "files; of a data set that is a script, the hub has parquet at revision refs/convert/parquet"
        ) from error
    if "text" not in columns:
        raise InputError(
            f"dataset {source!r} has columns {sorted(columns)}: expected one named text"
        )
    shuffled = stream.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_BUFFER)
    return _texts(source, shuffled)


def _texts(source: str, examples: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for text in (example["text"] for example in examples):
        if isinstance(text, str):
            yield text
        elif text is not None:
            raise InputError(f"dataset {source!r}: text {shown(text)}: expected strings")


def locate_dataset(
    source: str, revision: str = "", data_files: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments by which `datasets.load_dataset` finds a data set; nothing is fetched.

    Errors: `InputError` for a folder without data files, or a data set that is not cached where the hub
    cannot be reached.
    """
    path = expanded(source)
    if path.is_file():
        return _in_folder(path.parent, [path.name])
    if path.is_dir():
        if not _files(path, data_files):
            raise InputError(
                f"dataset {source}: no {' or '.join(data_files) or 'parquet, jsonl or text files'} there"
            )
        return _in_folder(path, _files(path, data_files) if data_files else [])
    check_repository_id(source, "dataset")
    snapshot = cached_snapshot(source, "dataset", revision or "main")
    if snapshot is not None and (found := _files(snapshot, data_files)):
        return _in_folder(snapshot, found if data_files else [])
    if prepared := _prepared(source):
        return {"path": "arrow", "data_files": {"train": prepared}}
    at = f" at revision {revision}" if revision else ""
    check_hub_reachable(f"dataset {source!r}{at} is not in the local Hugging Face cache")
    return {"path": source, "revision": revision or None, **_training(data_files)}


def dataset_files(source: str, revision: str = "", data_files: Sequence[str] = ()) -> list[Path]:
    """The files of a data set that lie on this machine; none of one that is streamed from the hub."""
    path = expanded(source)
    if path.is_file():
        return [path]
    folder = path if path.is_dir() else cached_snapshot(source, "dataset", revision or "main")
    if folder is not None and (found := _files(folder, data_files)):
        return [folder / name for name in found]
    return [] if path.is_dir() else [Path(name) for name in _prepared(source)]


def _in_folder(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    return {"path": str(folder.resolve()), **_training([glob.escape(name) for name in names])}


def _training(data_files: Sequence[str]) -> dict[str, Any]:
    """Where files are named, all are of the training split; else `datasets` finds the split's by name."""
    return {"data_files": {"train": list(data_files)}} if data_files else {}


def _files(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of the data files in `folder` that match, those of a cached snapshot (links) too."""
    found = (path for pattern in patterns or ["**/*"] for path in folder.glob(pattern))
    are_data = {p for p in found if DATA_SUFFIXES & set(p.suffixes) and p.is_file()}
    return sorted(str(path.relative_to(folder)) for path in are_data)


def _prepared(source: str) -> list[str]:
    """The training split's files of the newest build that `load_dataset` has left in its own cache."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *namespace, name = source.split("/")
    folder = Path(config.HF_DATASETS_CACHE, "___".join([*namespace, camelcase_to_snakecase(name)]))
    builds = [info.parent for info in folder.glob("*/*/*/dataset_info.json")]
    for build in sorted(builds, key=lambda path: path.stat().st_mtime, reverse=True):
        if files := sorted(map(str, build.glob("*-train*.arrow"))):
            return files
    return []
