"""Does the model do what a graph predicts? Features are really taken out of the running model.

The graph's edges hold with attention, norms and other features frozen; the model freezes nothing. Taking
feature i at a token out of the real MLP's output (minus z d) moves a root by some amount, beside which stand
predictions to first order (`derivatives`): minus the graph's total effect over all paths, in which norms are
frozen; the same with the norms' derivative in it; with the real MLPs' as well; and activation times gradient
in the running model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.derivatives import (
    FOLLOWS,
    Follow,
    predicted_changes,
    root_gradients,
    written_by,
)
from tclib.circuits.frozen import FrozenPrompts, ReadSite, Target, read_running
from tclib.circuits.graph import AttributionGraph, total_effects
from tclib.support.checked import checked
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import slope_through_origin, spearman

ROWS_PER_FORWARD = 32
PREDICTIONS: dict[Follow, str] = {
    "frozen norms": "predicted_frozen",
    "norms follow": "predicted_norms",
    "MLPs follow": "predicted_mlps",
    "everything": "predicted_gradient",
}


@torch.no_grad()
def ablated_values(
    frozen: FrozenPrompts, features: pd.DataFrame, root: Target
) -> Float[np.ndarray, "feature"]:
    """The root's value in the running model with each feature (layer, pos, feature, activation) taken out.

    One row of a batch a feature: z d is subtracted from the MLP's output at its token. Nothing is frozen;
    what lies below the feature's layer is as it was, and not run again.
    """
    found = np.zeros(len(features))
    lm, (n_pos, d_model) = frozen.lm, frozen.cache.final_in.shape[1:]
    for layer, rows in progress(list(_batches(features["layer"].to_numpy())), "ablations"):
        lines = features.iloc[rows]
        removed = frozen.cache.final_in.new_zeros(len(rows), n_pos, d_model)
        removed[range(len(rows)), lines["pos"].tolist()] = written_by(frozen, layer, lines)
        tokens = frozen.cache.tokens[root.prompt].expand(len(rows), -1)
        first = min(layer, root.site.layer)
        stream = _stream_into_block(frozen, first, root.prompt).expand(len(rows), -1, -1)
        with lm.override_mlp(layer, partial(_minus, removed)), lm.start_at(first, stream):
            read = read_running(lm, tokens, root.site, root.pos)
        found[rows] = (root.constant + read @ root.direction).double().cpu().numpy()
    return found


def _batches(layers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Places of the features of one layer, a batch at a time."""
    for layer in sorted(set(layers.tolist())):
        places = (layers == layer).nonzero()[0]
        for start in range(0, len(places), ROWS_PER_FORWARD):
            yield layer, places[start : start + ROWS_PER_FORWARD]


def _stream_into_block(frozen: FrozenPrompts, layer: int, prompt: int) -> Tensor:
    """What enters a block, centred: nothing reads the rest."""
    scale = ReadSite("attention", layer).scale(frozen.cache)[prompt]
    return frozen.cache.attention_in[layer][prompt] * scale[:, None]


def _minus(vectors: Tensor, _mlp_in: Tensor, mlp_out: Tensor) -> Tensor:
    return mlp_out - vectors


@checked
def ablation_table(frozen: FrozenPrompts, graph: AttributionGraph, root: Target) -> pd.DataFrame:
    """Every feature of the graph, with predicted and measured change of the root when it is taken out.

    Columns: name, layer, pos, feature, activation, predicted_frozen, predicted_norms, predicted_mlps,
    predicted_gradient (see `derivatives`), actual. The graph must explain `root` alone, and have a feature. Errors:
    `InputError` otherwise.
    """
    names = graph.nodes["name"][graph.is_root].tolist()
    if names != [root.name]:
        raise InputError(f"the graph explains {names}: expected {[root.name]} alone")
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    if features.empty:
        raise InputError("no feature is active on the prompt: expected transcoders less sparse")
    table = features[["name", "layer", "pos", "feature", "activation"]]
    changes = {PREDICTIONS["frozen norms"]: -total_effects(graph)[table.index]}
    for follow in FOLLOWS[1:]:
        gradients = root_gradients(frozen, root, follow)
        changes[PREDICTIONS[follow]] = predicted_changes(frozen, table, gradients)
    changes["actual"] = ablated_values(frozen, table, root) - frozen.value(root)
    return table.assign(**changes)


def prediction_table(ablations: pd.DataFrame) -> pd.DataFrame:
    """How well each prediction does, layer by layer and over all of them.

    Columns: layer ("all" last), follows, n_features, rank_correlation (Spearman's), slope (measured over
    predicted, through the origin, by least absolute deviations: 1 is exact), median_change and median_miss
    (of magnitudes). `ablations` is what `ablation_table` gives.
    """
    groups = [(str(layer), lines) for layer, lines in ablations.groupby("layer")]
    found = []
    for layer, lines in [*groups, ("all", ablations)]:
        actual = lines["actual"].to_numpy()
        for follows, column in PREDICTIONS.items():
            predicted = lines[column].to_numpy()
            found.append(
                {
                    "layer": layer,
                    "follows": follows,
                    "n_features": len(lines),
                    "rank_correlation": spearman(predicted, actual),
                    "slope": slope_through_origin(predicted, actual),
                    "median_change": float(np.median(np.abs(actual))),
                    "median_miss": float(np.median(np.abs(actual - predicted))),
                }
            )
    return pd.DataFrame(found)
