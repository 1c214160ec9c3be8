"""OpenMOSS's transcoders: Llama Scope (hyperparams.json) and what its library saves today (config.json).

    Llama Scope    L15TC-8x/hyperparams.json, L15TC-8x/checkpoints/final.safetensors: encoder.weight [F, d],
                   encoder.bias, decoder.weight [d, F], decoder.bias; one threshold for all features
    later          config.json, sae_weights.safetensors: W_E [d, F], b_E, W_D [F, d], b_D,
                   activation_function.log_jumprelu_threshold [F]

Both train on activations scaled to a mean norm of √d, s = √d / (mean norm), which is folded in here:

    pre = s_in x W_E + b_E      z = act(pre)      ŷ = (z W_D + b_D) / s_out

Where the library gates by pre · ‖d‖ (sparsity_include_decoder_norm), features are counted in units of ‖d‖, in which
the gate is the usual one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.dictionaries.formats import parts
from tclib.support.declared import shown
from tclib.support.errors import InputError

FIRST, LATER = "hyperparams.json", "config.json"
FIRST_WEIGHTS, LATER_WEIGHTS = "checkpoints/final.safetensors", "sae_weights.safetensors"
SAELENS = "cfg.json"  # beside weights of the same name
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
NORMS = "dataset_average_activation_norm"
SAME = {"use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False}
LATER_TENSORS = parts.Tensors({"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"})
FIRST_TENSORS = parts.Tensors(
    {
        "W_enc": "encoder.weight",
        "b_enc": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "decoder.bias",
    },
    frozenset(parts.MATRICES),
)


def is_llama_scope(folder: Path) -> bool:
    """Whether a folder holds one of the two layouts."""
    has_later = (folder / LATER).is_file() and (folder / LATER_WEIGHTS).is_file()
    return (folder / FIRST).is_file() or (has_later and not (folder / SAELENS).is_file())


def read_llama_scope(folder: Path) -> Dictionary:
    """A transcoder of one layer.

    Errors: `InputError` for an autoencoder, another activation than JumpReLU and top-k, gated encoders, norms that
    were taken token by token, or tensors that do not fit.
    """
    is_first = (folder / FIRST).is_file()
    config = parts.read_config(folder / (FIRST if is_first else LATER))
    parts.check_same(config, SAME, folder)
    tensors = parts.read_tensors(folder / (FIRST_WEIGHTS if is_first else LATER_WEIGHTS))
    hooks = [parts.entry(config, f"hook_point_{end}", str, folder) for end in ("in", "out")]
    layer, basis = parts.place_of(hooks[0], hooks[1], folder)
    kind = parts.entry(config, "act_fn", str, folder).lower()
    if kind not in ("jumprelu", "topk"):
        raise InputError(f"{folder}: act_fn {kind!r}; expected jumprelu or topk")
    weights = _weights(folder, tensors, FIRST_TENSORS if is_first else LATER_TENSORS)
    activation: Any = kind
    d_in, n_features = weights["W_enc"].shape
    k = parts.entry(config, "top_k", int, folder) if activation == "topk" else None
    if activation == "jumprelu":
        weights["threshold"] = _threshold(folder, tensors, config, n_features)
    norms = _norms(folder, tensors, config, hooks)
    by_norm = parts.entry(config, "sparsity_include_decoder_norm", bool, folder, False)
    # In Llama Scope its top-k gates so, and its JumpReLU does not.
    weights = _folded(weights, norms, by_norm and not (is_first and activation == "jumprelu"))
    own = DictionaryConfig("transcoder", layer, d_in, d_in, n_features, activation, k, basis=basis)
    return Dictionary(own, **weights)


def _weights(
    folder: Path, tensors: Mapping[str, Tensor], names: parts.Tensors
) -> dict[str, Tensor]:
    """Both matrices and biases, by our names; what stands beside them is read apart."""
    others = sorted({str(t.dtype) for t in tensors.values() if t.dtype not in parts.FLOATS})
    if others:
        raise InputError(f"{folder}: tensors of {', '.join(others)}: expected floating point")
    held = {n: t for n, t in tensors.items() if n != LOG_THRESHOLD and not n.startswith(NORMS)}
    biases = [held.get(names.names[name]) for name in ("b_dec", "b_enc")]
    d_model, n_features = (1 if bias is None else bias.numel() for bias in biases)
    if d_model > n_features:
        raise InputError(
            f"{folder}: biases of {d_model} and {n_features} numbers: expected more features than that are read"
        )
    plain = DictionaryConfig("transcoder", 0, d_model, d_model, n_features)
    return names.ours(folder, held, plain)


def _threshold(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], n_features: int
) -> Tensor:
    if LOG_THRESHOLD in tensors:
        return tensors[LOG_THRESHOLD].float().exp()
    one = _number(config.get("jump_relu_threshold"))
    if not 0 <= one < math.inf:
        said = shown(config.get("jump_relu_threshold"))
        raise InputError(f"{folder}: no {LOG_THRESHOLD}, and jump_relu_threshold is {said}")
    return torch.full((n_features,), one)


def _number(value: Any) -> float:
    """A number of a configuration, or of a tensor of one; NaN for anything else."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else math.nan
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else math.nan


def _norms(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], hooks: list[str]
) -> tuple[float, float]:
    """The mean norms of what is read and written, √d where nothing is scaled."""
    how = parts.entry(config, "norm_activation", str, folder, "dataset-wise")
    if how == "inference":
        return 0.0, 0.0
    if how != "dataset-wise":
        raise InputError(
            f"{folder}: norm_activation {how!r} scales every token by itself; expected dataset-wise"
        )
    held = parts.entry(config, NORMS, dict, folder, {})
    found = [
        tensors.get(f"{NORMS}.{hook}", held.get(end))
        for hook, end in zip(hooks, ("in", "out"), strict=True)
    ]
    values = [_number(one) for one in found]
    if not all(0 < value < math.inf for value in values):
        raise InputError(f"{folder}: {NORMS} {values}: expected two norms above 0")
    return values[0], values[1]


def _folded(
    weights: Mapping[str, Tensor], norms: tuple[float, float], by_decoder_norm: bool
) -> dict[str, Tensor]:
    """The weights with both scales, and decoder norms if the gate counts in them, folded in."""
    root = math.sqrt(len(weights["b_dec"]))
    s_in, s_out = (root / norm if norm else 1.0 for norm in norms)
    size = weights["W_dec"].norm(dim=1) if by_decoder_norm else torch.ones(len(weights["b_enc"]))
    return {
        **weights,  # the threshold, where there is one
        "W_enc": weights["W_enc"] * s_in * size,
        "b_enc": weights["b_enc"] * size,
        "W_dec": weights["W_dec"] / size[:, None] / s_out,
        "b_dec": weights["b_dec"] / s_out,
    }
