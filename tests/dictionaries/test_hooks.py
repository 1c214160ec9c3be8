"""The hooks that files declare: what TransformerLens has there is what the dictionary reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import (
    GEOMETRIES,
    authors_file,
    edit_json,
    random_rows,
    random_transcoder,
    tiny_hf_model,
    tiny_tokenizer,
)
from torch import Tensor

from tclib.dictionaries.bases import to_processed
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.any import write_any
from tclib.dictionaries.formats.authors import read_authors
from tclib.dictionaries.formats.circuit_tracer import (
    TRACER_THRESHOLD,
    read_circuit_tracer,
    write_circuit_tracer,
)
from tclib.dictionaries.formats.saelens import read_saelens, write_saelens
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError

LAYERS = range(2)


class Both(NamedTuple):
    """One model, ours and as TransformerLens runs it; in float64, so that rounding hides nothing."""

    lm: LanguageModel
    bridge: Any


@pytest.fixture(scope="module", params=GEOMETRIES)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp(request.param)
    tiny_hf_model(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    exact: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}
    bridge = TransformerBridge.boot_transformers(str(folder), **exact)
    yield Both(LanguageModel.load(str(folder), **exact), bridge)


def in_basis(kind: str, basis: str, layer: int) -> Dictionary:
    one = random_transcoder(layer, kind, torch.float32)  # as files hold them
    one.config = replace(one.config, basis=basis)  # type: ignore[arg-type]
    return one


def declared_saelens(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The input hook that a SAELens folder declares, and its encoder as the format defines it."""
    hook = json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"]
    return hook, load_file(folder / "sae_weights.safetensors")


