"""What is checked before a model is believed: what was loaded, and that its parts make up the whole.

`from_pretrained` fills what a file lacks with random numbers, and a class that looks like a known one
(another scale, a norm behind a part, an adapter, quantised weights) runs without an error. Both would give
wrong figures in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from tclib.support.declared import shown
from tclib.support.errors import InputError, listed
from tclib.support.foreign import read_json
from tclib.support.paths import check_file

if TYPE_CHECKING:
    from tclib.models.overrides import Overrides
    from tclib.models.running import ForwardCache, Running

# Masks and rotary frequencies that older files carry; the model makes them itself.
BUFFERS = re.compile(
    r"(^|\.)attn\.(masked_)?bias$|attention\.(masked_)?bias$|rotary_emb\.inv_freq$"
)
FLOATS = ("F16", "BF16", "F32", "F64")
ANY_SIZE = ("rope_theta", "rotary_emb_base")
MOST_OF_ANYTHING = 2**21
COMPARED_WHOLE = 65_536  # tokens: all logits of a vocabulary up to this are compared,
COMPARED = 8_192  # and about so many of a larger one
MOST = {
    "max_position_embeddings": 2**24,
    "n_positions": 2**24,
    "rotary_pct": 1,
    "partial_rotary_factor": 1,
}
PREFIXES = ("transformer.", "gpt_neox.", "model.")
PART_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
SAME_RUN = 1e-3  # between implementations of attention, in float32
LOGITS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def check_report(report: Mapping[str, Any], name: str, location: str) -> None:
    """Refuse a model of which anything was not read from its files, by transformers' loading report.

    Errors: `InputError` naming tensors that are missing, not expected or of another shape.
    """
    unexpected = [key for key in report["unexpected_keys"] if not BUFFERS.search(key)]
    mismatched = [
        f"{key} {tuple(found)} for {tuple(wanted)}"
        for key, found, wanted in report["mismatched_keys"]
    ]
    wrong = {
        "missing": report["missing_keys"],
        "not expected": unexpected,
        "of another shape": mismatched,
    }
    said = [f"{listed(keys)} {what}" for what, keys in wrong.items() if keys]
    if said or report["error_msgs"]:
        raise InputError(
            f"model {name!r}: the weights in {location} are not those of its config.json: "
            f"{'; '.join(said) or listed(report['error_msgs'])}: take a complete copy of the model"
        )


def check_files(location: str, name: str) -> None:
    """Refuse weights that would be cast or passed over without a word, by the headers of safetensors files.

    Errors: `InputError` for tensors that are no floating-point numbers of 16 bits or more, or that stand
    there twice, with and without the prefix of the class.
    """
    for path in sorted(Path(location).glob("*.safetensors")):
        weights = {key: kind for key, (kind, _) in _header(path).items() if not BUFFERS.search(key)}
        if odd := [f"{key} ({kind})" for key, kind in weights.items() if kind not in FLOATS]:
            raise InputError(
                f"model {name!r}: {listed(odd)} in {path} are no plain floating-point weights, and would be "
                "taken as numbers: take a copy that is not quantised"
            )
        if twice := [key for key in weights if any(prefix + key in weights for prefix in PREFIXES)]:
            raise InputError(
                f"model {name!r}: {listed(twice)} in {path} stand there twice, with and without the prefix of "
                "the class: take a complete copy of the model"
            )


def _header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor of a safetensors file, by name."""
    check_file(path, "take a complete copy of the model")
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (one.get_dtype(), one.get_shape()) for key, one in slices.items()}


def check_numbers(path: Path, name: str) -> None:
    """Refuse a config.json with numbers that no model has, which transformers would make lists and tables of.

    Errors: `InputError` naming the entry.
    """
    held = [("", read_json(path))]
    for key, value in held:
        if isinstance(value, dict):
            held += value.items()
        elif isinstance(value, list):
            held += [(key, one) for one in value]
        elif isinstance(value, int | float) and key not in ANY_SIZE:
            most = MOST.get(key, MOST_OF_ANYTHING)
            if not abs(value) <= most:
                raise InputError(
                    f"model {name!r}: {key} is {value} in its config: expected at most {most:,}"
                )


def check_demand(location: str, name: str) -> None:
    """Refuse a config.json that asks for a larger model than its weights make up, before it is allocated.

    Twice the weights is let pass: what is missing is then named. Errors: `InputError` naming both sizes.
    """
    folder = Path(location)
    n_held, n_tensors = _held(folder)
    if not n_held:
        return  # on the hub: its files are not here yet
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    if config.num_hidden_layers > n_tensors:
        said = f"{config.num_hidden_layers:,} layers, and its weights are {n_tensors:,} tensors"
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        n_asked = sum(weight.numel() for weight in model.parameters())
        if n_asked <= 2 * n_held:
            return
        said = f"{n_asked:,} weights, and it has {n_held:,}"
    raise InputError(
        f"model {name!r}: config.json in {location} asks for {said}: they belong to different models; take a "
        "complete copy of one"
    )


