"""circuit-tracer: a folder with config.yaml and layer_<i>.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats import parts
from tclib.support.declared import shown
from tclib.support.errors import InputError, listed
from tclib.support.files import new_folder

MAX_LAYERS = 1_000  # of which every one is read
TRACER_THRESHOLD = "activation_function.threshold"
TENSORS = parts.Tensors({"threshold": TRACER_THRESHOLD}, frozenset({"W_enc", "W_skip"}))


def read_circuit_tracer(folder: Path) -> dict[int, Dictionary]:
    """A circuit-tracer transcoder set, by layer.

    Errors: `InputError` for a cross-layer set, a hook that is not an MLP's or not said (circuit-tracer
    itself needs both), negative thresholds, layers that are not contiguous from 0, or tensors that do not
    fit.
    """
    config = parts.read_config(folder / "config.yaml")
    kind = parts.entry(config, "model_kind", str, folder)
    if kind != "transcoder_set":
        raise InputError(f"{folder}: model_kind {kind!r}; expected transcoder_set")
    hook_in, hook_out = (
        f"blocks.0.{parts.entry(config, f'feature_{end}_hook', str, folder)}"
        for end in ("input", "output")
    )
    model, model_hash = (
        parts.entry(config, name, str, folder, "") for name in ("model_name", parts.HASH)
    )
    _, basis = parts.place_of(hook_in, hook_out, folder, model)
    names = {path.name for path in folder.glob("layer_*.safetensors")}
    if len(names) > MAX_LAYERS:
        raise InputError(f"{folder}: {len(names):,} layers; expected at most {MAX_LAYERS:,}")
    files = [folder / f"layer_{layer}.safetensors" for layer in range(len(names))]
    if names != {path.name for path in files} or not names:
        raise InputError(f"{folder}: layers [{listed(names)}]; expected layer_0 upwards, no gap")
    _check_list(parts.entry(config, "transcoders", list, folder, []), len(files), folder)
    parts.check_same(config, {"scaling_factor": 1.0, "normalize": None}, folder)
    found = {}
    for layer, path in enumerate(files):
        tensors = parts.read_tensors(path)
        if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
            raise InputError(f"{path}: no matrix W_enc in it, only {listed(tensors)}")
        n_features, d_model = tensors["W_enc"].shape
        activation: Any = parts.entry(config, "activation", str, folder, "relu")
        k = parts.entry(config, "k", int, folder, 0) or None
        if TRACER_THRESHOLD in tensors:
            activation, k = "jumprelu", None
        skip = "W_skip" in tensors
        said = {"skip_connection": skip, "activation_function": activation}
        parts.check_same(config, said, folder)
        sizes = (d_model, d_model, n_features)
        own = DictionaryConfig(
            "transcoder", layer, *sizes, activation, k, skip, model, basis, model_hash
        )
        found[layer] = Dictionary(own, **TENSORS.ours(path, tensors, own))
    return found


def _check_list(listed_files: list[Any], n_layers: int, folder: Path) -> None:
    """Raise `InputError` unless a set's own list of files, where it has one, is that of its folder, in order."""
    for layer, name in enumerate(listed_files):
        if str(name).split("/")[-1] != f"layer_{layer}.safetensors":
            raise InputError(
                f"{folder}: transcoder {layer} of its list is {shown(name)}; expected "
                f"layer_{layer}.safetensors: files are read by their names"
            )
    if listed_files and len(listed_files) != n_layers:
        raise InputError(
            f"{folder}: its list names {len(listed_files)} transcoders, and it holds {n_layers}: fetch all"
        )


def write_circuit_tracer(dictionaries: Mapping[int, Dictionary], folder: Path) -> None:
    """A circuit-tracer transcoder set of relu and JumpReLU transcoders for layers 0 upwards.

    Errors: `InputError` for gaps, several models or bases, or dictionaries that the format cannot hold:
    top-k ones come back as ReLU from a local folder there.
    """
    if sorted(dictionaries) != list(range(len(dictionaries))) or not dictionaries:
        raise InputError(f"layers {sorted(dictionaries)}: the format needs 0 upwards without a gap")
    for dictionary in dictionaries.values():
        parts.check_exportable(dictionary, "circuit-tracer", parts.JUMPS)
    first = dictionaries[0].config
    for config in (dictionary.config for dictionary in dictionaries.values()):
        if config.basis != first.basis:
            raise InputError("processed and raw dictionaries in one set: convert them to one basis")
        if (config.model, config.model_hash) != (first.model, first.model_hash):
            raise InputError(
                f"layers 0 and {config.layer} were trained on different models: a set is of one model"
            )
    document = {
        "model_name": first.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": parts.HOOK_IN[first.basis],
        "feature_output_hook": parts.HOOK_OUT,
        "scan": first.model or "local",
        parts.HASH: first.model_hash,
    }
    with new_folder(folder) as temporary:
        for layer, dictionary in dictionaries.items():
            TENSORS.save(dictionary, temporary / f"layer_{layer}.safetensors")
        (temporary / "config.yaml").write_text(yaml.safe_dump(document))
