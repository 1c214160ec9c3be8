"""Families at equal L0 and at equal cost, on planted gaps and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tclib.evaluation.equal_l0 import (
    ce_gap,
    ce_gap_table,
    compared_families,
    cost_table,
    shared_l0,
)
from tclib.evaluation.evaluate import Evaluation
from tclib.replication.sweep import paper_sweep, sweep_claim, who_wins


def synthetic(
    gap: float, noise: float, n_rows: int = 200, worth: float = 0.5, recovered: float = 0.9
) -> Evaluation:
    """Transcoders on ce = 2 − 0.1 log L0, SAEs `gap` above; rows with common and own noise."""
    rng = np.random.default_rng(0)
    lines, row_ce, original = [], {}, 1.0 + rng.normal(0, 1, n_rows)
    for kind, offset, l0s in (("transcoder", 0.0, (5, 20, 80)), ("sae_mlp_out", gap, (4, 30, 60))):
        for l0 in l0s:
            name = f"{kind}{l0}"
            ce = 2.0 - 0.1 * np.log(l0) + offset
            row_ce[name] = original - 1.0 + ce + rng.normal(0, noise, n_rows)
            lines.append(
                {"name": name, "kind": kind, "l0": float(l0), "ce": row_ce[name].mean(), "layer": 1}
            )
    table = pd.DataFrame(lines).assign(ce_recovered=recovered)
    baselines = pd.DataFrame({"original": original, "mean_ablated L1": original + worth})
    return Evaluation(table, pd.DataFrame(row_ce), baselines)


@pytest.mark.parametrize(("gap", "winner"), [(0.02, "transcoder"), (-0.02, "SAE"), (0.0, "tie")])
def test_a_planted_gap_is_found_with_its_sign(gap: float, winner: str) -> None:
    noise = 0.01 if gap else 0.05
    gaps = ce_gap_table(synthetic(gap, noise))
    assert set(gaps["winner"]) == {winner}
    assert ((gaps["low"] <= gap) & (gap <= gaps["high"])).all()
    assert gaps["l0"].iloc[0] == pytest.approx(5) and gaps["l0"].iloc[-1] == pytest.approx(60)


def test_the_gap_of_the_published_points_is_the_papers() -> None:
    paper = paper_sweep()
    gaps = ce_gap(paper, np.array([55.069, 109.873]))
    assert gaps.min() > 0.003 and gaps.max() < 0.008


def test_curves_that_share_no_l0_are_not_compared() -> None:
    table = pd.DataFrame(
        {"kind": ["transcoder", "transcoder", "sae_mlp_out"], "l0": [1.0, 2.0, 50.0], "ce": 1.0}
    )
    assert len(shared_l0(table)) == 0
    assert who_wins(pd.DataFrame(columns=["l0", "winner"])) == (
        "the two kinds share no range of L0"
    )


def test_verdicts_follow_the_numbers() -> None:
    assert sweep_claim("x", synthetic(0.02, 0.001))["verdict"] == "reproduced"
    assert sweep_claim("x", synthetic(-0.02, 0.001))["verdict"] == "not reproduced"
    assert sweep_claim("x", synthetic(0.0, 0.001))["verdict"] == "reproduced"  # no less faithful
    assert sweep_claim("x", synthetic(0.0, 0.5))["verdict"] == "no power"


def test_what_is_worth_nothing_or_replaces_nothing_is_no_tie() -> None:
    for changed in ({"worth": 0.005}, {"recovered": 0.3}):
        line = sweep_claim("x", synthetic(0.0, 0.001, **changed))
        assert line["verdict"] == "not applicable"


def test_each_kind_of_sae_is_compared_by_itself() -> None:
    evaluation = synthetic(0.02, 0.001)
    inputs = synthetic(-0.03, 0.001)
    own = inputs.table[inputs.table["kind"] != "transcoder"]
    own = own.assign(kind="sae_mlp_in", name="in " + own["name"])
    both = Evaluation(
        pd.concat([evaluation.table, own], ignore_index=True),
        evaluation.row_ce.join(inputs.row_ce.add_prefix("in ")),
        evaluation.baseline_ce,
    )
    assert set(ce_gap_table(both)["winner"]) == {"transcoder"}
    assert set(ce_gap_table(both, "sae_mlp_in")["winner"]) == {"SAE"}
    assert set(compared_families(both.table)["kind"]) == {"transcoder", "sae_mlp_out"}


def test_costs_are_those_counted_by_hand() -> None:
    evaluation = synthetic(0.02, 0.001)
    wide = evaluation.table["kind"] == "transcoder"
    table = evaluation.table.assign(
        n_features=np.where(wide, 24, 8), family=evaluation.table["kind"]
    )
    (line,) = cost_table(
        Evaluation(table, evaluation.row_ce, evaluation.baseline_ce), d_model=2, n_mlp_parameters=64
    ).to_dict("records")
    # 2 × 2 × 24 weights, 24 + 2 biases; the SAE's 2 × 2 × 8 + 8 + 2, and its MLP's 64
    assert line["parameters"] == pytest.approx((96 + 26) / (32 + 10 + 64))
    l0 = shared_l0(table).mean()
    assert line["flops"] == pytest.approx((4 * 24 + 4 * l0) / (4 * 8 + 4 * l0 + 128))
    assert line["ce_gap"] == pytest.approx(0.02, abs=2e-3) and line["low"] > 0


def test_a_family_that_shares_no_l0_with_the_saes_is_left_out() -> None:
    evaluation = synthetic(0.02, 0.001)
    far = np.where(evaluation.table["kind"] == "transcoder", 1e3, 1.0)
    table = evaluation.table.assign(
        l0=evaluation.table["l0"] * far, n_features=8, family=evaluation.table["kind"]
    )
    assert cost_table(Evaluation(table, evaluation.row_ce, evaluation.baseline_ce), 2, 64).empty