def _held(folder: Path) -> tuple[int, int]:
    """How many weights the files of a folder can hold, and in how many tensors."""
    n_weights = n_tensors = 0
    for path in folder.glob("*.safetensors"):
        header = _header(path)
        n_weights += sum(math.prod(shape) for _, shape in header.values())
        n_tensors += len(header)
    for path in [] if n_tensors else folder.glob("*.bin"):
        n_weights += path.stat().st_size // 2
        n_tensors += len(ZipFile(path).namelist()) if is_zipfile(path) else n_weights
    return n_weights, n_tensors


def check_hooks(model: Any, name: str) -> None:
    """Refuse a model with hooks on it: what they do is no part of its weights, by which it is known."""
    if model.training:
        raise InputError(
            f"{name} is in training mode, in which dropout acts: call its eval() first"
        )
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise InputError(
            f"{name}: hooks are attached to every module of torch, which change the model but not the weights "
            "by which results are kept: remove them first"
        )
    for where, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers records attention patterns by hooks of its own, which change nothing.
        foreign = [hook for hook in hooks if not _is_transformers(hook)]
        if foreign or "forward" in vars(module):
            raise InputError(
                f"{name}: something is attached to {where or 'the model'} (a hook, or an override that is still active), "
                "which changes the model but not the weights by which results are kept: remove it first"
            )


def _is_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def check_config(config: Any, name: str) -> None:
    """Refuse sizes that no model has, and quantised weights, which no matrix of the model shows."""
    for size in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        value = getattr(config, size, 1)
        if type(value) is not int or value < 1:
            raise InputError(
                f"model {name!r}: {size} is {shown(value)} in its config: expected a whole number of 1 or more"
            )
    if getattr(config, "is_causal", None) is False or getattr(
        config, "use_bidirectional_attention", None
    ):
        raise InputError(
            f"model {name!r} lets tokens attend to later ones (is_causal, use_bidirectional_attention in its config): "
            "attribution goes from earlier tokens to later ones; take a causal model"
        )
    method = getattr(config, "quantization_config", None)
    if method is not None:
        given = method if isinstance(method, dict) else vars(method)
        kind = given.get("quant_method", "unknown")
        raise InputError(
            f"model {name!r} is quantised ({getattr(kind, 'value', kind)}): attribution needs the weights "
            "themselves; take a copy in float32, bfloat16 or float16"
        )


def check_module(model: Any, name: str) -> None:
    """Refuse a module whose weights are no plain floating-point matrices."""
    check_config(model.config, name)
    for key, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            raise InputError(
                f"model {name!r}: {key} is {type(parameter.data).__name__} of {parameter.dtype}: expected "
                "plain floating-point weights; take a copy that is not quantised"
            )
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"model {name!r}: {key} has values that are NaN or infinite: take a complete copy of the model"
            )
    upcast = getattr(model.config, "reorder_and_upcast_attn", False)
    if upcast and next(model.parameters()).dtype == torch.float64:
        raise InputError(
            f"model {name!r} computes attention in float32 (reorder_and_upcast_attn) but has float64 weights: "
            "set that to false in its config, or use float32"
        )


def check_tokenizer(tokenizer: Any, n_embeddings: int, name: str) -> None:
    """Refuse a tokenizer that cannot have been the model's.

    Errors: `InputError` for one without words (its files are missing), without BOS and EOS, or with
    ids beyond the embedding.
    """
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    if not vocabulary or not set(vocabulary) - set(tokenizer.all_special_tokens):
        raise InputError(
            f"model {name!r} has no tokenizer: expected tokenizer.json (or vocab.json and merges.txt) beside "
            "its weights"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {name!r} has neither BOS nor EOS, and every row opens with one: set "
            "tokenizer.bos_token"
        )
    largest = max(vocabulary.values())
    if largest >= n_embeddings:
        raise InputError(
            f"the tokenizer of {name!r} has ids up to {largest}, its embedding {n_embeddings} rows: they "
            "belong to different models"
        )


# ---------------------------------------------------------------------------------------------
# The self-check


@torch.no_grad()
def check_logits(lm: Overrides, made: Tensor, measured: Tensor) -> None:
    """Raise `InputError` unless a model's logits are what its unembedding puts out, scaled and capped as in its family."""
    if not bool(measured.isfinite().all()):
        return  # which is said elsewhere
    size = measured.abs().amax().clamp_min(torch.finfo(measured.dtype).tiny)
    off = float((made - measured).abs().amax() / size)
    if not off <= LOGITS_TOLERANCE.get(lm.dtype, 0.05):
        raise InputError(_not_plain(lm, "unembedding", off, LOGITS_TOLERANCE[torch.float32]))


