"""The paper's released GPT-2 transcoders: loading them, and checking activations that its notebooks print.

They lie on the hub as `pchlenski/gpt2-transcoders`, one .pt a layer; a local folder with the same files does as
well. Activations at a prompt are taken in the model as it is, or with the MLPs of lower layers replaced by their
transcoders.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.authors import read_authors
from tclib.models.locate import check_hub_reachable
from tclib.support.errors import InputError

REPOSITORY_ID = "pchlenski/gpt2-transcoders"
FILE_NAME = "final_sparse_autoencoder_gpt2-small_blocks.{layer}.ln2.hook_normalized_24576.pt"


def load_published(
    layers: Iterable[int] = range(12), folder: Path | None = None
) -> dict[int, Dictionary]:
    """The released transcoders by layer, from a folder, or else from the hub or its cache.

    Errors: `InputError` naming the file that is missing and how to get it; nothing is half loaded.
    """
    paths = locate_published("hub" if folder is None else str(folder), layers)
    found = {}
    for layer, path in paths.items():
        one = read_authors(path)
        if one.config.layer != layer:
            raise InputError(f"{path} holds layer {one.config.layer}, its name says {layer}")
        found[layer] = one
    return found


def locate_published(source: str, layers: Iterable[int] = range(12)) -> dict[int, Path]:
    """The files of the released transcoders by layer; `source` is "hub" (or its cache) or a folder.

    Errors: `InputError` naming the file that is missing and how to get it, or the unreachable hub.
    """
    found = {}
    for layer in layers:
        name = FILE_NAME.format(layer=layer)
        path = _from_hub(name) if source == "hub" else Path(source).expanduser() / name
        if not path.is_file():
            raise InputError(
                f"{path} is missing: download {name} of {REPOSITORY_ID} into {path.parent}"
            )
        found[layer] = path
    return found


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(REPOSITORY_ID, name)
    if isinstance(cached, str):
        return Path(cached)
    check_hub_reachable(f"the released transcoders lie at {REPOSITORY_ID} on the hub")
    return Path(hf_hub_download(REPOSITORY_ID, name))
