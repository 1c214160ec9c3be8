"""The table behind the sparsity-vs-faithfulness figure (paper Section 4.2, Figure 3).

Every dictionary is put in the model's place on the same held-out tokens, beside the original model
and the mean- and zero-ablated MLP. Differences in cross-entropy are paired by row of the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

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
LOGITS_AT_ONCE = 32_000_000  # 128 MB in float32
COLUMNS = (
    *("name", "kind", "layer", "activation", "k", "n_features", "l0", "fvu", "dead_share"),
    *("live_share", "ce", "kl", "ce_original", "ce_mean_ablated", "ce_zero_ablated"),
    *("ce_recovered", "ce_increase", "ce_increase_low", "ce_increase_high", "n_tokens"),
)
# A condition is one of these and its name, so that no dictionary is taken for a baseline.
DICTIONARY, BASELINE = "dictionary", "baseline"
ORIGINAL = (BASELINE, "original")
Key = tuple[str, str]
K = TypeVar("K", bound=Hashable)


class Condition(NamedTuple):
    """What is done to the model: nothing below `layer` changes while `change()` is active."""

    layer: int
    change: Callable[[], AbstractContextManager[None]]


UNCHANGED = Condition(0, nullcontext)


class Losses(NamedTuple):
    """What a condition costs: each row's mean CE; from the original, KL and the share of equal top tokens.

    CE and KL are in nats a token; all three are over the positions whose next token is known.
    """

    row_ce: Float[np.ndarray, "row"]
    kl: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """One line a dictionary (`table`), and each row's mean CE for paired comparisons.

    `row_ce` has a column a dictionary, `baseline_ce` has `original`, `mean_ablated L<l>` and `zero_ablated
    L<l>`: a dictionary may have any name.
    """

    table: pd.DataFrame
    row_ce: pd.DataFrame
    baseline_ce: pd.DataFrame


@checked
def evaluate(
    lm: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    rows: Int[Tensor, "row pos"],
    train_rows: Int[Tensor, "train_row train_pos"] | None = None,
    rows_per_forward: Count = 16,
) -> Evaluation:
    """Evaluate named dictionaries on held-out `rows`.

    The table has `COLUMNS`: ce and kl are in nats a token, ce_increase (ce − ce_original) comes with its
    95 % paired bootstrap interval.

    Errors: `InputError` for a dictionary that does not fit the model, no dictionaries, no rows, or
    rows that were trained on.
    """
    if not dictionaries:
        raise InputError("nothing to evaluate: expected at least one dictionary")
    lm.check_text(rows)
    for dictionary in dictionaries.values():
        dictionary.check_model(lm)
        dictionary.check_finite()
    if train_rows is not None:
        check_disjoint(train_rows, rows)
    reconstructions = _reconstruction_sums(lm, dictionaries, rows, rows_per_forward)
    conditions = _conditions(lm, dictionaries, rows, rows_per_forward)
    found = losses_under(lm, conditions, rows, rows_per_forward)
    row_ce, baseline_ce = (
        pd.DataFrame({name: losses.row_ce for (of, name), losses in found.items() if of == kind})
        for kind in (DICTIONARY, BASELINE)
    )
    lines = [
        {
            **_own_columns(name, dictionary, reconstructions[name]),
            **_ce_columns(row_ce[name], baseline_ce, dictionary.config.layer),
            "kl": found[DICTIONARY, name].kl,
            "n_tokens": reconstructions[name].n_tokens,
        }
        for name, dictionary in dictionaries.items()
    ]
    return Evaluation(pd.DataFrame(lines)[list(COLUMNS)], row_ce, baseline_ce)


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
) -> dict[Key, Condition]:
    """What is done to the model under each key: the baselines, then each dictionary."""
    conditions = {ORIGINAL: UNCHANGED}
    layers = sorted({d.config.layer for d in dictionaries.values()})
    means = mean_mlp_outs(lm, layers, rows, rows_per_forward)
    for layer, mean in means.items():
        for how, value in (("mean", mean), ("zero", None)):
            change = partial(set_mlp_out, lm, layer, value)
            conditions[BASELINE, f"{how}_ablated L{layer}"] = Condition(layer, change)
    for name, dictionary in dictionaries.items():
        change = partial(replace_site, lm, dictionary)
        conditions[DICTIONARY, name] = Condition(dictionary.config.layer, change)
    return conditions


@torch.no_grad()
def losses_under(
    lm: LanguageModel,
    conditions: Mapping[K, Condition],
    rows: Int[Tensor, "row pos"],
    rows_per_forward: int = 16,
) -> dict[K, Losses]:
    """The losses on `rows` under each condition, beside the unchanged model."""
    found: dict[K, list[Tensor]] = {key: [] for key in conditions}
    batches = rows.split(rows_per_forward)
    for batch in progress(batches, "cross-entropy", unit="batch", leave=False):
        tokens = batch.long().to(lm.device)
        original = lm.hidden(tokens)
        streams = lm.streams(tokens, {condition.layer for condition in conditions.values()})
        hidden = {}
        for key, (layer, change) in conditions.items():
            with lm.start_at(layer, streams[layer]), change():
                hidden[key] = original if change is nullcontext else lm.hidden(tokens)
        for key, losses in _compared(lm, tokens, original, hidden).items():
            found[key].append(losses)
    joined = {key: torch.cat(losses) for key, losses in found.items()}
    means = {key: losses[..., 1:].double().mean((0, 1)).tolist() for key, losses in joined.items()}
    return {key: Losses(to_numpy(joined[key][..., 0].mean(1)), *means[key]) for key in conditions}


def _compared(
    lm: LanguageModel, tokens: Tensor, original: Tensor, hidden: Mapping[K, Tensor]
) -> dict[K, Float[Tensor, "row pos 3"]]:
    """Of what the unembedding reads under each condition: CE, KL from the original, and whether the top token is its.

    Some positions at a time: nothing holds the logits of a batch.
    """
    n_rows, n_predictions = tokens.shape[0], tokens.shape[1] - 1
    targets = tokens[:, 1:].flatten()
    found = {key: original.new_empty(len(targets), 3, dtype=torch.float32) for key in hidden}
    reads = {key: read[:, :-1].flatten(0, 1) for key, read in hidden.items()}
    before = original[:, :-1].flatten(0, 1)
    n_at_once = max(1, LOGITS_AT_ONCE // lm.d_vocab)
    for start in range(0, len(targets), n_at_once):
        some = slice(start, start + n_at_once)
        log_p = lm.unembed(before[some]).float().log_softmax(-1)
        top = log_p.argmax(-1)
        for key, read in reads.items():
            logits = lm.unembed(read[some]).float()
            found[key][some, 0] = cross_entropy(logits, targets[some], reduction="none")
            found[key][some, 1] = metrics.kl_from(log_p, logits)
            found[key][some, 2] = (top == logits.argmax(-1)).float()
    return {key: losses.view(n_rows, n_predictions, 3) for key, losses in found.items()}


def _own_columns(
    name: str, dictionary: Dictionary, sums: metrics.ReconstructionSums
) -> dict[str, object]:
    """What a dictionary is, and how well it reconstructs."""
    config = dictionary.config
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
        "dead_share": sums.dead_share,
        "live_share": float(metrics.is_live(sums.n_fired, sums.n_tokens).double().mean()),
    }


def _ce_columns(own: pd.Series, baseline_ce: pd.DataFrame, layer: int) -> dict[str, object]:
    """The losses with a dictionary in its MLP's place, beside the baselines of its layer."""
    original, mean_ablated, zero_ablated = (
        baseline_ce[name].mean()
        for name in ("original", f"mean_ablated L{layer}", f"zero_ablated L{layer}")
    )
    ce = own.mean()
    return {
        "ce": ce,
        "ce_original": original,
        "ce_mean_ablated": mean_ablated,
        "ce_zero_ablated": zero_ablated,
        "ce_recovered": metrics.ce_recovered(ce, original, mean_ablated),
        **ce_increase(own.to_numpy(), baseline_ce["original"].to_numpy()),
    }


def ce_increase(
    row_ce: Float[np.ndarray, "row"], original: Float[np.ndarray, "row"]
) -> dict[str, float]:
    """The mean increase over the original's CE with its 95 % bootstrap interval, paired by row."""
    increase = row_ce - original
    low, high = interval(bootstrap_means(increase, np.random.default_rng(BOOTSTRAP_SEED)))
    return {
        "ce_increase": float(increase.mean()),
        "ce_increase_low": float(low),
        "ce_increase_high": float(high),
    }
