"""SAELens: a folder with cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats import parts
from tclib.dictionaries.kinds import Activation
from tclib.support.errors import InputError
from tclib.support.files import new_folder

VERSION = "6.49.2"  # below 6 it rewrites the configuration as an old one
ARCHITECTURES: dict[str, tuple[Activation, bool]] = {  # activation, skip
    "transcoder": ("relu", False),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
TENSORS = parts.Tensors(transposed=frozenset({"W_skip"}), relu_first=True)
SAME_EQUATIONS = {
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
# Keys of other architectures, or of older versions.
OLDER = {
    "rescale_acts_by_decoder_norm": False,
    "activation_fn": "relu",
    "activation_fn_str": "relu",
    "activation": "relu",
    "k": None,
    "scaling_factor": 1.0,
    "activation_normalization_factor": 1.0,
    "norm_scaling_factor": 1.0,
    "use_error_term": False,
}


def read_saelens(folder: Path, lazy: bool = False) -> Dictionary:
    """A SAELens transcoder folder.

    SAELens itself loads a folder without hook_name_out, which is metadata there that nothing reads; it is
    then what a transcoder of that input writes, the MLP's output. Errors: `InputError` for another
    architecture, missing, extra or transposed tensors, hooks that are not one MLP's, or anything that would
    change the equations.
    """
    config = parts.read_config(folder / "cfg.json")
    architecture = parts.entry(config, "architecture", str, folder)
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder}: architecture {architecture!r}; expected {', '.join(ARCHITECTURES)}"
        )
    metadata = parts.entry(config, "metadata", dict, folder)
    hook = parts.entry(metadata, "hook_name", str, folder)
    own_out = f"{'.'.join(hook.split('.')[:2])}.{parts.HOOK_OUT}"
    hook_out = parts.entry(metadata, "hook_name_out", str, folder, own_out)
    model, model_hash = (
        parts.entry(metadata, name, str, folder, "") for name in ("model_name", parts.HASH)
    )
    layer, basis = parts.place_of(hook, hook_out, folder, model)
    place = {"hook_layer": layer, "hook_layer_out": layer, "hook_head_index": None}
    for said in (config, metadata):
        parts.check_same(said, {**SAME_EQUATIONS, **OLDER, **place}, folder)
    kwargs = parts.entry(metadata, "model_from_pretrained_kwargs", dict, folder, {})
    parts.check_same(kwargs, {"fold_ln": True}, folder)
    tensors = parts.read_tensors(folder / "sae_weights.safetensors")
    activation, skip = ARCHITECTURES[architecture]
    d_in, d_out, n_features = (
        parts.entry(config, name, int, folder) for name in ("d_in", "d_out", "d_sae")
    )
    sizes = (d_in, d_out, n_features)
    own = DictionaryConfig(
        "transcoder", layer, *sizes, activation, None, skip, model, basis, model_hash
    )
    return TENSORS.dictionary(folder, tensors, own, lazy)


def write_saelens(dictionary: Dictionary, folder: Path) -> None:
    """A SAELens transcoder folder. Errors: `InputError` for a top-k or a non-transcoder dictionary."""
    parts.check_exportable(dictionary, "SAELens", parts.JUMPS)
    config = dictionary.config
    kept = ("relu" if dictionary.threshold is None else "jumprelu", config.skip)
    block = f"blocks.{config.layer}"
    document = {
        "architecture": next(name for name, held in ARCHITECTURES.items() if held == kept),
        "d_in": config.d_in,
        "d_out": config.d_out,
        "d_sae": config.n_features,
        "dtype": "float32",
        "device": "cpu",
        **SAME_EQUATIONS,
        "metadata": {
            "model_name": config.model,
            parts.HASH: config.model_hash,
            "hook_name": f"{block}.{parts.HOOK_IN[config.basis]}",
            "hook_name_out": f"{block}.{parts.HOOK_OUT}",
            "sae_lens_version": VERSION,
        },
    }
    with new_folder(folder) as temporary:
        TENSORS.save(dictionary, temporary / "sae_weights.safetensors")
        (temporary / "cfg.json").write_text(json.dumps(document, indent=2))
