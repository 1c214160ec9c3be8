"""Does the model do what a graph predicts? Features are really taken out of the running model.

The graph's edges hold with attention, norms and other features frozen; the model freezes nothing. Taking
feature i at a token out of the real MLP's output (minus z d) moves a root by some amount, beside which stand
two predictions: minus the direct edge, and minus the total effect over all paths. Measured once more with the
norm scales alone frozen, the change shows how much of a miss is the norms' doing.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts, Target, target_values
from tclib.circuits.graph import AttributionGraph, total_effects
from tclib.models.running import ForwardCache
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural
from tclib.support.errors import InputError

ROWS_PER_FORWARD = 32


@torch.no_grad()
def ablated_values(
    frozen: FrozenPrompts, features: pd.DataFrame, root: Target, freeze_norms: bool = False
) -> Float[np.ndarray, "feature"]:
    """The root's value in the running model with each feature (layer, pos, feature) taken out.

    One row of a batch a feature: z d is subtracted from the MLP's output at its token. Nothing is
    frozen, or the norm scales alone.
    """
    found = []
    for start in range(0, len(features), ROWS_PER_FORWARD):
        batch = features.iloc[start : start + ROWS_PER_FORWARD]
        shape = (len(batch), *frozen.cache.final_in.shape[1:])
        removed = {layer: frozen.cache.final_in.new_zeros(shape) for layer in set(batch["layer"])}
        columns = (batch[name] for name in ("layer", "pos", "feature", "activation"))
        for row, (layer, pos, feature, z) in enumerate(zip(*columns, strict=True)):
            removed[layer][row, pos] = z * frozen.transcoders[layer].decoder_direction(feature)
        tokens = frozen.cache.tokens[root.prompt].expand(len(batch), -1)
        with ExitStack() as stack:
            for layer, vectors in removed.items():
                stack.enter_context(frozen.lm.override_mlp(layer, partial(_minus, vectors)))
            if freeze_norms:
                stack.enter_context(frozen.lm.frozen_norms(frozen.cache, root.prompt))
            cache = frozen.lm.cache(tokens)
        if freeze_norms:
            cache = _with_scales(cache, frozen.cache, root.prompt)
        found.append(target_values(cache, root).double().cpu().numpy())
    return np.concatenate(found)


def _with_scales(cache: ForwardCache, frozen: ForwardCache, prompt: int) -> ForwardCache:
    """What roots read, over the frozen scales instead of those of the run."""
    pairs = zip(cache.mlp_in, cache.mlp_scale, frozen.mlp_scale, strict=True)
    mlp_in = [x * (own / kept[prompt])[..., None] for x, own, kept in pairs]
    final_scale = frozen.final_scale[prompt].expand_as(cache.final_scale)
    return replace(cache, mlp_in=mlp_in, final_scale=final_scale)


def _minus(vectors: Tensor, _mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
    return mlp_out - vectors


@checked
def ablation_table(
    frozen: FrozenPrompts,
    graph: AttributionGraph,
    root: Target,
    n_features: Count,
    seed: Natural,
) -> pd.DataFrame:
    """Features of the graph, drawn by seed, with predicted and measured change of the root.

    Columns: name, layer, pos, feature, activation, predicted_direct, predicted_total, actual,
    actual_norms_frozen. The graph must explain `root` alone, and have a feature. Errors: `InputError`
    otherwise.
    """
    names = graph.nodes["name"][graph.is_root].tolist()
    if names != [root.name]:
        raise InputError(f"the graph explains {names}: expected {[root.name]} alone")
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    if features.empty:
        raise InputError("no feature is active on the prompt: expected transcoders less sparse")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(features))[:n_features]
    table = features.iloc[np.sort(chosen)][["name", "layer", "pos", "feature", "activation"]]
    direct = graph.edges[-1].double().numpy()[table.index]
    total = total_effects(graph)[table.index]
    before = frozen.value(root)
    return table.assign(
        predicted_direct=-direct,
        predicted_total=-total,
        actual=ablated_values(frozen, table, root) - before,
        actual_norms_frozen=ablated_values(frozen, table, root, freeze_norms=True) - before,
    )
