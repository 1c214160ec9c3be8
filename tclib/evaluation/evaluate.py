"""The table behind the sparsity-vs-faithfulness figure (paper Section 4.2, Figure 3).

Every dictionary is put in the model's place on the same held-out tokens, beside the original model
and the mean- and zero-ablated MLP. Differences in cross-entropy are paired by row of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation import metrics
from tclib.evaluation.replace import replace_site, set_mlp_out
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.support.checked import checked
from tclib.support.declared import Count
from tclib.support.errors import InputError
from tclib.support.progress import progress
from tclib.support.statistics import bootstrap_means, interval, to_numpy
from tclib.text.corpus import check_disjoint

BOOTSTRAP_SEED = 0


class Condition(NamedTuple):
    """What is done to the model: nothing below `layer` changes while `change()` is active."""

    layer: int
    change: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Evaluation:
    """One line a dictionary (`table`), and each row's mean CE for paired comparisons.

    `row_ce` has a column a dictionary plus `original`, `mean_ablated L<l>`, `zero_ablated L<l>`.
    """

    table: pd.DataFrame
    row_ce: pd.DataFrame


@checked
def evaluate(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    rows: Int[Tensor, "row pos"],
    train_rows: Int[Tensor, "train_row train_pos"] | None = None,
    rows_per_forward: Count = 16,
) -> Evaluation:
    """Evaluate named dictionaries on held-out `rows`.

    Table columns: name, kind, layer, activation, k, n_features, l0, fvu, dead_share, live_share,
    ce, kl (nats a token), ce_original, ce_mean_ablated, ce_zero_ablated, ce_recovered, ce_increase
    (ce − ce_original) with its 95 % paired bootstrap interval, n_tokens.

    Errors: `InputError` for a dictionary that does not fit the model, no dictionaries, no rows, or
    rows that were trained on.
    """
    if not dictionaries:
        raise InputError("nothing to evaluate: expected at least one dictionary")
    lm.check_text(rows)
    for dictionary in dictionaries.values():
        dictionary.check_model(lm)
    if train_rows is not None:
        check_disjoint(train_rows, rows)
    reconstructions = _reconstruction_sums(lm, dictionaries, rows, rows_per_forward)
    conditions = _conditions(lm, dictionaries, rows, rows_per_forward)
    row_ce, kl = _losses(lm, conditions, rows, rows_per_forward)
    lines = [
        _table_line(name, dictionary, reconstructions[name], row_ce, kl[name])
        for name, dictionary in dictionaries.items()
    ]
    return Evaluation(pd.DataFrame(lines), row_ce)


def mean_mlp_outs(
    lm: LanguageModel,
    layers: Sequence[int],
    rows: Int[Tensor, "row pos"],
    rows_per_forward: int = 16,
) -> dict[int, Float[Tensor, "d_model"]]:
    """Mean output of each layer's MLP over all positions of `rows` but BOS."""
    sites = {layer: Site("mlp_out", layer) for layer in layers}
    zero = torch.zeros(lm.d_model, dtype=torch.float64, device=lm.device)
    totals = {layer: zero.clone() for layer in layers}
    n_tokens = 0
    for batch in rows.split(rows_per_forward):
        is_text = (batch != lm.bos_id).to(lm.device)
        acts = lm.read(batch.long(), sites.values())
        for layer, site in sites.items():
            totals[layer] += acts[site][is_text].double().sum(0)
        n_tokens += int(is_text.sum())
    return {layer: (total / n_tokens).float() for layer, total in totals.items()}


@torch.no_grad()
def _reconstruction_sums(
    lm: LanguageModel, dictionaries: Mapping[str, Dictionary], rows: Tensor, rows_per_forward: int
) -> dict[str, metrics.ReconstructionSums]:
    """l0, fvu and firing counts of every dictionary, from one pass over the rows."""
    sums = {name: metrics.ReconstructionSums() for name in dictionaries}
    configs = [d.config for d in dictionaries.values()]
    sites = {site for c in configs for site in (c.input_site, c.output_site)}
    batches = rows.split(rows_per_forward)
    for batch in progress(batches, "reconstruction", unit="batch", leave=False):
        is_text = (batch != lm.bos_id).to(lm.device)
        acts = {site: a[is_text].float() for site, a in lm.read(batch.long(), sites).items()}
        for name, dictionary in dictionaries.items():
            output = dictionary(acts[dictionary.config.input_site])
            y = acts[dictionary.config.output_site]
            sums[name].add(y, output.reconstruction, output.feature_acts)
    return sums


