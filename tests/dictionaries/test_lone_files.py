"""A file of another library that is no dictionary by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tclib.dictionaries.formats.any import load_dictionary
from tclib.support.errors import InputError


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "layer_0.safetensors",
            ("W_enc", "W_dec"),
            "one layer of a circuit-tracer set: give its f",
        ),
        ("sae_weights.safetensors", ("W_enc", "W_dec"), "weights of a SAELens folder: give its f"),
        ("sae.safetensors", ("encoder.weight",), "weights of a sparsify folder: give its folder"),
        ("W_enc_3.safetensors", ("W_enc_3",), "part of a cross-layer transcoder"),
        ("mine.safetensors", ("W_enc",), "of another library give the whole folder"),
    ],
)
def test_a_lone_file_of_another_library_is_called_what_it_is(
    tmp_path: Path, name: str, tensors: tuple[str, ...], message: str
) -> None:
    save_file({tensor: torch.zeros(2, 2) for tensor in tensors}, tmp_path / name)
    with pytest.raises(InputError, match=f"not written by tclib.*{message}"):
        load_dictionary(tmp_path / name)
    with pytest.raises(InputError, match="no such file or folder"):
        load_dictionary(tmp_path / "none.safetensors")
