"""SAELens: a folder with cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tclib.dictionaries.dictionary import Activation, Dictionary, DictionaryConfig
from tclib.dictionaries.formats.parts import (
    HOOK_IN,
    HOOK_OUT,
    basis_of,
    check_exportable,
    check_tensors,
    for_saving,
    layer_of,
    read_json,
    read_tensors,
)
from tclib.support.errors import InputError
from tclib.support.files import new_folder

SAELENS_VERSION = "6.49.2"  # below 6 it rewrites the configuration as an old one


SAELENS_ARCHITECTURES: dict[str, tuple[Activation, bool]] = {  # activation, skip
    "transcoder": ("relu", False),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def read_saelens(folder: Path) -> Dictionary:
    """A SAELens transcoder folder.

    Errors: `InputError` for another architecture, missing, extra or transposed tensors, a hook that is
    no MLP input, or anything that would change the equations.
    """
    config = read_json(folder / "cfg.json")
    architecture = config.get("architecture")
    if architecture not in SAELENS_ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture!r}; expected {', '.join(SAELENS_ARCHITECTURES)}"
        )
    for name, expected in (("apply_b_dec_to_input", False), ("normalize_activations", "none")):
        if config.get(name, expected) != expected:
            raise InputError(f"{folder}: {name} is {config[name]!r}; only {expected!r} can be read")
    metadata = config.get("metadata", {})
    layer = layer_of(str(metadata.get("hook_name", "")), folder)
    tensors = read_tensors(folder / "sae_weights.safetensors")
    activation, skip = SAELENS_ARCHITECTURES[architecture]
    sizes = {name: int(config[name]) for name in ("d_in", "d_out", "d_sae")}
    shapes = {
        "W_enc": (sizes["d_in"], sizes["d_sae"]),
        "b_enc": (sizes["d_sae"],),
        "W_dec": (sizes["d_sae"], sizes["d_out"]),
        "b_dec": (sizes["d_out"],),
    }
    shapes |= {"W_skip": (sizes["d_out"], sizes["d_in"])} if skip else {}
    shapes |= {"threshold": (sizes["d_sae"],)} if activation == "jumprelu" else {}
    check_tensors(folder, tensors, shapes)
    if skip:
        tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    if activation == "jumprelu":
        # There a relu stands before the jump, so that a threshold below 0 does what 0 does.
        tensors["threshold"] = tensors["threshold"].clamp_min(0.0)
    own = DictionaryConfig(
        "transcoder",
        layer,
        sizes["d_in"],
        sizes["d_out"],
        sizes["d_sae"],
        activation,
        skip=skip,
        model=str(metadata.get("model_name", "")),
        basis=basis_of(str(metadata["hook_name"])),
    )
    return Dictionary(own, **tensors)


def write_saelens(dictionary: Dictionary, folder: Path) -> None:
    """A SAELens transcoder folder. Errors: `InputError` for a top-k or a non-transcoder dictionary."""
    check_exportable(dictionary, "SAELens", ("relu", "jumprelu", "batch_topk"))
    config = dictionary.config
    kept = ("relu" if dictionary.threshold is None else "jumprelu", config.skip)
    architecture = next(name for name, held in SAELENS_ARCHITECTURES.items() if held == kept)
    tensors = {**dictionary.parameters()}
    if dictionary.W_skip is not None:
        tensors["W_skip"] = dictionary.W_skip.T
    hook = HOOK_IN if config.basis == "processed" else "blocks.{layer}.hook_mlp_in"
    document = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_out": config.d_out,
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": config.model,
            "hook_name": hook.format(layer=config.layer),
            "hook_name_out": HOOK_OUT.format(layer=config.layer),
            "sae_lens_version": SAELENS_VERSION,
        },
    }
    with new_folder(folder) as temporary:
        save_file(for_saving(tensors), temporary / "sae_weights.safetensors")
        (temporary / "cfg.json").write_text(json.dumps(document, indent=2))
