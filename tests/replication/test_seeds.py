"""Headline figures over seeds: the table by hand, and two small runs made from nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import small_preset

from tclib.replication import seeds
from tclib.replication.presets import Preset, load_preset
from tclib.replication.run import Run
from tclib.replication.verdicts import Measured
from tclib.support.errors import InputError


def test_the_mean_is_judged_by_the_interval_over_seeds() -> None:
    values = {1: 0.80, 2: 0.90, 3: 0.85}
    found = {
        seed: {"kept": Measured(v, v - 0.01, v + 0.01), "harmful (x)": Measured(v - 0.8, -1.0, 1.0)}
        for seed, v in values.items()
    }
    table = seeds.seed_table(found).set_index("statistic")
    kept = table.loc["kept"]
    assert [kept[f"seed {i}"] for i in (1, 2, 3)] == [0.80, 0.90, 0.85]
    assert kept["mean"] == pytest.approx(0.85) and kept["low"] == pytest.approx(
        0.85 - 0.1242, abs=1e-3
    )
    assert kept["verdict"] == "reproduced" and kept["verdicts"].count("reproduced") == 3
    assert table.loc["harmful (x)", "verdict"] == "no power"


def test_one_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seeds 1: expected 2 or more"):
        seeds.runs_of(load_preset("demo"), 1)


@pytest.mark.slow
def test_two_seeds_are_made_and_then_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(name: str, seed: int, runs_dir: Path) -> Preset:
        preset = replace(load_preset(name, seed, runs_dir), runs_dir=tmp_path)
        own = small_preset(tmp_path)
        kept = {"name": preset.name, "seed": preset.seed, "asked": preset.asked}
        training = replace(own.transcoders.training, seed=seed)
        return replace(
            own,
            **kept,
            corpus=replace(own.corpus, seed=seed),
            transcoders=replace(own.transcoders, training=training),
            sweep=replace(own.sweep, training=training),
        )

    monkeypatch.setattr(seeds, "load_preset", small)
    first = small("demo", 42, tmp_path)
    tables = seeds.make_seeds(first, 2)
    table = tables["seeds"].set_index("statistic")
    assert {"seed 42", "seed 43", "mean", "low", "high", "verdict"} <= set(table.columns)
    one = Run(first).greater_than.summary["evidence"]["kept"][0]
    assert table.loc["kept", "seed 42"] == pytest.approx(one)
    assert table.loc["kept", "seed 43"] != table.loc["kept", "seed 42"]
    assert set(tables["curves"]["seed"]) == {42, 43}
    folder = seeds.kept_seeds(first)
    assert folder == first.folder / seeds.STEP and (folder / "seeds.png").is_file()
    written = (folder / "seeds.csv").stat().st_mtime_ns
    seeds.make_seeds(first, 2)
    assert (folder / "seeds.csv").stat().st_mtime_ns == written
