"""What features of one MLP read through a head, and what they promote (paper Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.features.from_weights import Head, direct_logit_attribution, pullback, reading_direction
from tclib.greater_than.components import feature_contributions
from tclib.greater_than.task import GreaterThan
from tclib.models.language_model import LanguageModel
from tclib.support.statistics import ranked

THIRDS = ("early", "middle", "late")
N_LAYER_0_FEATURES = 10  # over which the authors' de-embedding score is summed


def feature_curves(
    frozen: FrozenPrompts,
    task: GreaterThan,
    by_layer: Mapping[int, Dictionary],
    dictionary: Dictionary,
    head: Head,
    features: list[int],
) -> pd.DataFrame:
    """Two curves over the answers for each feature, and what the head really brings (Figure 4).

    Columns: feature, rank, answer, dla (logits a unit of activation, relative to the vocabulary's
    mean), de_embedding (the authors': Σ over the strongest layer-0 features through the head of
    weight × direct de-embedding; NaN without a transcoder at layer 0), exact (what the head brings to
    the pre-activation from the number's token, by prompt; NaN for the digit form's other digits).
    """
    lm, lines = frozen.lm, []
    acts = dictionary.encode(frozen.cache.at(dictionary.config.input_site)[:, -1])
    for rank, feature in enumerate(features, start=1):
        dla = direct_logit_attribution(lm, dictionary, feature)[task.answer_ids]
        score = _authors_de_embedding(lm, by_layer, dictionary, feature, head, task)
        brought = feature_contributions(frozen, dictionary, feature)
        exact = _mean_by_answer(brought[:, head.layer, head.head, task.subject_pos], task)
        activation = _mean_by_answer(acts[:, feature], task)
        for i, answer in enumerate(task.answers):
            lines.append(
                {
                    "feature": feature,
                    "rank": rank,
                    "answer": answer,
                    "dla": float(dla[i]),
                    "de_embedding": float(score[i]),
                    "exact": exact.get(answer, np.nan),
                    "activation": activation.get(answer, np.nan),
                }
            )
    return pd.DataFrame(lines)


def _authors_de_embedding(
    lm: LanguageModel,
    by_layer: Mapping[int, Dictionary],
    dictionary: Dictionary,
    feature: int,
    head: Head,
    task: GreaterThan,
) -> Float[Tensor, "answer"]:
    """Σ over the ten layer-0 features with the largest weight through the head: weight × W_E f_enc."""
    if 0 not in by_layer or head.layer == 0:
        return torch.full((len(task.answers),), float("nan"))
    first = by_layer[0]
    weights = pullback(lm, dictionary, feature, first, head)
    strongest = ranked(weights)[:N_LAYER_0_FEATURES].tolist()
    reads = torch.stack([reading_direction(lm, first, i) for i in strongest])
    return lm.W_E[task.answer_ids] @ reads.T @ weights[strongest]


def _mean_by_answer(values: Float[Tensor, "prompt"], task: GreaterThan) -> dict[int, float]:
    """Mean over the prompts whose number (or tens digit) is each answer."""
    asked = [n if task.form == "years" else n // 10 for n in task.numbers]
    frame = pd.DataFrame({"answer": asked, "value": values.double().cpu().numpy()})
    means = frame.groupby("answer")["value"].mean()
    return {int(answer): float(mean) for answer, mean in zip(means.index, means, strict=True)}


def highest_third(
    curves: pd.DataFrame, feature: int, column: str
) -> tuple[str, tuple[float, float, float]]:
    """Which third of the answers a feature's curve is highest on, and its mean over each (early, middle, late).

    What a curve has in common for all answers changes no probability among them: the thirds say what it prefers.
    A tie, in three decimals, goes to the earlier one.
    """
    own = curves[curves["feature"] == feature].sort_values("answer")[column].to_numpy(float)
    early, middle, late = (float(part.mean()) for part in np.array_split(own, 3))
    highest = int(np.argmax(np.round([early, middle, late], 3)))
    return THIRDS[highest], (early, middle, late)
