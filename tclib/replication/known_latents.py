"""The demo world's known latents in the comparison: which feature of each kind stands for which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from tclib.blind.latents import LabelledRows, label_scores, labelled_rows, recovered_latents
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import ACTIVE_SHARE
from tclib.features.examples import feature_activations
from tclib.models.language_model import LanguageModel
from tclib.replication.artifacts import Comparison
from tclib.replication.comparison_tables import comparators
from tclib.replication.run import Run

ACTS_AT_ONCE = 2**26  # half a gibibyte in float64
MIN_POSITIONS = 50  # of a latent that is looked for


def latent_scores(
    run: Run, matched: Mapping[str, Dictionary]
) -> tuple[dict[str, Float[np.ndarray, "feature label"]], tuple[str, ...]]:
    """F1 of every feature of every kind with the latents that are common enough; none off the demo world."""
    lm, corpus = run.lm, run.preset.corpus
    if corpus.kind != "demo":
        return {}, ()
    n_rows = run.preset.comparison.n_held_out_rows
    labelled = labelled_rows(lm, n_rows, corpus.n_ctx, corpus.seed, corpus.eval_fraction)
    counts = torch.bincount(
        labelled.label[labelled.label >= 0].long(), minlength=len(labelled.names)
    )
    common = (counts >= MIN_POSITIONS).numpy()
    scores = {
        kind: _all_feature_scores(lm, one, labelled)[:, common] for kind, one in matched.items()
    }
    return scores, tuple(np.array(labelled.names)[common].tolist())


def best_latent(
    f1: Float[np.ndarray, "feature label"] | None, feature: int, names: Sequence[str]
) -> dict[str, Any]:
    """The known latent that a feature stands for best, and its F1."""
    if f1 is None or not names:
        return {"latent": "", "latent_f1": np.nan}
    best = int(f1[feature].argmax())
    return {"latent": names[best], "latent_f1": float(f1[feature, best])}


def latents_table(
    f1: Mapping[str, Float[np.ndarray, "feature label"]], names: tuple[str, ...]
) -> pd.DataFrame:
    """`recovered_latents` of every kind; empty off the demo world."""
    columns = ["kind", "latent", "best_feature", "f1", "n_features"]
    tables = [recovered_latents(own, names).assign(kind=kind) for kind, own in f1.items()]
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )


def _all_feature_scores(
    lm: LanguageModel, dictionary: Dictionary, labelled: LabelledRows
) -> Float[np.ndarray, "feature label"]:
    """F1 of every feature with every latent; the model reads the rows once for as many features as fit."""
    found = []
    at_once = max(1, ACTS_AT_ONCE // labelled.rows.numel())
    for start in range(0, dictionary.config.n_features, at_once):
        features = range(start, min(start + at_once, dictionary.config.n_features))
        acts = feature_activations(lm, dictionary, features, labelled.rows)
        largest = acts.amax((1, 2), keepdim=True)
        found.append(label_scores((acts > ACTIVE_SHARE * largest) & (largest > 0), labelled))
    return np.concatenate(found)


def latent_summary(comparison: Comparison) -> pd.DataFrame:
    """How many latents each kind recovers, and how many of its features share one."""
    return comparison.latents.groupby("kind").agg(
        latents=("latent", "size"),
        mean_f1=("f1", "mean"),
        recovered=("f1", lambda f1: int((f1 >= 0.5).sum())),
        features_sharing=("n_features", "mean"),
    )


def latent_differences(comparison: Comparison) -> pd.DataFrame:
    """F1 of each latent's best feature by kind, and the transcoder's less each SAE's."""
    wide = comparison.latents.pivot(index="latent", columns="kind", values="f1")
    less = {f"less {kind}": wide["transcoder"] - wide[kind] for kind in comparators(comparison)}
    return wide.assign(**less).sort_values(next(iter(less)))
