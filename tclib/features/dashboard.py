"""What a reader sees of one feature (paper Section 4.1): examples in bands, logits, tokens, sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import is_active
from tclib.features import from_weights as weights
from tclib.features.examples import band_shares, check_acts, feature_activations, sample_in_bands
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count
from tclib.support.errors import InputError

CONTEXT = 10  # tokens shown on either side
N_HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class Example:
    """One position with its surroundings; `centre` is its index among the tokens shown."""

    row: int
    pos: int
    activation: float
    band: int
    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    centre: int


@dataclass(frozen=True)
class Dashboard:
    """Everything about one feature that a page shows; plain values only."""

    title: str
    layer: int
    feature: int
    frequency: float
    max_activation: float
    histogram: tuple[tuple[float, float, int], ...]  # low, high, count
    bands: pd.DataFrame
    examples: tuple[Example, ...]
    tables: Mapping[str, pd.DataFrame]


@checked
def build_dashboard(
    lm: LanguageModel,
    dictionary: Dictionary,
    feature: int,
    rows: Int[Tensor, "row pos"],
    earlier: Mapping[int, Dictionary] | None = None,
    acts: Float[Tensor, "row pos"] | None = None,
    n_examples: Count = 50,
) -> Dashboard:
    """The dashboard of one feature on a corpus.

    Args:
        lm, dictionary, feature: whose.
        rows: the corpus.
        earlier: transcoders by layer, for the strongest pullbacks.
        acts: the feature's activations on `rows`, if they are there already.
        n_examples: how many at most; all where the feature fires on fewer tokens.

    Errors: `InputError` for a feature that never fires on these rows.
    """
    if acts is None:
        acts = feature_activations(lm, dictionary, [feature], rows)[0]
    check_acts(acts, rows)
    acts = acts.where(rows != lm.bos_id, 0.0)  # given ones may not have it silenced
    n_tokens = int((rows != lm.bos_id).sum())
    n_fired = int(is_active(acts).sum())
    if n_fired == 0:
        raise InputError(
            f"feature {feature} of layer {dictionary.config.layer} never fires on these "
            f"{n_tokens} tokens: it is dead here; give more rows, or a live feature"
        )
    sampled = sample_in_bands(acts, min(n_examples, n_fired))
    config, lines = dictionary.config, sampled.itertuples(index=False, name=None)
    return Dashboard(
        title=f"{config.kind} feature {feature}, layer {config.layer}",
        layer=config.layer,
        feature=feature,
        frequency=n_fired / n_tokens,
        max_activation=float(acts.max()),
        histogram=_histogram(acts),
        bands=band_shares(acts, n_tokens),
        examples=tuple(_example(lm, rows, acts, *line) for line in lines),
        tables=_tables(lm, dictionary, feature, earlier or {}),
    )


def _histogram(acts: Float[Tensor, "row pos"]) -> tuple[tuple[float, float, int], ...]:
    counts, edges = np.histogram(acts[acts > 0].double().numpy(), N_HISTOGRAM_BINS)
    return tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


def _example(
    lm: LanguageModel,
    rows: Int[Tensor, "row pos"],
    acts: Float[Tensor, "row pos"],
    row: int,
    pos: int,
    activation: float,
    band: int,
) -> Example:
    window = slice(max(0, pos - CONTEXT), min(rows.shape[1], pos + CONTEXT + 1))
    tokens = lm.token_strings(rows[row, window].tolist())
    shown = tuple(acts[row, window].tolist())
    return Example(row, pos, activation, band, tuple(tokens), shown, pos - window.start)


@torch.no_grad()
def _tables(
    lm: LanguageModel, dictionary: Dictionary, feature: int, earlier: Mapping[int, Dictionary]
) -> dict[str, pd.DataFrame]:
    """Token and feature tables, highest first and lowest last; an SAE has only logits."""
    tables = {
        "logits": weights.token_table(lm, weights.direct_logit_attribution(lm, dictionary, feature))
    }
    if dictionary.config.kind != "transcoder":
        return tables
    tables["de-embedding"] = weights.token_table(lm, weights.de_embedding(lm, dictionary, feature))
    if dictionary.config.layer > 0:
        scores = weights.extended_de_embedding(lm, dictionary, feature)
        tables["extended de-embedding"] = weights.token_table(lm, scores)
    for layer, other in sorted(earlier.items(), reverse=True):
        if layer < dictionary.config.layer:
            scores = weights.pullback(lm, dictionary, feature, other)
            tables[f"pullback onto layer {layer}"] = weights.feature_table(scores, 10)
    return tables
