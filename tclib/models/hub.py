"""The local cache of the Hugging Face hub, which is looked at first, and whether the hub can be reached."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from tclib.support.errors import InputError, first_line


def cached_snapshot(
    repository_id: str, kind: Literal["model", "dataset"] = "model", revision: str = "main"
) -> Path | None:
    """The folder of the cache (HF_HOME) with a repository's files at a revision; it may lack some of them.

    The hub is not asked. `snapshot_download` would refuse a repository of which only what is needed was
    fetched, as `hf download --include` does.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository_id, repo_type=kind)
    repository = Path(constants.HF_HUB_CACHE) / folder
    ref = repository / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def cached_model(repository_id: str) -> Path | None:
    """The cached snapshot of a model, if it has a configuration, all weights and a tokenizer."""
    folder = cached_snapshot(repository_id)
    if folder is None or not (folder / "config.json").is_file():
        return None
    has_tokenizer = any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )
    return folder if has_tokenizer and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return True
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return all((folder / shard).is_file() for shard in set(shards))
    return False


def check_repository_id(name: str, kind: str) -> None:
    """Raise `InputError` for what is neither a folder that is there nor a possible id of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name.startswith((".", "/", "~")):
        raise InputError(f"{kind} folder {name}: no such folder")
    try:
        try_to_load_from_cache(name, "config.json")  # which checks the id first
    except HFValidationError as error:
        raise InputError(f"{kind} {name!r}: neither a folder nor a valid hub id") from error


def check_hub_reachable(context: str) -> None:
    """Raise `InputError` beginning with `context` unless the Hugging Face hub answers in 5 s."""
    from huggingface_hub import constants, get_session

    advice = "connect to the network, or set HF_HOME to a folder that holds it"
    if constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise InputError(f"{context}, and HF_HUB_OFFLINE is set: {advice}")
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:
        raise InputError(
            f"{context}, and {constants.ENDPOINT} cannot be reached: {advice}"
        ) from error


def hub_file(repository_id: str, file: str, revision: str = "main") -> Path:
    """A file of a repository: from the local cache, or else from the hub.

    Errors: `InputError` naming it if the hub cannot be reached, or the download stops.
    """
    snapshot = cached_snapshot(repository_id, revision=revision)
    if snapshot is not None and (snapshot / file).is_file():
        return snapshot / file
    check_hub_reachable(f"{file} of {repository_id} is not in the local Hugging Face cache")
    return download(repository_id, file, revision)


def download(repository_id: str, file: str, revision: str = "main") -> Path:
    """A file of the hub. Errors: `InputError` in one sentence."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository_id, file, revision=revision))
    except Exception as error:  # of its http library, of the disk
        raise InputError(
            f"the download of {repository_id} stopped ({first_line(error)}): run the same command again, "
            "and it goes on with what is missing"
        ) from error
