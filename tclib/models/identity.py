"""Which model it is: a hash of its weights, and of what its config says of how they act.

A name, or a folder, can hold other weights tomorrow, and a model in memory can be edited. The hash of a folder
is kept under TCLIB_CACHE, by the names, sizes and times of its files, so that it is computed once, when they are
loaded; that of a model in memory is computed whenever it is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tclib.models.pypi import cache_folder
from tclib.support.errors import InputError
from tclib.support.files import new_file, tensors_hash

HASHES = "model_hashes.json"
FOLDERS = ("/", ".", "~")  # what the path of a folder begins with
# What decides, besides the weights, what a model of a known class computes.
ACTS_BY = (
    "model_type num_attention_heads num_key_value_heads head_dim hidden_act activation_function "
    "layer_norm_epsilon layer_norm_eps rms_norm_eps use_parallel_residual rope_parameters rotary_pct "
    "sliding_window scale_attn_weights scale_attn_by_inverse_layer_idx"
)
# The same for families that were added later; the hashes of the first three stay as they are.
ACTS_BY_TOO = (
    "embedding_multiplier residual_multiplier logits_scaling attention_multiplier logit_scale "
    "final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar layer_types use_sliding_window "
    "max_window_layers partial_rotary_factor rotary_dim hidden_activation parallel_attn new_decoder_architecture "
    "multi_query num_kv_heads alibi num_ln_in_parallel_attn attention_types window_size no_rope_layers "
    "qk_layernorm use_qk_norm do_layer_norm_before num_experts_per_tok norm_topk_prob swiglu_limit rope_scaling "
    "activation swiglu_alpha"
)
BY_LENGTH = ("longrope", "yarn", "dynamic")  # rotary frequencies that go by the context's length
OLD_CLASSES = ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM")
# Names of one model that differ in more than their organisation and their case.
ALIASES = {
    "gpt2-small": "gpt2",
    "smollm2": "smollm2-135m-instruct",
    "gemma3-270m": "gemma-3-270m",
}


def names_differ(one: str, other: str) -> bool:
    """Whether both are names, not folders and not empty, and of different models."""
    if not one or not other or one.startswith(FOLDERS) or other.startswith(FOLDERS):
        return False
    return _plain(one) != _plain(other)


def _plain(name: str) -> str:
    last = name.rstrip("/").split("/")[-1].lower()
    return ALIASES.get(last, last)


def model_hash(model: Any) -> str:
    """sha256 of a model's weights as they are now, and of how they act: in which precision, say."""
    weights = {
        name: tensor if tensor.dtype == torch.float64 else tensor.float()
        for name, tensor in model.state_dict().items()
    }
    acts = {name: getattr(model.config, name, None) for name in ACTS_BY.split()}
    if type(model).__name__ not in OLD_CLASSES:
        acts |= {name: getattr(model.config, name, None) for name in ACTS_BY_TOO.split()}
        acts["buffers"] = tensors_hash(_buffers_of_no_file(model))
    if _rope_type(model.config) in BY_LENGTH:
        acts["max_position_embeddings"] = model.config.max_position_embeddings
    acts["dtype"] = str(model.dtype)
    if by_hand := _set_by_hand(model):
        acts["by hand"] = by_hand
    text = json.dumps(acts, sort_keys=True, default=str) + tensors_hash(weights)
    return hashlib.sha256(text.encode()).hexdigest()


def _buffers_of_no_file(model: Any) -> dict[str, torch.Tensor]:
    """Scales, masks and tables that modules make themselves; rotary frequencies, which may change, apart."""
    kept = model.state_dict().keys()
    return {
        name: held.float()
        for name, held in model.named_buffers()
        if name not in kept and not name.endswith("inv_freq")
    }


def _rope_type(config: Any) -> str:
    given = getattr(config, "rope_parameters", None) or {}
    return str(given.get("rope_type", ""))


def _set_by_hand(model: Any) -> dict[str, str]:
    """What parts of a model in memory say otherwise than those of a model fresh from its config."""
    with torch.device("meta"):
        fresh = dict(type(model)(model.config).named_modules())
    own = dict(model.named_modules())
    found = {
        name: str(acts_by(module))
        for name, module in own.items()
        if name not in fresh or acts_by(module) != acts_by(fresh[name])
    }
    gone = {name: "none" for name in fresh if name not in own}
    return found | gone | _other_frequencies(model, own)


def _other_frequencies(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Rotary frequencies, which no file holds, if they are not those of the config."""
    found = {}
    for name, module in modules.items():
        for key, held in module.named_buffers(recurse=False):
            if not key.endswith("inv_freq"):
                continue
            if key == "inv_freq" and _rope_type(model.config) in BY_LENGTH:
                continue  # those of the row that was last run
            wanted = dict(type(module)(model.config).named_buffers())[key]
            if not torch.allclose(held.cpu().float(), wanted.cpu().float(), rtol=1e-4):
                found[f"{name}.{key}"] = tensors_hash({key: held.float()})
    return found


def acts_by(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """What a module computes besides its weights: its class, and its numbers and names."""
    simple = {
        name: value
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str) and not name.startswith("_")
    }
    return type(module).__qualname__, {n: v for n, v in simple.items() if n != "training"}


def keep_hash(model: Any, location: str, before: list[str]) -> None:
    """Keep the hash of a model that was just loaded from `location`, if that is a folder.

    `before` is the folder's state as loading began: one that changed meanwhile is not kept.
    """
    if before and before == folder_state(location) and kept_hash(location, model.dtype) is None:
        held = {"state": before, "hash": model_hash(model)}
        _keep({**_kept(), _key(location, model.dtype): held})


def kept_hash(location: str | None, dtype: torch.dtype = torch.float32) -> str | None:
    """The hash of a folder that was loaded before, in `dtype`, and has not changed since."""
    if location is None or not Path(location).is_dir():
        return None
    kept = _kept().get(_key(location, dtype), {})
    return str(kept["hash"]) if kept.get("state") == folder_state(location) else None


def _key(location: str, dtype: torch.dtype) -> str:
    return f"{Path(location).resolve()} {dtype}"


def folder_state(location: str) -> list[str]:
    """Names, sizes and times of all files of a folder, those of folders within it too; empty without one."""
    folder = Path(location)
    files = {
        path.relative_to(folder): path.stat()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    # What copies a file's time with it (cp -p, rsync) cannot set when it did so.
    return [f"{name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in files.items()]


def _kept() -> dict[str, Any]:
    try:
        kept = json.loads((cache_folder() / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(kept: dict[str, Any]) -> None:
    try:
        with new_file(cache_folder() / HASHES) as temporary:
            temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    except InputError:
        pass  # a home that cannot be written costs a hash, not a run
