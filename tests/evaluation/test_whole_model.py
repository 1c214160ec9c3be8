"""All transcoders at once: exact ones change nothing, one is what `evaluate` says, many are a loop by hand."""

from __future__ import annotations

from contextlib import ExitStack

import pandas as pd
import pytest
import torch
from tiny import random_rows, random_transcoder, relu_gpt2, tiny_lm, unchecked_types

from tclib.evaluation import evaluate as evaluation
from tclib.evaluation import metrics
from tclib.evaluation.evaluate import evaluate, mean_mlp_outs
from tclib.evaluation.replace import replace_mlp, set_mlp_out
from tclib.evaluation.whole_model import COLUMNS, evaluate_whole_model
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError

ROWS = random_rows(10, seed=3)
ROWS[3, 5] = 0  # a BOS in the middle


def test_exact_transcoders_of_all_layers_change_nothing() -> None:
    lm, exact = relu_gpt2()
    found = evaluate_whole_model(lm, exact, ROWS)
    line = found.table.set_index("condition").loc["replaced"]
    assert line["n_layers"] == lm.n_layers == len(exact)
    assert line["ce_increase"] == pytest.approx(0.0, abs=1e-5)
    assert line["kl"] == pytest.approx(0.0, abs=1e-5)
    assert line["agreement"] == 1.0
    assert line["ce_recovered"] == pytest.approx(1.0, abs=1e-4)
    assert found.recovered()[0] == pytest.approx(1.0, abs=1e-4)
    ablated = found.table.set_index("condition").loc[["mean_ablated", "zero_ablated"]]
    assert (ablated["kl"] > 0.01).all() and (ablated["agreement"] < 1).all()


def test_one_dictionary_is_what_evaluate_says(lm: LanguageModel) -> None:
    one = random_transcoder(1, "relu", torch.float32)
    alone = evaluate(lm, {"one": one}, ROWS, rows_per_forward=4).table.iloc[0]
    whole = evaluate_whole_model(lm, [one], ROWS, rows_per_forward=4)
    table = whole.table.set_index("condition")
    for column in (
        "ce",
        "kl",
        "ce_recovered",
        "ce_increase",
        "ce_increase_low",
        "ce_increase_high",
    ):
        assert table.loc["replaced", column] == pytest.approx(alone[column], rel=1e-9), column
    for name in ("original", "mean_ablated", "zero_ablated"):
        assert table.loc[name, "ce"] == pytest.approx(alone[f"ce_{name}"], rel=1e-9)
    assert table.loc["original", ["kl", "agreement", "ce_increase"]].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("logits_at_once", [1, 700, evaluation.LOGITS_AT_ONCE])
def test_many_at_once_are_what_a_loop_by_hand_says(
    lm: LanguageModel, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", logits_at_once)
    every = [random_transcoder(layer, "topk", torch.float32) for layer in (2, 0)]
    found = evaluate_whole_model(lm, every, ROWS, rows_per_forward=3)
    means = mean_mlp_outs(lm, [0, 2], ROWS)
    changes = {
        "original": [],
        "replaced": [replace_mlp(lm, one) for one in every],
        "mean_ablated": [set_mlp_out(lm, layer, mean) for layer, mean in means.items()],
        "zero_ablated": [set_mlp_out(lm, layer) for layer in (0, 2)],
    }
    tokens = ROWS.long()
    original = lm.logits(tokens)
    assert tuple(found.table) == COLUMNS and found.table["condition"].tolist() == list(changes)
    for name, managers in changes.items():
        with ExitStack() as stack:
            for one in managers:
                stack.enter_context(one)
            logits = lm.logits(tokens)
        line = found.table.set_index("condition").loc[name]
        ce = metrics.next_token_losses(logits, tokens).mean(1)
        assert line["ce"] == pytest.approx(float(ce.mean()), rel=1e-5)
        pd.testing.assert_series_equal(
            found.row_ce[name], pd.Series(ce.double().numpy()), rtol=1e-4, check_names=False
        )
        kl = metrics.kl_from(original.log_softmax(-1), logits)[:, :-1].mean()
        assert line["kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
        same = (original.argmax(-1) == logits.argmax(-1))[:, :-1].float().mean()
        assert line["agreement"] == pytest.approx(float(same))
        assert line["ce_increase_low"] <= line["ce_increase"] <= line["ce_increase_high"]


def test_bad_input_is_named() -> None:
    lm = tiny_lm()
    two = [random_transcoder(1, kind, torch.float32) for kind in ("relu", "topk")]
    with unchecked_types():
        with pytest.raises(
            InputError, match=r"layers \[1, 1\]: expected one or more, and one a layer"
        ):
            evaluate_whole_model(lm, two, ROWS)
        with pytest.raises(InputError, match=r"layers \[\]: expected one or more"):
            evaluate_whole_model(lm, [], ROWS)
        with pytest.raises(InputError, match="10 of 10 evaluation rows are training rows"):
            evaluate_whole_model(lm, two[:1], ROWS, train_rows=ROWS)
