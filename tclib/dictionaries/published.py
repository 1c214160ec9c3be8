"""Released sets of transcoders by name: where they lie, what they are, and loading them a layer at a time.

The table is in `released_sets`. Files are taken from the local Hugging Face cache, from a folder that holds them under the
names of their repository, or from the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.authors import read_authors, read_authors_tensor
from tclib.dictionaries.formats.circuit_tracer import read_circuit_tracer
from tclib.dictionaries.formats.gemma_scope import read_gemma_scope
from tclib.dictionaries.formats.llama_scope import read_llama_scope
from tclib.dictionaries.formats.sparsify import read_sparsify
from tclib.dictionaries.released_sets import GPT2_FREQUENCIES, SETS, ReleasedSet, released_set
from tclib.models.hub import cached_snapshot, check_hub_reachable, download
from tclib.models.identity import names_differ
from tclib.support.checked import checked
from tclib.support.declared import Natural
from tclib.support.errors import InputError
from tclib.support.paths import expanded

NEVER_FIRED = -9.5  # at or below: the files hold log10(frequency + 1e-10)
Reader = Callable[[Path, int, bool, int | None], Dictionary]


def _read_set_layer(folder: Path, layer: int, lazy: bool, k: int | None) -> Dictionary:
    return read_circuit_tracer(folder, [layer], lazy, k)[layer]


# What is read: the file's folder (the file itself of the authors).
READERS: dict[str, Reader] = {
    "authors": lambda path, _layer, _lazy, _k: read_authors(path),
    "gemma-scope": lambda path, _layer, lazy, _k: read_gemma_scope(path, lazy),
    "circuit-tracer": lambda path, layer, lazy, k: _read_set_layer(path.parent, layer, lazy, k),
    "sparsify": lambda path, _layer, lazy, _k: read_sparsify(path.parent, lazy),
    "llama-scope": lambda path, _layer, _lazy, _k: read_llama_scope(path.parents[1]),
}


@checked
def load_published(
    name: str = "gpt2",
    layers: Iterable[Natural] | None = None,
    folder: Path | None = None,
    variant: str | None = None,
    lazy: bool = False,
) -> dict[int, Dictionary]:
    """Transcoders of a released set by layer; only the files of these layers are touched.

    Args:
        name: of the set (`tclib published` lists them).
        layers: which; all by default.
        folder: with the set's files under the names of its repository; by default the hub or its cache.
        variant: of several (Gemma Scope 2: "width_262k_l0_small_affine"); the first by default.
        lazy: encoders and decoders stay in their files, and rows are read where features are active.

    Errors: `InputError` naming the file that is missing and how to get it; nothing is half loaded.
    """
    one = released_set(name)
    source = "hub" if folder is None else str(folder)
    paths = locate_published(source, layers, name, variant)
    found = {layer: READERS[one.format](path, layer, lazy, one.k) for layer, path in paths.items()}
    return {layer: _as_released(one, layer, paths[layer], d) for layer, d in found.items()}


def _as_released(one: ReleasedSet, layer: int, path: Path, found: Dictionary) -> Dictionary:
    """The dictionary with its model's name. Errors: `InputError` if the file is not what the table says."""
    config = found.config
    if config.layer != layer:
        raise InputError(f"{path} holds layer {config.layer}, its name says {layer}")
    is_named = config.model and one.format != "authors"  # whose names are of TransformerLens
    if is_named and names_differ(config.model, one.model):
        raise InputError(f"{path} is of {config.model}, and {one.name} is of {one.model}")
    if config.model or one.format == "authors":
        return found
    return found.renamed(replace(config, model=one.model))


def locate_published(
    source: str,
    layers: Iterable[int] | None = None,
    name: str = "gpt2",
    variant: str | None = None,
) -> dict[int, Path]:
    """The files of a released set by layer; `source` is "hub" (or its cache) or a folder.

    Errors: `InputError` naming the file that is missing and how to get it, or the unreachable hub.
    """
    one = released_set(name)
    chosen = one.variants[0] if variant is None else variant
    if chosen not in one.variants:
        raise InputError(f"variant {chosen!r}: {one.name} has {', '.join(one.variants) or 'none'}")
    wanted = list(range(one.n_layers) if layers is None else layers)
    if not wanted or max(wanted) >= one.n_layers:
        raise InputError(
            f"layers {wanted}: expected at least one, of 0 to {one.n_layers - 1}, which were released"
        )
    folder = cached_snapshot(one.repository) if source == "hub" else expanded(source)
    names = {layer: one.names(layer, chosen, (one.file, *one.besides)) for layer in wanted}
    missing = [file for files in names.values() for file in _missing(folder, files)]
    if missing and source == "hub":
        return _from_hub(one, chosen, names, missing[0])
    if missing:
        raise InputError(
            f"{folder}/{missing[0]} is missing: download {missing[0]} of {one.repository} into {folder}"
        )
    assert folder is not None
    return {layer: folder / files[0] for layer, files in names.items()}


def _missing(folder: Path | None, files: Iterable[str]) -> list[str]:
    """Those files that a folder lacks; all of them without a folder."""
    return [file for file in files if folder is None or not (folder / file).is_file()]


def _from_hub(
    one: ReleasedSet, variant: str, names: dict[int, list[str]], missing: str
) -> dict[int, Path]:
    check_hub_reachable(
        f"the released transcoders lie at {one.repository} on the hub, of which {missing} is not in the "
        "local Hugging Face cache"
    )
    for layer in names:
        for file in one.names(layer, variant, one.optional):
            download(one.repository, file)
    found = {
        layer: [download(one.repository, file) for file in files] for layer, files in names.items()
    }
    return {layer: paths[0] for layer, paths in found.items()}


def published_table() -> pd.DataFrame:
    """A line a released set: name, model, layers, features, activation, reads, L0, GB, licence, cached, repository.

    `cached` counts the layers of the default variant whose files lie in the local Hugging Face cache.
    """
    return pd.DataFrame([_line(one) for one in SETS.values()])


def _line(one: ReleasedSet) -> dict[str, Any]:
    snapshot = cached_snapshot(one.repository)
    files = (
        one.names(layer, one.variants[0], (one.file, *one.besides)) for layer in range(one.n_layers)
    )
    n_cached = sum(not _missing(snapshot, of_layer) for of_layer in files)
    return {
        "name": one.name,
        "model": one.model,
        "layers": one.n_layers,
        "features": one.n_features or "in its files",
        "activation": one.activation,
        "reads": one.reads,
        "GB": one.gigabytes or "not known",
        "licence": one.licence,
        "cached": f"{n_cached} of {one.n_layers}",
        "repository": one.repository,
    }


def load_frequencies(source: str, dictionary: Dictionary) -> Float[Tensor, "n_features"] | None:
    """The log10 firing frequencies that were released beside a transcoder of GPT-2; None without the file.

    They are of the last 1000 training steps, and are fetched with the transcoders. Errors: `InputError` for a file that holds anything else.
    """
    folder = cached_snapshot(SETS["gpt2"].repository) if source == "hub" else expanded(source)
    path = (folder or Path()) / GPT2_FREQUENCIES.format(layer=dictionary.config.layer)
    if folder is None or not path.is_file():
        return None
    found = read_authors_tensor(path)
    if found.shape != (dictionary.config.n_features,):
        raise InputError(
            f"{path} holds {tuple(found.shape)} values: expected one for each of the "
            f"{dictionary.config.n_features} features"
        )
    return found