def _not_plain(lm: Overrides, part: str, off: float, tolerance: float) -> str:
    return (
        f"{lm.name}: its {part} cannot be put together from the weights that tclib reads (off by "
        f"{off:.1e}, at most {tolerance:g} expected): it is no plain {type(lm.model).__name__}, or "
        "was edited through .data (make a new LanguageModel of it): attribution through it would be wrong"
    )


@torch.no_grad()
def check_attention(lm: Running, cache: ForwardCache) -> None:
    """Refuse a model whose patterns are not those of its usual run: once a model, on its first prompt.

    Patterns are asked for with another implementation of attention than logits. Errors: `InputError` for weight on
    later tokens, or logits that differ between the two.
    """
    for layer, pattern in enumerate(cache.pattern):
        if bool(pattern.triu(1).any()):
            raise InputError(
                f"{lm.name}: tokens attend to later ones in layer {layer}: take a causal model"
            )

    def off() -> float:
        usual = lm.logits(cache.tokens[:1])
        made = lm.capped_logits(cache.logits[:1])
        return float((made - usual).abs().max() / usual.abs().max())

    found = lm.derived("patterns are its own", off, lm.model)
    if not found <= SAME_RUN:
        raise InputError(
            f"{lm.name}: its logits differ by {found:.1e} of the largest from those of a run that gives patterns, so "
            "that they are another model's: a fault of this version of transformers, or of the config"
        )


@torch.no_grad()
def check_parts(lm: Running, cache: ForwardCache) -> None:
    """Put a forward pass together again from the parts that attribution uses.

        x = W_E[token] (+ W_pos)    then a layer   x + Σ_h A[h] v[h] W_O[h] + b_O,  + mlp_out
        logits = x̂ W_U + b_U

    A part is off by the largest difference at a position over the largest entry there. Errors:
    `InputError` naming the first part that is off by more than 1e-4 (float32) or 1e-9 (float64).
    """
    tolerance = PART_TOLERANCE.get(lm.dtype, PART_TOLERANCE[torch.float32])
    for part, made, measured in _parts(lm, cache):
        size = measured.abs().amax(-1).clamp_min(torch.finfo(measured.dtype).tiny)
        off = float(((made - measured).abs().amax(-1) / size).max())
        if not off <= tolerance:
            raise InputError(_not_plain(lm, part, off, tolerance))


def _parts(lm: Running, cache: ForwardCache) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, put together, as measured) of every part, in the order in which the model runs."""
    scales = [*cache.attention_scale, cache.final_scale]
    final = cache.final_in / cache.final_scale[..., None]
    streams = [
        read * scale[..., None]
        for read, scale in zip([*cache.attention_in, final], scales, strict=True)
    ]
    positions = 0 if cache.position_embedding is None else cache.position_embedding
    yield "embedding", cache.token_embedding + positions, streams[0]
    for layer in range(lm.n_layers):
        attended = streams[layer] + _attention_out(lm, cache, layer)
        read = cache.mlp_in[layer] * cache.mlp_scale[layer][..., None]
        if lm.is_parallel:
            yield f"what the MLP of layer {layer} reads", streams[layer], read
        else:
            yield f"attention of layer {layer}", attended, read
        # The MLP itself is never taken apart: one position shows whether it reads what tclib says.
        made = lm.run_mlp(layer, cache.mlp_in[layer][:, -1:])
        yield f"MLP of layer {layer}", made, cache.mlp_out[layer][:, -1:]
        what = "attention and MLP" if lm.is_parallel else "stream above the MLP"
        yield f"{what} of layer {layer}", attended + cache.mlp_out[layer], streams[layer + 1]
    logits = cache.logits - cache.logits.mean(-1, keepdim=True)
    every = 1 if lm.d_vocab <= COMPARED_WHOLE else lm.d_vocab // COMPARED
    ids = torch.arange(0, lm.d_vocab, every, device=logits.device)
    yield "unembedding", final @ lm.unembedding(ids) + lm.b_U[ids], logits[..., ids]


def _attention_out(lm: Running, cache: ForwardCache, layer: int) -> Tensor:
    weights = lm.attention_weights(layer)
    values = torch.einsum("bsd,hdk->bhsk", cache.attention_in[layer], weights.W_V)
    mixed = cache.pattern[layer] @ (values + weights.b_V[:, None])
    return torch.einsum("bhtk,hkd->btd", mixed, weights.W_O) + weights.b_O
