"""The paper's released GPT-2 transcoders: loading them, and checking activations that its notebooks print.

They lie on the hub as `pchlenski/gpt2-transcoders`, one .pt a layer; a local folder with the same files does as
well. Activations at a prompt are taken in the model as it is, or with the MLPs of lower layers replaced by their
transcoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.authors import read_authors, read_authors_tensor
from tclib.models.hub import cached_snapshot, check_hub_reachable
from tclib.models.locate import first_line
from tclib.support.checked import checked
from tclib.support.declared import Natural
from tclib.support.errors import InputError
from tclib.support.paths import expanded

REPOSITORY_ID = "pchlenski/gpt2-transcoders"
FILE_NAME = "final_sparse_autoencoder_gpt2-small_blocks.{layer}.ln2.hook_normalized_24576.pt"
FREQUENCIES_NAME = FILE_NAME.replace(".pt", "_log_feature_sparsity.pt")
N_LAYERS = 12  # of GPT-2
NEVER_FIRED = -9.5  # at or below: the files hold log10(frequency + 1e-10)


@checked
def load_published(
    layers: Iterable[Natural] = range(N_LAYERS), folder: Path | None = None
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


def locate_published(source: str, layers: Iterable[int] = range(N_LAYERS)) -> dict[int, Path]:
    """The files of the released transcoders by layer; `source` is "hub" (or its cache) or a folder.

    Errors: `InputError` naming the file that is missing and how to get it, or the unreachable hub.
    """
    wanted = list(layers)
    if not wanted or max(wanted) >= N_LAYERS:
        raise InputError(
            f"layers {wanted}: expected at least one, of 0 to {N_LAYERS - 1}, which were released"
        )
    names = {layer: FILE_NAME.format(layer=layer) for layer in wanted}
    cached = cached_snapshot(REPOSITORY_ID)
    folder = cached if source == "hub" else expanded(source)
    found = {} if folder is None else {layer: folder / name for layer, name in names.items()}
    missing = [names[n] for n in names if n not in found or not found[n].is_file()]
    if missing and source == "hub":
        return _from_hub(names, missing[0])
    if missing:
        raise InputError(
            f"{folder}/{missing[0]} is missing: download {missing[0]} of {REPOSITORY_ID} into {folder}"
        )
    return found


def _from_hub(names: Mapping[int, str], missing: str) -> dict[int, Path]:
    from huggingface_hub import hf_hub_download

    check_hub_reachable(
        f"the released transcoders lie at {REPOSITORY_ID} on the hub, of which {missing} is not in the "
        "local Hugging Face cache"
    )
    try:
        for layer in names:
            hf_hub_download(REPOSITORY_ID, FREQUENCIES_NAME.format(layer=layer))
        return {n: Path(hf_hub_download(REPOSITORY_ID, name)) for n, name in names.items()}
    except OSError as error:
        raise InputError(
            f"the download of {REPOSITORY_ID} stopped ({first_line(error)}): run the same command again, "
            "and it goes on with what is missing"
        ) from error


def load_frequencies(source: str, dictionary: Dictionary) -> Float[Tensor, "n_features"] | None:
    """The log10 firing frequencies that were released beside a transcoder; None without the file.

    They are of the last 1000 training steps, and are fetched with the transcoders. Errors: `InputError` for a file that holds anything else.
    """
    folder = cached_snapshot(REPOSITORY_ID) if source == "hub" else expanded(source)
    path = (folder or Path()) / FREQUENCIES_NAME.format(layer=dictionary.config.layer)
    if folder is None or not path.is_file():
        return None
    found = read_authors_tensor(path)
    if found.shape != (dictionary.config.n_features,):
        raise InputError(
            f"{path} holds {tuple(found.shape)} values: expected one for each of the "
            f"{dictionary.config.n_features} features"
        )
    return found
