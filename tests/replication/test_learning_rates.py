"""The rule that chooses learning rates, on held-out objectives given by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tclib.replication.learning_rates import FACTORS, Held, candidates, chosen_rates, rate_table
from tclib.replication.presets import PRESETS, load_preset
from tclib.training.spec import DictionarySpec

SPEC = DictionarySpec("transcoder", 1, expansion=2, l1_coefficient=1e-3)


def chosen(*given: tuple[float, float, float, float], kind: str = "transcoder") -> float:
    """The rate that is chosen among (rate, mean objective, noise between rows, dead share)."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, 100)
    found = {
        replace(SPEC, kind=kind, learning_rate=rate): Held(
            mean + common + rng.normal(0, noise, 100), 5.0, 0.1, dead
        )
        for rate, mean, noise, dead in given
    }
    table = chosen_rates(found)
    assert table["chosen"].sum() == 1
    return float(table[table["chosen"]]["learning_rate"].iloc[0])


def test_the_best_objective_is_chosen_though_rows_differ_more_than_rates() -> None:
    assert chosen((1e-3, 0.2, 1e-3, 0.0), (2e-3, 0.1, 1e-3, 0.0), (4e-3, 0.3, 1e-3, 0.0)) == 2e-3


def test_of_rates_that_cannot_be_told_apart_the_smallest_is_chosen() -> None:
    assert chosen((1e-3, 0.1, 0.5, 0.0), (2e-3, 0.1, 0.5, 0.0), (4e-3, 9.0, 0.5, 0.0)) == 1e-3


def test_a_rate_that_kills_half_of_the_features_is_not_chosen_unless_all_do() -> None:
    assert chosen((1e-3, 0.3, 1e-3, 0.4), (2e-3, 0.1, 1e-3, 0.5)) == 1e-3
    assert chosen((1e-3, 0.3, 1e-3, 0.6), (2e-3, 0.1, 1e-3, 0.5)) == 2e-3


def test_candidates_are_the_middle_sparsities_at_every_rate() -> None:
    preset = load_preset("demo")
    specs = candidates(preset)
    kinds = [spec.kind for spec in specs]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("transcoder", "sae_mlp_out", "sae_mlp_in"), len(FACTORS)
    )
    assert len({spec.name for spec in specs}) == len(specs)
    sparsities = {spec.sparsity for spec in specs if spec.kind == "transcoder"}
    assert sparsities == {preset.sweep.transcoder_l1[3]}
    rates = sorted(spec.learning_rate or 0.0 for spec in specs[: len(FACTORS)])
    assert rates == pytest.approx([f * preset.sweep.training.learning_rate for f in FACTORS])


@pytest.mark.slow
def test_rates_of_a_small_preset_are_trained_on_a_seed_of_their_own_and_judged(
    tmp_path: Path,
) -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    values["companions"] = []
    values["case_studies"]["n_sae"] = 0
    values["corpus"] |= {"n_train_tokens": 12_800, "n_eval_tokens": 2_560}
    few = {"n_tokens": 5_120, "decay_steps": 0, "warmup_steps": 2}
    values["transcoders"]["training"] |= few
    values["sweep"] |= {"expansion": 2, "token_budgets": [], "sae_mlp_in_l1": []}
    values["sweep"]["training"] = values["transcoders"]["training"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    found = rate_table(str(tmp_path / "small.yaml"), tmp_path / "runs")
    assert found.groupby("kind")["chosen"].sum().to_dict() == {"transcoder": 1, "sae_mlp_out": 1}
    assert len(found) == 2 * len(FACTORS) and (found["above_best"] >= 0).any()
    assert {"small-seed1042", "small"} <= {folder.name for folder in (tmp_path / "runs").iterdir()}
    again = rate_table(str(tmp_path / "small.yaml"), tmp_path / "runs")
    assert again.equals(found)
