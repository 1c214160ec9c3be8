"""Gemma Scope's transcoders: params.npz (Gemma 2) and params.safetensors (Gemma 3), a folder a layer and width.

    Gemma Scope      layer_12/width_16k/average_l0_6/params.npz: W_enc [d, F], W_dec [F, d], b_enc, b_dec, threshold;
                     reads the norm's output without its gain
    Gemma Scope 2    transcoder_all/layer_12_width_16k_l0_small[_affine]/params.safetensors: the same with w_enc and
                     w_dec, and affine_skip_connection [d_in, d_out]; reads the norm's output with its gain

Both are JumpReLU, and put out what the norm behind the MLP gives. No file names its model, and the layer stands in the
folder's name alone.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tclib.dictionaries.dictionary import Basis, Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import Tensors, read_tensors
from tclib.support.errors import InputError, listed
from tclib.support.paths import check_file

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
LAYER = re.compile(r"layer_(\d{1,4})(_.*)?")
SCOPE_2 = Tensors({"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"})
MAX_INFLATED = 50  # times the file: weights hardly shrink
KNOWN = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def read_gemma_scope(path: Path) -> Dictionary:
    """A transcoder of Gemma Scope or Gemma Scope 2, by its file or the folder of that.

    Errors: `InputError` for a file that is missing or damaged, without its threshold, transposed, or in a folder whose
    name has no layer.
    """
    found = [path / name for name in (NPZ, SAFETENSORS) if (path / name).is_file()]
    file = found[0] if found else path
    layer = _layer_of(file)
    if file.suffix == ".npz":
        return _assembled(file, layer, _read_npz(file), Tensors(), "processed")
    return _assembled(file, layer, read_tensors(file), SCOPE_2, "raw")


def _layer_of(file: Path) -> int:
    for folder in file.absolute().parents:
        if named := LAYER.fullmatch(folder.name):
            return int(named[1])
    raise InputError(
        f"{file}: no folder above it is called layer_12 or layer_12_width_…, and the file itself does not say its "
        "layer: keep the folders that it was released in"
    )


def _assembled(
    file: Path, layer: int, tensors: Mapping[str, Tensor], names: Tensors, basis: Basis
) -> Dictionary:
    encoder = tensors.get(names.names.get("W_enc", "W_enc"))
    if encoder is None or encoder.ndim != 2:
        raise InputError(f"{file}: no matrix of an encoder in it, only {listed(tensors)}")
    d_in, n_features = encoder.shape
    skip = names.names.get("W_skip", "W_skip") in tensors
    config = DictionaryConfig(
        "transcoder", layer, d_in, d_in, n_features, "jumprelu", None, skip, "", basis
    )
    weights = names.ours(file, tensors, config)
    # A relu stands before the jump there, so that a threshold below 0 does what 0 does.
    weights["threshold"] = weights["threshold"].clamp_min(0.0)
    return Dictionary(config, **weights)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz, none of which is a pickle. Errors: `InputError` for anything else."""
    check_file(path, "expected the weights there")
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(member.file_size for member in archive.infolist())
        if inflated > MAX_INFLATED * max(path.stat().st_size, 1):
            raise InputError(f"{path} inflates to {inflated:,} bytes: it holds no weights")
        with np.load(path, allow_pickle=False) as held:
            extra = sorted(set(held.files) - set(KNOWN))
            if extra:
                raise InputError(f"{path}: arrays not expected [{listed(extra)}]")
            return {name: torch.from_numpy(held[name]) for name in held.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error
