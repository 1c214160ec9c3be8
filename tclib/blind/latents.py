"""The demo world's known latents: labelled rows, and which feature stands for which latent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError
from tclib.text import world
from tclib.text.corpus import split_of
from tclib.text.packing import pack

UNLABELLED = -1  # BOS


@dataclass(frozen=True)
class LabelledRows:
    """Rows of held-out demo documents; `label` indexes `names` at every position, −1 at BOS."""

    rows: Int[Tensor, "row pos"]
    label: Int[Tensor, "row pos"]
    names: tuple[str, ...]


def labelled_rows(
    lm: LanguageModel, n_rows: int, n_ctx: int, seed: int, eval_fraction: float = 0.1
) -> LabelledRows:
    """Documents of the evaluation split, packed once as tokens and once as labels.

    Errors: `InputError` if the model's tokenizer does not cut the text as the world's grammar does.
    """
    codes: dict[str, int] = {}
    tokens, labels, n_tokens = [], [], 0
    for document in world.documents(seed):
        if split_of(document.text, eval_fraction) != "evaluation":
            continue
        ids = lm.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) != len(document.labels):
            raise InputError(
                f"{lm.name} cuts a demo document into {len(ids)} tokens, its grammar into "
                f"{len(document.labels)}: known latents need one of the bundled models"
            )
        tokens.append(ids)
        labels.append([codes.setdefault(label, len(codes)) for label in document.labels])
        n_tokens += len(ids) + 1
        if n_tokens > (n_rows + 1) * n_ctx:
            break
    packed = pack(tokens, n_ctx, lm.bos_id, n_rows)
    packed_labels = pack(labels, n_ctx, UNLABELLED, n_rows)
    return LabelledRows(torch.from_numpy(packed), torch.from_numpy(packed_labels), tuple(codes))


def label_scores(
    marked: Bool[Tensor, "item row pos"], labelled: LabelledRows
) -> Float[np.ndarray, "item label"]:
    """F1 of every marked set of positions (a feature's active ones, a predicate's) with every latent."""
    counted = labelled.label != UNLABELLED
    label = labelled.label[counted].long()
    flat = marked[:, counted].double()
    one_hot = torch.nn.functional.one_hot(label, len(labelled.names)).double()
    hits = flat @ one_hot
    sizes = flat.sum(1, keepdim=True) + one_hot.sum(0, keepdim=True)
    return (2 * hits / sizes.clamp(min=1)).numpy()


def recovered_latents(
    f1: Float[np.ndarray, "feature label"], names: tuple[str, ...], threshold: float = 0.5
) -> pd.DataFrame:
    """For each latent: its best feature, that feature's F1, and how many features reach the threshold.

    Columns: latent, best_feature, f1, n_features (that many share it at `threshold` or above).
    """
    best = f1.argmax(0)
    return pd.DataFrame(
        {
            "latent": names,
            "best_feature": best,
            "f1": f1[best, np.arange(len(names))],
            "n_features": (f1 >= threshold).sum(0),
        }
    ).sort_values("f1", ascending=False, ignore_index=True, kind="stable")
