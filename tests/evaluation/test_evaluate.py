"""The evaluation table against direct computation, and the report built on it."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tiny import D_MODEL, random_rows, tiny_lm

from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig, new_dictionary
from tclib.evaluation import metrics
from tclib.evaluation.evaluate import COLUMNS, Evaluation, evaluate, mean_mlp_outs
from tclib.evaluation.replace import replace_mlp
from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.replication.transcoders import dead_feature_claim
from tclib.support.errors import InputError

ROWS = random_rows(10, seed=3)
ROWS[3, 5] = 0  # a BOS in the middle


def dictionaries() -> dict[str, Dictionary]:
    generator = torch.Generator().manual_seed(0)
    configs = {
        "tc": DictionaryConfig("transcoder", 1, D_MODEL, D_MODEL, 24),
        "sae": DictionaryConfig("sae_mlp_out", 2, D_MODEL, D_MODEL, 24, "topk", 3),
        "sae_in": DictionaryConfig("sae_mlp_in", 1, D_MODEL, D_MODEL, 24),
    }
    return {name: new_dictionary(config, generator) for name, config in configs.items()}


def test_the_table_equals_direct_computation(lm: LanguageModel) -> None:
    named = dictionaries()
    evaluation = evaluate(lm, named, ROWS, rows_per_forward=3)
    line = evaluation.table.set_index("name").loc["tc"]
    sites = [Site("mlp_in", 1), Site("mlp_out", 1)]
    is_text = ROWS != 0
    mlp_in, mlp_out = (lm.read(ROWS.long(), sites)[site][is_text] for site in sites)
    output = named["tc"](mlp_in)
    assert line["n_tokens"] == int(is_text.sum()) == 149
    assert line["l0"] == pytest.approx(metrics.l0(output.feature_acts), rel=1e-3)
    assert line["fvu"] == pytest.approx(metrics.fvu(mlp_out, output.reconstruction), rel=1e-4)
    with replace_mlp(lm, named["tc"]):
        ce = metrics.next_token_losses(lm.logits(ROWS.long()), ROWS.long()).double().mean().item()
    original = metrics.next_token_losses(lm.logits(ROWS.long()), ROWS.long()).double().mean().item()
    assert line["ce"] == pytest.approx(ce, rel=1e-5)
    assert line["ce_original"] == pytest.approx(original, rel=1e-5)
    assert line["ce_increase_low"] <= line["ce_increase"] <= line["ce_increase_high"]
    assert line["ce_recovered"] == pytest.approx(
        (line["ce_mean_ablated"] - ce) / (line["ce_mean_ablated"] - original), rel=1e-2
    )


def test_it_does_not_depend_on_the_batch_size_or_the_order(lm: LanguageModel) -> None:
    named = dictionaries()
    one = evaluate(lm, named, ROWS, rows_per_forward=4).table.set_index("name")
    reverse = dict(reversed(list(named.items())))
    two = evaluate(lm, reverse, ROWS, rows_per_forward=10).table.set_index("name").loc[one.index]
    pd.testing.assert_frame_equal(one, two[one.columns], rtol=1e-4, atol=1e-6)


def test_mean_ablation_uses_the_mean_over_text(gpt2_lm: LanguageModel) -> None:
    site = Site("mlp_out", 1)
    expected = gpt2_lm.read(ROWS.long(), [site])[site][ROWS != 0].mean(0)
    torch.testing.assert_close(
        mean_mlp_outs(gpt2_lm, [1], ROWS, 3)[1], expected, rtol=1e-4, atol=1e-6
    )


def test_the_original_model_has_no_divergence_from_itself(gpt2_lm: LanguageModel) -> None:
    eye = torch.eye(D_MODEL)
    config = DictionaryConfig("sae_mlp_out", 1, D_MODEL, D_MODEL, 2 * D_MODEL)
    exact = Dictionary(
        config, torch.cat([eye, -eye], 1), torch.zeros(2 * D_MODEL), torch.cat([eye, -eye]),
        torch.zeros(D_MODEL),
    )  # fmt: skip
    line = evaluate(gpt2_lm, {"exact": exact}, ROWS).table.iloc[0]
    assert line["kl"] == pytest.approx(0.0, abs=1e-6)
    assert line["fvu"] == pytest.approx(0.0, abs=1e-9)
    assert line["ce_recovered"] == pytest.approx(1.0, abs=1e-4)


def test_a_dictionary_may_have_the_name_of_a_baseline_and_is_not_taken_for_it(
    gpt2_lm: LanguageModel,
) -> None:
    one = dictionaries()["tc"]
    names = ("tc", "original", "mean_ablated L1", "zero_ablated L1", "baseline", "")
    found = evaluate(gpt2_lm, dict.fromkeys(names, one), ROWS)
    assert found.table["name"].tolist() == list(found.row_ce) == list(names)
    plain = evaluate(gpt2_lm, {"tc": one}, ROWS)
    for _, line in found.table.iterrows():
        assert line.drop("name").equals(plain.table.iloc[0].drop("name"))
    pd.testing.assert_frame_equal(found.baseline_ce, plain.baseline_ce)
    assert list(plain.baseline_ce) == ["original", "mean_ablated L1", "zero_ablated L1"]
    assert tuple(plain.table) == COLUMNS


def test_bad_input_is_named() -> None:
    lm = tiny_lm()
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(lm, {}, ROWS)
    with pytest.raises(InputError, match="not empty"):
        evaluate(lm, dictionaries(), ROWS[:0])
    with pytest.raises(InputError, match="10 of 10 evaluation rows are training rows"):
        evaluate(lm, dictionaries(), ROWS, train_rows=ROWS)
    narrow = new_dictionary(
        DictionaryConfig("transcoder", 0, 4, 4, 8), torch.Generator().manual_seed(0)
    )
    with pytest.raises(InputError, match="dictionary of width 4"):
        evaluate(lm, {"narrow": narrow}, ROWS)


def test_dead_shares_stand_beside_the_published_ones() -> None:
    table = pd.DataFrame({"dead_share": [0.0, 0.01]})
    line = dead_feature_claim(Evaluation(table, pd.DataFrame(), pd.DataFrame()))
    assert line["paper"].startswith("about 11% (gpt2 layer 8); about 51% (pythia-410m layer 15)")
    assert line["ours"] == "0.0% to 1.0% over layers"