def _conditions(
    lm: LanguageModel, dictionaries: Mapping[str, Dictionary], rows: Tensor, rows_per_forward: int
) -> dict[str, Condition]:
    """What is done to the model under each name: the baselines, then each dictionary."""
    conditions = {"original": Condition(0, nullcontext)}
    layers = sorted({d.config.layer for d in dictionaries.values()})
    means = mean_mlp_outs(lm, layers, rows, rows_per_forward)
    for layer, mean in means.items():
        for how, value in (("mean", mean), ("zero", None)):
            change = partial(set_mlp_out, lm, layer, value)
            conditions[f"{how}_ablated L{layer}"] = Condition(layer, change)
    for name, dictionary in dictionaries.items():
        change = partial(replace_site, lm, dictionary)
        conditions[name] = Condition(dictionary.config.layer, change)
    return conditions


@torch.no_grad()
def _losses(
    lm: LanguageModel, conditions: dict[str, Condition], rows: Tensor, rows_per_forward: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Mean CE of each row under each condition, and mean KL from the original under each."""
    ce: dict[str, list[Tensor]] = {name: [] for name in conditions}
    zero = torch.zeros((), dtype=torch.float64, device=lm.device)
    kl_sums = dict.fromkeys(conditions, zero)
    batches = rows.split(rows_per_forward)
    for batch in progress(batches, "cross-entropy", unit="batch", leave=False):
        tokens = batch.long().to(lm.device)
        original = lm.logits(tokens)
        streams = lm.streams(tokens, {condition.layer for condition in conditions.values()})
        for name, (layer, change) in conditions.items():
            with lm.start_at(layer, streams[layer]), change():
                logits = original if name == "original" else lm.logits(tokens)
            ce[name].append(metrics.next_token_losses(logits, tokens).mean(1))
            kl = metrics.kl_divergence(original[:, :-1], logits[:, :-1])
            kl_sums[name] = kl_sums[name] + kl.double().sum()
    n_predictions = len(rows) * (rows.shape[1] - 1)
    frame = pd.DataFrame({name: to_numpy(torch.cat(parts)) for name, parts in ce.items()})
    return frame, {name: float(total) / n_predictions for name, total in kl_sums.items()}


def _table_line(
    name: str,
    dictionary: Dictionary,
    sums: metrics.ReconstructionSums,
    row_ce: pd.DataFrame,
    kl: float,
) -> dict[str, object]:
    config = dictionary.config
    original = row_ce["original"].mean()
    mean_ablated = row_ce[f"mean_ablated L{config.layer}"].mean()
    ce = row_ce[name].mean()
    increase = (row_ce[name] - row_ce["original"]).to_numpy()
    low, high = interval(bootstrap_means(increase, np.random.default_rng(BOOTSTRAP_SEED)))
    assert sums.n_fired is not None
    return {
        "name": name,
        "kind": config.kind,
        "layer": config.layer,
        "activation": config.activation,
        "k": config.k,
        "n_features": config.n_features,
        "l0": sums.l0,
        "fvu": sums.fvu,
        "dead_share": float(metrics.is_dead(sums.n_fired).double().mean()),
        "live_share": float(metrics.is_live(sums.n_fired, sums.n_tokens).double().mean()),
        "ce": ce,
        "kl": kl,
        "ce_original": original,
        "ce_mean_ablated": mean_ablated,
        "ce_zero_ablated": row_ce[f"zero_ablated L{config.layer}"].mean(),
        "ce_recovered": metrics.ce_recovered(ce, original, mean_ablated),
        "ce_increase": increase.mean(),
        "ce_increase_low": float(low),
        "ce_increase_high": float(high),
        "n_tokens": sums.n_tokens,
    }
