"""circuit-tracer: a folder with config.yaml and layer_<i>.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors.torch import save_file

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import (
    basis_of,
    check_exportable,
    check_tensors,
    for_saving,
    read_tensors,
    read_yaml,
)
from tclib.support.errors import InputError
from tclib.support.files import new_folder

TRACER_THRESHOLD = "activation_function.threshold"


def read_circuit_tracer(folder: Path) -> dict[int, Dictionary]:
    """A circuit-tracer transcoder set, by layer.

    Errors: `InputError` for a cross-layer set, negative thresholds, layers that are not contiguous
    from 0, or tensors that do not fit.
    """
    config = read_yaml(folder / "config.yaml")
    kind = config.get("model_kind")
    if kind != "transcoder_set":
        raise InputError(f"{folder}: model_kind {kind!r}; expected transcoder_set")
    hook = str(config.get("feature_input_hook", ""))
    basis = basis_of(f"blocks.0.{hook}")
    files = sorted(folder.glob("layer_*.safetensors"), key=lambda path: int(path.stem[6:]))
    if [int(path.stem[6:]) for path in files] != list(range(len(files))) or not files:
        raise InputError(
            f"{folder}: layers {[p.stem for p in files]}; expected layer_0 upwards, no gap"
        )
    activation, k = config.get("activation", "relu"), config.get("k")
    found = {}
    for layer, path in enumerate(files):
        tensors = read_tensors(path)
        if "W_enc" not in tensors or tensors["W_enc"].ndim != 2:
            raise InputError(f"{path}: no matrix W_enc in it, only {sorted(tensors)}")
        n_features, d_model = tensors["W_enc"].shape
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (n_features, d_model),
            "W_dec": (n_features, d_model),
        }
        shapes |= {"b_enc": (n_features,), "b_dec": (d_model,)}
        shapes |= {"W_skip": (d_model, d_model)} if "W_skip" in tensors else {}
        has_threshold = TRACER_THRESHOLD in tensors
        shapes |= {TRACER_THRESHOLD: (n_features,)} if has_threshold else {}
        check_tensors(path, tensors, shapes)
        if has_threshold:
            tensors["threshold"] = tensors.pop(TRACER_THRESHOLD)
        tensors["W_enc"] = tensors["W_enc"].T
        if "W_skip" in tensors:
            tensors["W_skip"] = tensors["W_skip"].T.contiguous()
        own = DictionaryConfig(
            "transcoder",
            layer,
            d_model,
            d_model,
            n_features,
            "jumprelu" if has_threshold else activation,
            None if has_threshold else k,
            "W_skip" in tensors,
            str(config.get("model_name", "")),
            basis,
        )
        found[layer] = Dictionary(own, **tensors)
    return found


def write_circuit_tracer(dictionaries: Mapping[int, Dictionary], folder: Path) -> None:
    """A circuit-tracer transcoder set of relu and JumpReLU transcoders for layers 0 upwards.

    Errors: `InputError` for gaps, or dictionaries that the format cannot hold: top-k ones come back as
    ReLU from a local folder there.
    """
    if sorted(dictionaries) != list(range(len(dictionaries))) or not dictionaries:
        raise InputError(f"layers {sorted(dictionaries)}: the format needs 0 upwards without a gap")
    for dictionary in dictionaries.values():
        check_exportable(dictionary, "circuit-tracer", ("relu", "jumprelu", "batch_topk"))
    bases = {dictionary.config.basis for dictionary in dictionaries.values()}
    if len(bases) > 1:
        raise InputError("processed and raw dictionaries in one set: convert them to one basis")
    hook = "ln2.hook_normalized" if bases == {"processed"} else "hook_mlp_in"
    document = {
        "model_name": dictionaries[0].config.model,
        "model_kind": "transcoder_set",
        "feature_input_hook": hook,
        "feature_output_hook": "hook_mlp_out",
        "scan": dictionaries[0].config.model or "local",
    }
    with new_folder(folder) as temporary:
        for layer, dictionary in dictionaries.items():
            tensors = {**dictionary.parameters(), "W_enc": dictionary.W_enc.T}
            if dictionary.W_skip is not None:
                tensors["W_skip"] = dictionary.W_skip.T
            if dictionary.threshold is not None:
                tensors[TRACER_THRESHOLD] = tensors.pop("threshold")
            save_file(for_saving(tensors), temporary / f"layer_{layer}.safetensors")
        (temporary / "config.yaml").write_text(yaml.safe_dump(document))
