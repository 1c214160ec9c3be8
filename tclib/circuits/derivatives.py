"""How a root changes to first order with what an MLP, or a neuron, puts out.

Taking a feature's z d out of the MLP's output at (layer, pos) changes the root by −z d · g, to first order,
where g is the root's gradient there. What follows the change decides what g is; each line adds one thing:

    frozen norms   attention patterns and norm scales stay as they are on the prompt, and later MLPs are their
                   transcoders with errors (opaque ones stay): the graph's own model, so that −z d · g is
                   minus the graph's total effect
    norms follow   norm scales follow the stream that they divide
    MLPs follow    later MLPs are themselves: their own slopes stand in place of the transcoders'
    everything     attention patterns follow too: the running model
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, ReadSite, Target, read_running
from tclib.models.running import ReadPart
from tclib.support.statistics import to_numpy

Follow = Literal["frozen norms", "norms follow", "MLPs follow", "everything"]
FOLLOWS: tuple[Follow, ...] = get_args(Follow)


def root_gradients(
    frozen: FrozenPrompts, root: Target, follow: Follow
) -> Float[Tensor, "layer pos d_model"]:
    """The root's gradient with respect to the output of every MLP, on the root's prompt."""
    shape = (frozen.lm.n_layers, *frozen.cache.final_in.shape[1:])
    added = frozen.cache.final_in.new_zeros(shape, requires_grad=True)
    with torch.enable_grad():
        if follow == "everything":
            value = _running_value(frozen, root, added)
        else:
            value = local_value(frozen, root, added, follow)
        value.backward()
    assert added.grad is not None
    return added.grad


def predicted_changes(
    frozen: FrozenPrompts, features: pd.DataFrame, gradients: Float[Tensor, "layer pos d_model"]
) -> Float[np.ndarray, "feature"]:
    """−z d · g for each feature (layer, pos, feature, activation)."""
    found = np.zeros(len(features))
    layers = features["layer"].to_numpy()
    for layer in sorted(set(layers.tolist())):
        lines = features[layers == layer]
        g = gradients[layer][lines["pos"].tolist()]
        found[layers == layer] = -to_numpy((written_by(frozen, layer, lines) * g).sum(1))
    return found


def written_by(
    frozen: FrozenPrompts, layer: int, features: pd.DataFrame
) -> Float[Tensor, "feature d_model"]:
    """The z d of features (feature, activation) of one layer."""
    feature = torch.tensor(features["feature"].to_numpy(), device=frozen.lm.device)
    written = frozen.transcoders[layer].decoder_rows(feature)
    return torch.tensor(features["activation"].to_numpy()).to(written)[:, None] * written


def neuron_attributions(frozen: FrozenPrompts, root: Target) -> Float[Tensor, "layer pos neuron"]:
    """Activation × gradient of the root in the running model, of the neurons of MLPs with a transcoder."""
    acts: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}

    def watched(layer: int, found: Tensor) -> Tensor:
        acts[layer] = found.detach()
        added[layer] = torch.zeros_like(found, requires_grad=True)
        return found + added[layer]

    with torch.enable_grad(), ExitStack() as stack:
        for layer in frozen.transcoders:
            stack.enter_context(frozen.lm.override_neurons(layer, partial(watched, layer)))
        _read_root(frozen, root).backward()
    grads = {
        layer: acts[layer].new_zeros(()) if a.grad is None else a.grad for layer, a in added.items()
    }
    return torch.cat([acts[layer] * grads[layer] for layer in frozen.transcoders])


def _read_root(frozen: FrozenPrompts, root: Target) -> Float[Tensor, ""]:
    tokens = frozen.cache.tokens[[root.prompt]]
    return root.constant + read_running(frozen.lm, tokens, root.site, root.pos)[0] @ root.direction


def _running_value(
    frozen: FrozenPrompts, root: Target, added: Float[Tensor, "layer pos d_model"]
) -> Float[Tensor, ""]:
    """The root in the running model, with something added to every MLP's output."""
    with ExitStack() as stack:
        for layer, more in enumerate(added):
            stack.enter_context(frozen.lm.override_mlp(layer, partial(_plus, more)))
        return _read_root(frozen, root)


