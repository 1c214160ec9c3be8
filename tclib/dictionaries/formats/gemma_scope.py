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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tclib.dictionaries.dictionary import Basis, Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import MATRICES, Tensors, read_tensors
from tclib.support.errors import InputError, listed
from tclib.support.paths import check_file

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
LAYER = re.compile(r"layer_(\d{1,4})(_.*)?")
SCOPE_1 = Tensors(relu_first=True)
SCOPE_2 = Tensors(
    {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}, relu_first=True
)
MAX_INFLATED = 50  # times the file: weights hardly shrink
KNOWN = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def read_gemma_scope(path: Path, lazy: bool = False) -> Dictionary:
    """A transcoder of Gemma Scope or Gemma Scope 2, by its file or the folder of that.

    Errors: `InputError` for a file that is missing or damaged, without its threshold, transposed, or in a folder whose
    name has no layer.
    """
    found = [path / name for name in (NPZ, SAFETENSORS) if (path / name).is_file()]
    file = found[0] if found else path
    layer = _layer_of(file)
    if file.suffix == ".npz":
        return _assembled(file, layer, _read_npz(file, lazy), SCOPE_1, "processed", lazy)
    return _assembled(file, layer, read_tensors(file), SCOPE_2, "raw", lazy)


def _layer_of(file: Path) -> int:
    for folder in file.absolute().parents:
        if named := LAYER.fullmatch(folder.name):
            return int(named[1])
    raise InputError(
        f"{file}: no folder above it is called layer_12 or layer_12_width_…, and the file itself does not say its "
        "layer: keep the folders that it was released in"
    )


def _assembled(
    file: Path,
    layer: int,
    tensors: Mapping[str, Tensor],
    names: Tensors,
    basis: Basis,
    lazy: bool,
) -> Dictionary:
    encoder = tensors.get(names.names.get("W_enc", "W_enc"))
    if encoder is None or encoder.ndim != 2:
        raise InputError(f"{file}: no matrix of an encoder in it, only {listed(tensors)}")
    d_in, n_features = encoder.shape
    skip = names.names.get("W_skip", "W_skip") in tensors
    config = DictionaryConfig(
        "transcoder", layer, d_in, d_in, n_features, "jumprelu", None, skip, "", basis
    )
    return names.dictionary(file, tensors, config, lazy)


def _read_npz(path: Path, lazy: bool) -> dict[str, Tensor]:
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
            return {
                name: _mapped(path, name)
                if lazy and name in MATRICES
                else torch.from_numpy(held[name])
                for name in held.files
            }
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is truncated or damaged ({error}): download it again") from error


def _mapped(path: Path, name: str) -> Tensor:
    """An array that stays in its .npz, which must not be compressed: numpy's `savez` does not."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{path}: {name} is compressed, and cannot be read row by row: load it without lazy"
            )
        with archive.open(member) as opened:
            version = np.lib.format.read_magic(opened)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran, dtype = header(opened)
            n_header = opened.tell()
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        n_name, n_extra = np.frombuffer(file.read(4), dtype="<u2").tolist()
    # Behind the archive's header of the member, and the array's own.
    start = member.header_offset + 30 + n_name + n_extra + n_header
    order: Any = "F" if is_fortran else "C"
    return torch.from_numpy(np.memmap(path, dtype, "c", start, shape, order))
