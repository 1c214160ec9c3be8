"""eai-sparsify: a folder a hookpoint, with cfg.json and sae.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import (
    HASH,
    Tensors,
    check_exportable,
    check_same,
    entry,
    read_config,
    read_tensors,
)
from tclib.support.errors import InputError
from tclib.support.files import new_folder

TENSORS = Tensors(
    {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}, frozenset({"W_enc", "W_skip"})
)


def read_sparsify(folder: Path, lazy: bool = False) -> Dictionary:
    """A sparsify transcoder of one hookpoint (h.8.mlp, layers.8.mlp): raw basis, ReLU before top-k.

    Errors: `InputError` for an autoencoder, group-max, or tensors that do not fit.
    """
    config = read_config(folder / "cfg.json")
    skip = entry(config, "skip_connection", bool, folder, False)
    # Before it said so, only transcoders had a skip.
    if not entry(config, "transcode", bool, folder, skip):
        raise InputError(f"{folder}: transcode is false, an autoencoder; expected a transcoder")
    same = {"activation": "topk", "signed": False, "normalize": None, "hookpoint": folder.name}
    check_same(config, same, folder)
    parts = folder.name.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    if parts[-1] != "mlp" or len(numbers) != 1:
        raise InputError(f"{folder}: hookpoint {folder.name!r}; expected one like h.8.mlp")
    d_in, k = (entry(config, name, int, folder) for name in ("d_in", "k"))
    n_features = entry(config, "num_latents", int, folder, 0)
    n_features = n_features or d_in * entry(config, "expansion_factor", int, folder)
    tensors = read_tensors(folder / "sae.safetensors")
    layer = int(numbers[0])
    own = DictionaryConfig(
        *("transcoder", layer, d_in, d_in, n_features, "topk", k, skip),
        basis="raw",
        model_hash=entry(config, HASH, str, folder, ""),
    )
    return TENSORS.dictionary(folder, tensors, own, lazy)


def write_sparsify(dictionary: Dictionary, folder: Path) -> None:
    """A sparsify folder of a raw-basis top-k transcoder. Errors: `InputError` for any other."""
    check_exportable(dictionary, "sparsify", ("topk",))
    config = dictionary.config
    if config.basis != "raw":
        raise InputError("sparsify reads the MLP's raw input: convert with to_raw first")
    document = {
        "activation": "topk",
        "expansion_factor": max(1, config.n_features // config.d_in),
        "normalize_decoder": True,
        "num_latents": config.n_features,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": True,
        "d_in": config.d_in,
        HASH: config.model_hash,
    }
    with new_folder(folder) as temporary:
        TENSORS.save(dictionary, temporary / "sae.safetensors")
        (temporary / "cfg.json").write_text(json.dumps(document, indent=2))