def _plus(more: Tensor, _mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
    return mlp_out + more


def local_value(
    frozen: FrozenPrompts, root: Target, added: Float[Tensor, "layer pos d_model"], follow: Follow
) -> Float[Tensor, ""]:
    """The root with attention patterns frozen, and something added to every MLP's output.

        x   ← x + Σ_h A_h (x̂ W_V + b_V) W_O + b_O              A as on the prompt
        mlp = z W_dec + b_dec (+ x̂ W_skip) + error             z = act(x̂ W_enc + b_enc); opaque: as on the prompt
        x   ← x + mlp + added

    x̂ is P x over the prompt's σ, or over its own if norms follow; mlp is MLP(x̂) if MLPs follow.
    """
    lm, cache, prompt = frozen.lm, frozen.cache, root.prompt
    own_mlp = lambda layer, x_hat, _x: lm.run_mlp(layer, x_hat)  # noqa: E731
    run_mlp = own_mlp if follow == "MLPs follow" else partial(_transcoded, frozen, prompt)

    def normalised(part: ReadPart, layer: int, x: Tensor) -> Tensor:
        site = ReadSite(part, layer)
        norm = site.norm(lm)
        if follow == "frozen norms":
            return norm.centre(x) / site.scale(cache)[prompt, :, None]
        return norm.normalise(x)

    def read(x_hat: Tensor) -> Tensor:
        return root.constant + x_hat[root.pos] @ root.direction

    x = cache.token_embedding[prompt]
    x = x if cache.position_embedding is None else x + cache.position_embedding[prompt]
    for layer in range(lm.n_layers):
        before, x_hat = x, normalised("attention", layer, x)
        if root.site == ReadSite("attention", layer):
            return read(x_hat)
        x = x + _attended(frozen, prompt, layer, x_hat, follow)
        entering = before if lm.is_parallel else x
        x_hat = normalised("mlp", layer, entering)
        if root.site.layer == layer and root.site.part in ("mlp", "resid_mid"):
            return read(x_hat if root.site.part == "mlp" else entering)
        x = x + run_mlp(layer, x_hat, entering) + added[layer]
    return read(normalised("final", lm.n_layers, x))


def _attended(
    frozen: FrozenPrompts, prompt: int, layer: int, x_hat: Tensor, follow: Follow
) -> Tensor:
    weights, pattern = frozen.attention[layer], frozen.cache.pattern[layer][prompt]
    values = torch.einsum("sd,hdk->hsk", x_hat, weights.W_V) + weights.b_V[:, None]
    mixed = torch.einsum("hts,hsk->htk", pattern, values)
    written = torch.einsum("htk,hkd->td", mixed, weights.W_O) + weights.b_O
    behind, scales = frozen.lm.attention_behind(layer), frozen.cache.attention_out_scale
    if behind is None or scales is None or follow == "frozen norms":
        return written
    assert weights.stored_W_O is not None
    # The pattern holds the prompt's 1/σ of the norm behind: take it out, and put the stream's own in.
    sigma = scales[layer][prompt, :, None]
    read = torch.einsum("htk,hkd->td", mixed, weights.stored_W_O) * sigma
    return written * sigma / behind.scale(read)


def _transcoded(frozen: FrozenPrompts, prompt: int, layer: int, x_hat: Tensor, x: Tensor) -> Tensor:
    if layer not in frozen.parts:
        return frozen.cache.mlp_out[layer][prompt]
    parts = frozen.parts[layer]
    read = x if parts.dictionary.config.reads_stream else x_hat
    return parts.dictionary(read).reconstruction + parts.error[prompt]
