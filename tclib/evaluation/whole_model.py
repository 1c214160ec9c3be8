"""The whole replacement model: every transcoder in its MLP's place at once, one a layer.

Errors of a layer pass through all transcoders above it, so this asks more than each transcoder by itself.
Beside it stand the same MLPs ablated, all at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation import metrics
from tclib.evaluation.evaluate import (
    BOOTSTRAP_SEED,
    UNCHANGED,
    Condition,
    Losses,
    ce_increase,
    losses_under,
    mean_mlp_outs,
)
from tclib.evaluation.replace import replace_site, set_mlp_out
from tclib.models.language_model import LanguageModel
from tclib.support.checked import checked
from tclib.support.declared import Count
from tclib.support.errors import InputError
from tclib.support.statistics import ratio_interval
from tclib.text.corpus import check_disjoint

ORIGINAL, REPLACED, MEAN, ZERO = "original", "replaced", "mean_ablated", "zero_ablated"
COLUMNS = (
    *("condition", "n_layers", "ce", "ce_increase", "ce_increase_low", "ce_increase_high"),
    *("ce_recovered", "kl", "agreement", "n_tokens"),
)


@dataclass(frozen=True)
class WholeModel:
    """One line a condition (`table`), and each row's mean CE under each (`row_ce`, a column each)."""

    table: pd.DataFrame
    row_ce: pd.DataFrame

    @property
    def lines(self) -> dict[str, dict[Hashable, Any]]:
        """The table's lines, by condition."""
        names = self.table["condition"]
        return dict(zip(names, self.table.to_dict("records"), strict=True))

    @property
    def worth(self) -> float:
        """What zero ablation of all the MLPs costs, in nats a token."""
        return float((self.row_ce[ZERO] - self.row_ce[ORIGINAL]).mean())

    def recovered(self) -> tuple[float, float, float]:
        """Share of it that the transcoders bring back, with its 95 % interval over rows: (value, low, high)."""
        part, whole = ((self.row_ce[ZERO] - self.row_ce[name]) for name in (REPLACED, ORIGINAL))
        generator = np.random.default_rng(BOOTSTRAP_SEED)
        return ratio_interval(part.to_numpy(), whole.to_numpy(), generator)


@checked
def evaluate_whole_model(
    lm: LanguageModel,
    dictionaries: Iterable[Dictionary],
    rows: Int[Tensor, "row pos"],
    train_rows: Int[Tensor, "train_row train_pos"] | None = None,
    rows_per_forward: Count = 16,
) -> WholeModel:
    """All dictionaries at once on held-out `rows`, beside the original and the ablated MLPs.

    The table has `COLUMNS`: ce and kl(original‖changed) are in nats a token, agreement is the share of tokens
    at which the most likely next token is the original's, ce_recovered is 1 for the original and 0 for mean
    ablation, ce_increase comes with its 95 % paired bootstrap interval.

    Errors: `InputError` for a dictionary that does not fit the model, none, two of one layer, no rows, or
    rows that were trained on.
    """
    layers = _one_a_layer(lm, dictionaries)
    lm.check_text(rows)
    if train_rows is not None:
        check_disjoint(train_rows, rows)
    conditions = {
        ORIGINAL: UNCHANGED,
        REPLACED: replaced_together(lm, dictionaries),
        MEAN: ablated_together(lm, mean_mlp_outs(lm, layers, rows, rows_per_forward)),
        ZERO: ablated_together(lm, dict.fromkeys(layers)),
    }
    found = losses_under(lm, conditions, rows, rows_per_forward)
    row_ce = pd.DataFrame({name: losses.row_ce for name, losses in found.items()})
    lines = [
        {
            "condition": name,
            "n_layers": 0 if name == ORIGINAL else len(layers),
            **_columns(losses, row_ce),
            "n_tokens": len(rows) * (rows.shape[1] - 1),
        }
        for name, losses in found.items()
    ]
    return WholeModel(pd.DataFrame(lines)[list(COLUMNS)], row_ce)


def replaced_together(lm: LanguageModel, dictionaries: Iterable[Dictionary]) -> Condition:
    """Every dictionary in the place of what it reconstructs, at once."""
    chosen = {d.config.layer: partial(replace_site, lm, d) for d in dictionaries}
    return _together(chosen)


def ablated_together(
    lm: LanguageModel, values: Mapping[int, Float[Tensor, "d_model"] | None]
) -> Condition:
    """The output of each layer's MLP set to a value, or to zero, at once."""
    return _together(
        {layer: partial(set_mlp_out, lm, layer, value) for layer, value in values.items()}
    )


def _together(changes: Mapping[int, partial[AbstractContextManager[None]]]) -> Condition:
    @contextmanager
    def change() -> Iterator[None]:
        with ExitStack() as stack:
            for one in changes.values():
                stack.enter_context(one())
            yield

    return Condition(min(changes), change)


def _one_a_layer(lm: LanguageModel, dictionaries: Iterable[Dictionary]) -> Sequence[int]:
    """The layers of the dictionaries, from the lowest. Errors: `InputError` unless they fit together."""
    layers = []
    for dictionary in dictionaries:
        dictionary.check_model(lm)
        dictionary.check_finite()
        layers.append(dictionary.config.layer)
    if not layers or len(set(layers)) < len(layers):
        raise InputError(
            f"dictionaries of layers {sorted(layers)}: expected one or more, and one a layer"
        )
    return sorted(layers)


def _columns(losses: Losses, row_ce: pd.DataFrame) -> dict[str, float]:
    ce, original, mean_ablated = (
        float(values.mean()) for values in (losses.row_ce, row_ce[ORIGINAL], row_ce[MEAN])
    )
    return {
        "ce": ce,
        "ce_recovered": metrics.ce_recovered(ce, original, mean_ablated),
        "kl": losses.kl,
        "agreement": losses.agreement,
        **ce_increase(losses.row_ce, row_ce[ORIGINAL].to_numpy()),
    }
