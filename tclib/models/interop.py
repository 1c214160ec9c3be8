"""TransformerLens's names for what tclib calls sites, and its models.

    mlp_in    blocks.L.ln2.hook_normalized    the norm's output without gain and bias
    mlp_out   blocks.L.hook_mlp_out           what is added to the stream (behind a norm, where one follows)
    resid_mid blocks.L.hook_resid_mid         the stream in front of the norm

Other names that look alike mean other things: `mlp.hook_in` is the norm's output with gain and bias,
`hook_mlp_in` the stream in front of the norm, in a copy that the attention of a parallel block does not share.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor

from tclib.support.declared import shown
from tclib.support.errors import InputError, first_line

HOOKS = {
    "mlp_in": "ln2.hook_normalized",
    "mlp_out": "hook_mlp_out",
    "resid_mid": "hook_resid_mid",
}
HOOK_NAME = re.compile(r"blocks\.(\d{1,6})\.(.+)")
OTHERS = {
    "mlp.hook_in": "the norm's output with its gain and bias",
    "hook_mlp_in": "the stream in front of the norm",
    "mlp.hook_out": "what the MLP puts out, in front of a norm where one follows",
}
WRAPPED = "._original_component"
SAME_LOGITS = 1e-3  # of the largest, of two ways to run one model in float32; in half precision a hundred times that


def site_of(hook_name: str) -> tuple[str, int]:
    """Name and layer of the site that a hook of TransformerLens is. Errors: `InputError` for another hook."""
    found = HOOK_NAME.fullmatch(hook_name)
    sites = {hook: name for name, hook in HOOKS.items()}
    if found is None or found[2] not in sites:
        what = f" ({OTHERS[found[2]]})" if found is not None and found[2] in OTHERS else ""
        expected = " or ".join(f"blocks.0.{hook}" for hook in sites)
        raise InputError(f"hook {shown(hook_name)}{what} is no site: expected {expected}")
    return sites[found[2]], int(found[1])


def hook_of(name: str, layer: int) -> str:
    """What TransformerLens calls a site."""
    return f"blocks.{layer}.{HOOKS[name]}"


def boot(location: str, device: torch.device) -> Any:
    """TransformerLens's bridge of a model on disk, in compatibility mode, in which its sites are the processed ones.

    Errors: `InputError` for a model that TransformerLens cannot boot.
    """
    from transformer_lens.model_bridge import TransformerBridge

    try:
        bridge = TransformerBridge.boot_transformers(location, device=str(device))
        bridge.enable_compatibility_mode()
    except Exception as error:  # of all kinds: it asserts, and looks up
        raise InputError(
            f"TransformerLens cannot boot {location} ({type(error).__name__}: {first_line(error)})"
        ) from error
    return bridge


@torch.no_grad()
def plain_model(bridge: Any) -> tuple[Any, Any, str]:
    """The transformers model that a `TransformerBridge` wraps, its tokenizer and its name; the bridge stays as it is.

    Weights are copied: what is done to one is not done to the other. Errors: `InputError` for anything else, for a
    bridge without a tokenizer, or whose weights do not give its logits in transformers' own class (processed ones).
    """
    if type(bridge).__name__ != "TransformerBridge":
        raise InputError(
            f"{shown(bridge)}: expected a TransformerBridge (TransformerBridge.boot_transformers(...)); for a "
            "model of transformers take LanguageModel(model, tokenizer)"
        )
    name = str(bridge.cfg.model_name)
    if bridge.tokenizer is None:
        raise InputError(f"the bridge of {name} has no tokenizer: boot it with one")
    if getattr(bridge, "compatibility_mode", False):
        raise InputError(_processed(name))
    wrapped = bridge.original_model
    held = {key.replace(WRAPPED, ""): weight for key, weight in wrapped.state_dict().items()}
    weight = next(iter(held.values()))
    # In its own type from the start: rotary frequencies stay in float32 whatever that is.
    model = type(wrapped)._from_config(copy.deepcopy(wrapped.config), dtype=weight.dtype)
    try:
        model.load_state_dict({k: held[k].clone() for k in model.state_dict() if k in held})
    except RuntimeError as error:
        raise InputError(_processed(name)) from error
    model = model.to(weight.device).eval()
    if not _gives_logits_of(bridge, model):
        raise InputError(
            f"the bridge of {name} does not give the logits of its weights in transformers: weights were folded into "
            f"others, or TransformerLens runs it in another way; take LanguageModel.load({name!r})"
        )
    return model, bridge.tokenizer, name


def _processed(name: str) -> str:
    return (
        f"the weights of the bridge of {name} are not those of its class in transformers (enable_compatibility_mode "
        f"folds norms into them): take LanguageModel.from_transformer_lens before that, or LanguageModel.load({name!r})"
    )


def _gives_logits_of(bridge: Any, model: Any) -> bool:
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    own: Tensor = model(ids, use_cache=False).logits
    theirs = bridge(ids, return_type="logits", prepend_bos=False)
    apart = (own - theirs).abs().max() / own.abs().max()
    return bool(apart <= (SAME_LOGITS if own.dtype == torch.float32 else 100 * SAME_LOGITS))
