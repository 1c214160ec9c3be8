"""Gemma Scope's two layouts, written here as released (github.com/google-deepmind/gemma-scope, and the model cards)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import D_MODEL, N_FEATURES, make_lm, random_rows, random_transcoder
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.sources import sources
from tclib.dictionaries.bases import to_processed
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.any import load_dictionary, write_any
from tclib.dictionaries.formats.parts import place_of
from tclib.models.running import Site
from tclib.support.errors import InputError

MADE = random_transcoder(1, "jumprelu", torch.float32)
ARRAYS = {name: weight.numpy() for name, weight in MADE.parameters().items()}


def write_first(root: Path, **changed: Any) -> Path:
    """As google/gemma-scope-2b-pt-transcoders has it."""
    folder = root / "layer_1" / "width_16k" / "average_l0_6"
    folder.mkdir(parents=True)
    arrays = {k: v for k, v in {**ARRAYS, **changed}.items() if v is not None}
    np.savez(folder / "params.npz", **arrays)
    return folder


def write_second(root: Path, **changed: Tensor | None) -> Path:
    """As google/gemma-scope-2-270m-pt has it, with the affine skip."""
    folder = root / "transcoder_all" / "layer_1_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    named = {"W_enc": "w_enc", "W_dec": "w_dec"}
    held: dict[str, Tensor | None] = {named.get(k, k): v for k, v in MADE.parameters().items()}
    held["affine_skip_connection"] = 0.1 * torch.ones(D_MODEL, D_MODEL)
    held |= changed
    kept = {name: weight.contiguous() for name, weight in held.items() if weight is not None}
    save_file(kept, folder / "params.safetensors")
    return folder


def test_the_first_is_read_in_the_processed_basis(tmp_path: Path) -> None:
    found = load_dictionary(write_first(tmp_path) / "params.npz")
    config = found.config
    assert (config.layer, config.activation, config.basis, config.skip) == (
        1,
        "jumprelu",
        "processed",
        False,
    )
    for name, weight in MADE.parameters().items():
        assert torch.equal(found.parameters()[name], weight), name


def test_the_second_reads_what_has_the_gain_and_goes_through_a_model(tmp_path: Path) -> None:
    raw = load_dictionary(write_second(tmp_path))
    assert (raw.config.layer, raw.config.basis, raw.config.skip) == (1, "raw", True)
    lm = make_lm("gemma3", torch.float32)
    found = to_processed(raw, lm)
    rows = random_rows(2, 7).long()
    mlp_in = lm.read(rows, {Site("mlp_in", 1)})[Site("mlp_in", 1)]
    with_gain = lm.mlp_norm(1).affine(mlp_in)
    torch.testing.assert_close(found(mlp_in).feature_acts, raw.encode(with_gain))
    # The affine skip is applied as x @ W, to what has the gain.
    plain = raw.encode(with_gain) @ raw.W_dec + raw.b_dec
    expected = plain + with_gain @ (0.1 * torch.ones(D_MODEL, D_MODEL))
    torch.testing.assert_close(found(mlp_in).reconstruction, expected, rtol=1e-4, atol=1e-5)
    frozen = FrozenPrompts(lm, rows, [found])
    (added,) = sources(frozen, [frozen.logit_target({5: 1.0}, -1)])
    assert abs(added.residual) < 1e-4


@pytest.mark.parametrize(
    ("write", "changed", "message"),
    [
        (write_first, {"threshold": None}, r"tensors missing \[threshold\]"),
        (write_first, {"W_dec": ARRAYS["W_dec"].T}, r"W_dec has shape \(16, 40\) \(transposed\?\)"),
        (write_first, {"W_enc": ARRAYS["W_enc"].T}, "expected"),
        (write_first, {"W_enc": None}, "no matrix of an encoder"),
        (write_first, {"scaling": np.ones(3)}, r"arrays not expected \[scaling\]"),
        (write_first, {"b_enc": np.zeros(N_FEATURES, int)}, "expected floating point"),
        (write_first, {"b_enc": np.full(N_FEATURES, None)}, "truncated or damaged"),
        (write_second, {"threshold": None}, r"tensors missing \[threshold\]"),
        (write_second, {"w_dec": MADE.W_dec.T.contiguous()}, r"\(transposed\?\)"),
        (write_second, {"affine_skip_connection": torch.zeros(3, 3)}, "affine_skip_connection has"),
    ],
)
def test_what_is_no_such_layout_is_named(
    tmp_path: Path, write: Callable[..., Path], changed: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, **changed)
    with pytest.raises(InputError, match=message):
        load_dictionary(folder)


def test_a_file_without_its_folders_or_that_is_damaged_is_refused(tmp_path: Path) -> None:
    file = write_first(tmp_path / "a") / "params.npz"
    alone = tmp_path / "params.npz"
    alone.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="keep the folders that it was released in"):
        load_dictionary(alone)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_dictionary(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(10**8))
    with pytest.raises(InputError, match="inflates to 100,000,000 bytes"):
        load_dictionary(file)


@pytest.mark.parametrize("model", ["google/gemma-2-2b", "gemma-3-1b-it", "allenai/OLMo-2-0425-1B"])
def test_what_stands_in_front_of_a_norm_is_not_taken_for_what_is_added(model: str) -> None:
    hooks = ("blocks.3.ln2.hook_normalized", "blocks.3.mlp.hook_out")
    with pytest.raises(InputError, match="in front of the norm behind the MLP.*hook_mlp_out"):
        place_of(*hooks, Path("it"), model)
    assert place_of(*hooks, Path("it"), "meta-llama/Llama-3.2-1B") == (3, "processed")


def test_it_is_read_only(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gemma-scope is read only"):
        write_any({1: MADE}, tmp_path / "out", "gemma-scope")


def test_a_threshold_below_zero_does_what_zero_does(tmp_path: Path) -> None:
    found: Dictionary = load_dictionary(
        write_first(tmp_path, threshold=np.full(N_FEATURES, -1.0, np.float32))
    )
    assert found.threshold is not None and float(found.threshold.min()) == 0.0