def declared_circuit_tracer(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """The same of layer 1 of a circuit-tracer set, whose encoder is transposed."""
    hook = yaml.safe_load((folder / "config.yaml").read_text())["feature_input_hook"]
    weights = load_file(folder / "layer_1.safetensors")
    weights["W_enc"] = weights["W_enc"].T
    if TRACER_THRESHOLD in weights:
        weights["threshold"] = weights.pop(TRACER_THRESHOLD)
    return f"blocks.1.{hook}", weights


@pytest.mark.parametrize("form", ["saelens", "circuit-tracer"])
@pytest.mark.parametrize("basis", ["processed", "raw", "stream"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_features_at_the_declared_hook_of_transformer_lens_are_ours(
    both: Both, form: Any, basis: str, kind: str, tmp_path: Path
) -> None:
    if basis == "stream" and (both.lm.is_parallel or both.lm.final_norm.kind == "layer"):
        pytest.skip("no site of this model's")
    several = {layer: in_basis(kind, basis, layer) for layer in LAYERS}
    written = several if form == "circuit-tracer" else {1: several[1]}
    write_any(written, tmp_path / "out", form)
    declared = declared_circuit_tracer if form == "circuit-tracer" else declared_saelens
    hook, weights = declared(tmp_path / "out")
    tokens = random_rows(3).long()
    with torch.no_grad():
        _, cache = both.bridge.run_with_cache(tokens)
    pre = cache[hook] @ weights["W_enc"].double() + weights["b_enc"].double()
    theirs = torch.where(pre > weights.get("threshold", torch.zeros(1)), pre, 0.0)
    ours = to_processed(several[1].to(dtype=torch.float64), both.lm)
    site = ours.config.input_site
    z = ours.encode(both.lm.read(tokens, {site})[site])
    assert (z > 0).any()
    torch.testing.assert_close(theirs, z, rtol=0, atol=1e-6)


REFUSED = [
    ("hook_resid_pre", "hook_mlp_out", "is no MLP input"),
    (
        "attn.hook_in",
        "hook_mlp_out",
        "is no MLP input: expected ln2.hook_normalized or mlp.hook_in or hook_resid_mid",
    ),
    ("not_mlp.hook_in", "hook_mlp_out", "is no MLP input"),
    ("mlp.hook_in", "hook_resid_post", "is no MLP output: expected hook_mlp_out or mlp.hook_out"),
]
OTHER_LAYER = r"reads layer 1 \(.*\) and writes layer 2 \(.*\)"


@pytest.mark.parametrize(("reads", "writes", "message"), REFUSED)
def test_hooks_that_are_no_mlps_are_refused_in_every_format(
    tmp_path: Path, runner_config: type, reads: str, writes: str, message: str
) -> None:
    write_saelens(in_basis("relu", "raw", 1), tmp_path / "s")
    metadata = {"hook_name": f"blocks.1.{reads}", "hook_name_out": f"blocks.1.{writes}"}
    edit_json(tmp_path / "s" / "cfg.json", metadata=metadata)
    with pytest.raises(InputError, match=message):
        read_saelens(tmp_path / "s")
    write_circuit_tracer({0: in_basis("relu", "raw", 0)}, tmp_path / "set")
    change_yaml(tmp_path / "set", feature_input_hook=reads, feature_output_hook=writes)
    with pytest.raises(InputError, match=message):
        read_circuit_tracer(tmp_path / "set")
    path, hooks = tmp_path / "one.pt", (f"blocks.1.{reads}", f"blocks.1.{writes}")
    authors_file(path, runner_config, hook_point=hooks[0], out_hook_point=hooks[1])
    with pytest.raises(InputError, match=message):
        read_authors(path)


def change_yaml(folder: Path, **changed: object) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    changed = {name: value for name, value in (config | changed).items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))


def test_input_and_output_are_of_one_layer(tmp_path: Path, runner_config: type) -> None:
    write_saelens(in_basis("relu", "raw", 1), tmp_path / "s")
    metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    edit_json(tmp_path / "s" / "cfg.json", metadata=metadata)
    with pytest.raises(InputError, match=OTHER_LAYER):
        read_saelens(tmp_path / "s")
    path = tmp_path / "one.pt"
    for changed, message in (
        ({"out_hook_point": "blocks.2.hook_mlp_out"}, OTHER_LAYER),
        ({"out_hook_point_layer": 2}, "out_hook_point_layer 2 name different layers"),
        ({"hook_point_layer": 2}, "hook_point_layer 2 name different layers"),
    ):
        authors_file(path, runner_config, **changed)
        with pytest.raises(InputError, match=message):
            read_authors(path)


def test_a_missing_output_hook_is_what_the_formats_own_loader_makes_of_it(
    tmp_path: Path, runner_config: type
) -> None:
    write_saelens(in_basis("relu", "raw", 1), tmp_path / "s")
    edit_json(tmp_path / "s" / "cfg.json", metadata={"hook_name": "blocks.1.mlp.hook_in"})
    assert read_saelens(tmp_path / "s").config.layer == 1
    write_circuit_tracer({0: in_basis("relu", "raw", 0)}, tmp_path / "set")
    change_yaml(tmp_path / "set", feature_output_hook=None)
    with pytest.raises(InputError, match="feature_output_hook is missing"):
        read_circuit_tracer(tmp_path / "set")
    authors_file(tmp_path / "one.pt", runner_config, out_hook_point=None)
    with pytest.raises(InputError, match="out_hook_point is missing"):
        read_authors(tmp_path / "one.pt")


def test_activations_that_saelens_would_reshape_are_refused(tmp_path: Path) -> None:
    write_saelens(in_basis("relu", "raw", 1), tmp_path / "s")
    edit_json(tmp_path / "s" / "cfg.json", reshape_activations="hook_z")
    with pytest.raises(InputError, match="reshape_activations is 'hook_z'; only 'none'"):
        read_saelens(tmp_path / "s")


def test_what_the_mlp_gives_has_two_names(tmp_path: Path) -> None:
    write_circuit_tracer({0: in_basis("relu", "raw", 0)}, tmp_path / "set")
    change_yaml(tmp_path / "set", feature_output_hook="mlp.hook_out")
    assert read_circuit_tracer(tmp_path / "set")[0].config.basis == "raw"
