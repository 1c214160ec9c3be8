"""Is a circuit enough, and is it needed? Circuits are kept alone in the running model, and taken out of it.

A *circuit* is a set of features (layer, token, feature) among those active on the prompt. It is kept alone
when every MLP that has a transcoder puts out, at each token,

    Σ_{i in the circuit} z_i d_i + b_dec (+ x W_skip) (+ error)         z_i = act(x f_i + b_i)

where x is what the MLP reads in that very run: nothing is frozen, kept features follow what the others leave
of the stream, and attention and MLPs without a transcoder run as they are. All features outside the circuit
are zero-ablated at every token, those too that were silent on the prompt (so the competition of topk, among
what is left, is won by all). It is taken out when all other active features are kept alone. The error, what
the transcoder misses on the prompt, is a constant; results are given with it and without it: with it, all
active features together are the model itself, without it the features must do by themselves.

*Neuron circuits* are sets of (layer, token, neuron) of the same MLPs, all others zero-ablated; their MLPs put
out Σ a_i w_i + b_out. There is nothing that neurons miss.

    score = gain / whole,   gain = value − value of the empty circuit,   whole = value of the full one − the same

of the same kind of unit, with or without errors: 0 is what biases (and errors) do alone, 1 is everything. Over
several prompts it is Σ gain / Σ whole, which no single prompt with hardly a whole can blow up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.circuits.derivatives import neuron_attributions, predicted_changes, root_gradients
from tclib.circuits.frozen import FrozenPrompts, Target, read_running
from tclib.circuits.graph import AttributionGraph
from tclib.circuits.interventions import ROWS_PER_FORWARD
from tclib.dictionaries.dictionary import Dictionary, activate
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import interval, ratio_interval, to_numpy

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000)
Metric = Callable[[Float[Tensor, "circuit d_model"]], Float[Tensor, "circuit"]]
Alone = Callable[[Bool[Tensor, "circuit *unit"]], AbstractContextManager[None]]


class Ranking(NamedTuple):
    """An order of units, by name; its first k units make a circuit, as do as many as the pruned graph has."""

    kind: str
    draw: int
    order: Int[np.ndarray, "unit"]
    ks: Sequence[int]
    n_pruned: int


# ---------------------------------------------------------------------------------------------
# Circuits in the running model


@contextmanager
def features_alone(
    frozen: FrozenPrompts,
    features: pd.DataFrame,
    keep: Bool[Tensor, "circuit feature"],
    with_errors: bool,
    prompt: int = 0,
) -> Iterator[None]:
    """While active, row b of a batch (the prompt, repeated) runs with the features of keep[b] alone.

    `features` are the active ones: layer, pos, feature. MLPs without a transcoder run.
    """
    layers = features["layer"].to_numpy()
    with ExitStack() as stack:
        for layer, parts in frozen.parts.items():
            here = layers == layer
            column, units = pd.factorize(features["feature"][here], sort=True)
            mask = keep.new_zeros(len(keep), frozen.n_pos, len(units))
            mask[:, features["pos"][here].tolist(), column.tolist()] = keep[
                :, here.nonzero()[0].tolist()
            ]
            error = parts.error[prompt] if with_errors else None
            stand_in = partial(_kept_output, parts.dictionary, units.tolist(), mask, error)
            reads_stream = parts.dictionary.config.reads_stream
            stack.enter_context(frozen.lm.stand_in_for_mlp(layer, stand_in, reads_stream))
        yield


def _kept_output(
    dictionary: Dictionary, units: list[int], mask: Tensor, error: Tensor | None, x: Tensor
) -> Tensor:
    """Σ z d over the features that the mask keeps at each token, with everything that is no feature."""
    threshold = None if dictionary.threshold is None else dictionary.threshold[units]
    kept = torch.tensor(units, dtype=torch.long, device=x.device)
    pre_acts = x @ dictionary.encoder_rows(kept).T + dictionary.b_enc[units]
    z = activate(pre_acts, None, threshold)
    output = (z * mask) @ dictionary.decoder_rows(kept) + dictionary.b_dec
    if dictionary.W_skip is not None:
        output = output + x @ dictionary.W_skip
    return output if error is None else output + error


@contextmanager
def neurons_alone(
    lm: LanguageModel, layers: Sequence[int], keep: Bool[Tensor, "circuit layer pos neuron"]
) -> Iterator[None]:
    """While active, row b of a batch runs with the neurons of keep[b] alone in the MLPs of `layers`."""
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            masked = partial(torch.mul, keep[:, i])
            stack.enter_context(lm.override_neurons(layer, masked))
        yield


@torch.no_grad()
def circuit_readings(
    frozen: FrozenPrompts, root: Target, alone: Alone, keep: Bool[Tensor, "circuit *unit"]
) -> Float[Tensor, "circuit d_model"]:
    """What the root reads (its value is constant + this · u) with each circuit alone, many a forward pass."""
    found = []
    for batch in progress(keep.split(ROWS_PER_FORWARD), "circuits", leave=False):
        tokens = frozen.cache.tokens[root.prompt].expand(len(batch), -1)
        with alone(batch.to(frozen.lm.device)):
            found.append(read_running(frozen.lm, tokens, root.site, root.pos))
    return torch.cat(found)


# ---------------------------------------------------------------------------------------------
# Curves


@checked
def faithfulness_curves(
    frozen: FrozenPrompts,
    graph: AttributionGraph,
    pruned: AttributionGraph,
    root: Target,
    metrics: Mapping[str, Metric],
    n_draws: Count,
    seed: Natural,
) -> pd.DataFrame:
    """Circuits of a prompt kept alone and taken out, over their size.

    Kinds: "graph" (features by influence in the graph), "gradient" (features by size of activation ×
    gradient of the root), "pruned graph" (its features), "random" (active features, `n_draws` orders drawn
    by seed), "neurons" (by size of activation × gradient).

    Args:
        frozen: the prompts.
        graph: the full graph of the root's prompt.
        pruned: what is left of it.
        root: what the graph explains.
        metrics: by name, values of what is read at the root's site and token.
        n_draws: random orders.
        seed: of the orders.

    Columns: errors ("kept", "dropped", "none" of neurons), kind ("all" with k = 0 and all units), draw,
    direction ("keep", "remove"), k, is_pruned_size (as many units as the pruned graph has features), metric,
    value, gain, whole. Errors: `InputError` for a graph without features.
    """
    features = graph.nodes[graph.nodes["kind"] == "feature"]
    if features.empty:
        raise InputError("no feature is active on the prompt: expected transcoders less sparse")
    rankings = _feature_rankings(frozen, features, pruned, root, n_draws, seed)
    found = []
    for errors in ("kept", "dropped"):
        alone = partial(_features_alone, frozen, features, errors == "kept", root.prompt)
        found.append(_curves(frozen, root, metrics, alone, rankings).assign(errors=errors))
    strength = neuron_attributions(frozen, root)
    order, ks = _strongest(to_numpy(strength).ravel()), _sizes(strength.numel())
    ranking = Ranking("neurons", 0, order, ks, rankings[0].n_pruned)
    shape, layers = strength.shape, list(frozen.transcoders)
    alone = partial(_neurons_alone, frozen.lm, layers, shape)
    found.append(_curves(frozen, root, metrics, alone, [ranking]).assign(errors="none"))
    return pd.concat(found, ignore_index=True)


def _features_alone(
    frozen: FrozenPrompts, features: pd.DataFrame, with_errors: bool, prompt: int, keep: Tensor
) -> AbstractContextManager[None]:
    return features_alone(frozen, features, keep, with_errors, prompt)


def _neurons_alone(
    lm: LanguageModel, layers: Sequence[int], shape: Sequence[int], keep: Tensor
) -> AbstractContextManager[None]:
    return neurons_alone(lm, layers, keep.unflatten(1, shape))


def _feature_rankings(
    frozen: FrozenPrompts,
    features: pd.DataFrame,
    pruned: AttributionGraph,
    root: Target,
    n_draws: int,
    seed: int,
) -> list[Ranking]:
    n_features, ks = len(features), _sizes(len(features))
    in_pruned = features["name"].isin(pruned.nodes["name"]).to_numpy()
    n_pruned = int(in_pruned.sum())
    gradients = root_gradients(frozen, root, "everything")
    by_gradient = _strongest(predicted_changes(frozen, features, gradients))
    generator = np.random.default_rng(seed)
    return [
        Ranking("graph", 0, _strongest(features["influence"].to_numpy()), ks, n_pruned),
        Ranking("gradient", 0, by_gradient, ks, n_pruned),
        Ranking("pruned graph", 0, _strongest(in_pruned * 1.0), (), n_pruned),
        *(
            Ranking("random", draw, generator.permutation(n_features), ks, n_pruned)
            for draw in range(n_draws)
        ),
    ]


def _strongest(size: Float[np.ndarray, "unit"]) -> Int[np.ndarray, "unit"]:
    """By magnitude, rounded so that the order does not hang on the last bits; ties by place."""
    largest = np.abs(size).max(initial=0.0) or 1.0
    return np.argsort(-np.round(np.abs(size) / largest, 9), kind="stable")


def _sizes(n_units: int) -> list[int]:
    return [k for k in SIZES if k < n_units]


def _curves(
    frozen: FrozenPrompts,
    root: Target,
    metrics: Mapping[str, Metric],
    alone: Alone,
    rankings: Sequence[Ranking],
) -> pd.DataFrame:
    """Every circuit of the rankings, kept and taken out, and the empty and the full one."""
    lines, masks = _circuits(rankings)
    readings = circuit_readings(frozen, root, alone, torch.tensor(np.stack(masks)))
    table = pd.DataFrame(lines)
    found = []
    for name, metric in metrics.items():
        value = to_numpy(metric(readings))
        empty, full = value[:2]
        measured = table.assign(metric=name, value=value, gain=value - empty, whole=full - empty)
        found.append(measured)
    return pd.concat(found, ignore_index=True)


def _circuits(
    rankings: Sequence[Ranking],
) -> tuple[list[dict[str, object]], list[Bool[np.ndarray, "unit"]]]:
    """Which circuits there are, the empty and the full one first, and what each keeps."""
    n_units = len(rankings[0].order)
    masks = [np.zeros(n_units, dtype=bool), np.ones(n_units, dtype=bool)]
    same = {"draw": 0, "direction": "keep", "is_pruned_size": False}
    lines = [{"kind": "all", "k": k, **same} for k in (0, n_units)]
    for kind, draw, order, ks, n_pruned in rankings:
        rank = np.empty(n_units, dtype=np.int64)
        rank[order] = np.arange(n_units)
        for direction in ("keep", "remove"):
            line = same | {"kind": kind, "draw": draw, "direction": direction}
            sizes = [(k, False) for k in ks] + [(n_pruned, True)]
            lines += [line | {"k": k, "is_pruned_size": is_pruned} for k, is_pruned in sizes]
            masks += [(rank < k) == (direction == "keep") for k, _ in sizes]
    return lines, masks


def faithfulness_summary(curves: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Score over prompts, of circuits that all prompts have.

    `curves` are those of one or several prompts (column `prompt`). Columns: errors, kind, direction, metric,
    is_pruned_size, k (where it is, the mean: pruned graphs differ), n_prompts, value (mean), score, low, high:
    the 2.5 and 97.5 percentiles over random orders, or, for the other kinds, over prompts resampled by seed.
    """
    is_pruned = curves["is_pruned_size"]
    size = round(curves["k"][is_pruned].mean()) if is_pruned.any() else 0
    table = curves.assign(k=curves["k"].mask(is_pruned, size))
    by = ["errors", "kind", "direction", "metric", "is_pruned_size", "k"]
    n_prompts = curves["prompt"].nunique()
    found = []
    for keys, lines in table[table["kind"] != "all"].groupby(by, sort=False):
        if lines["prompt"].nunique() == n_prompts:
            score, low, high = _pooled(lines, seed)
            line = dict(zip(by, keys, strict=True)) | {"n_prompts": n_prompts}
            value = float(lines["value"].mean())
            found.append(line | {"value": value, "score": score, "low": low, "high": high})
    return pd.DataFrame(found)


def _pooled(lines: pd.DataFrame, seed: int) -> tuple[float, float, float]:
    """Σ gain / Σ whole over prompts, of the mean of all orders, and its spread."""
    parts = ["gain", "whole"]
    if lines["draw"].nunique() > 1:
        by_draw = lines.groupby("draw")[parts].sum()
        low, high = interval((by_draw["gain"] / by_draw["whole"]).to_numpy())
        return float(lines["gain"].sum() / lines["whole"].sum()), float(low), float(high)
    gain, whole = (lines[name].to_numpy() for name in parts)
    return ratio_interval(gain, whole, np.random.default_rng(seed))
