"""Headline figures over training seeds: what one run's intervals, over rows, prompts or features, leave out.

A seed decides the text, the first weights, the order of the data and every draw. `seeds.csv` has a line a claim: each
seed's estimate, their mean with Student's 95 % interval, and the verdict of the mean by the same rule as a run's.

gaps.csv     every seed's gap at equal L0 (Figure 3)
curves.csv   every seed's k-curves (Figure 5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tclib.evaluation.equal_l0 import ce_gap_table
from tclib.figures.seeds import seeds_figure
from tclib.figures.style import save_whole
from tclib.greater_than.kinds import FEATURES, NEURONS
from tclib.replication.presets import Preset, load_preset
from tclib.replication.results import statistics
from tclib.replication.run import Run
from tclib.replication.verdicts import Measured, verdict
from tclib.support.errors import InputError
from tclib.support.places import DATA
from tclib.support.progress import progress
from tclib.support.statistics import student_interval
from tclib.support.steps import MANIFEST, ensure, write_csv

STEP = "08_seeds"
TABLES = ("seeds", "gaps", "curves")


def runs_of(preset: Preset, n_seeds: int) -> list[Run]:
    """The preset's own run and those of the next seeds. Errors: `InputError` for fewer than two."""
    if n_seeds < 2:
        raise InputError(f"seeds {n_seeds}: expected 2 or more, for an interval over them")
    name, first = preset.asked["--preset"], preset.seed
    return [Run(load_preset(name, first + i, preset.runs_dir)) for i in range(n_seeds)]


def make_seeds(preset: Preset, n_seeds: int) -> dict[str, pd.DataFrame]:
    """`TABLES` of that many runs, made where they are missing; no notebook is executed for them."""
    runs, step = runs_of(preset, n_seeds), preset.step(STEP)
    found = {run.preset.seed: _trained(run) for run in progress(runs, "seeds", unit="run")}

    def make() -> Mapping[str, Any]:
        tables = {"seeds": seed_table(found), "gaps": _gaps(runs), "curves": _curves(runs)}
        for name, table in tables.items():
            write_csv(table, step, name)
        figure = seeds_figure(tables["gaps"], tables["curves"])
        save_whole(figure, step.folder / "seeds.png")
        return {"n_seeds": len(runs)}

    estimates = {
        str(seed): {name: [m.estimate, m.low, m.high] for name, m in own.items()}
        for seed, own in found.items()
    }
    ensure(step, {"estimates": estimates}, {}, make)
    return read_seeds(step.folder)


def _trained(run: Run) -> dict[str, Measured]:
    """The statistics that training decides: the model's own behaviour is the same whatever the seed."""
    return {name: one for name, one in statistics(run).items() if name != "behaviour"}


def seed_table(found: Mapping[int, Mapping[str, Measured]]) -> pd.DataFrame:
    """A line a statistic: an estimate a seed, mean, low, high, and the verdicts of the seeds and of the mean."""
    lines = []
    for name in next(iter(found.values())):
        own = {seed: measured[name] for seed, measured in found.items()}
        rule = name.split(" (")[0]
        estimates = np.array([one.estimate for one in own.values()])
        mean, low, high = student_interval(estimates)
        is_applicable = all(one.is_applicable for one in own.values())
        line = {"statistic": name, **{f"seed {s}": one.estimate for s, one in own.items()}}
        line |= {"mean": mean, "low": low, "high": high}
        line["verdicts"] = ", ".join(verdict(rule, one) for one in own.values())
        lines.append({**line, "verdict": verdict(rule, Measured(mean, low, high, is_applicable))})
    return pd.DataFrame(lines)


def _gaps(runs: Sequence[Run]) -> pd.DataFrame:
    """Columns: seed, model, l0, ce_gap, low, high, winner."""
    tables = [
        ce_gap_table(evaluation).assign(seed=run.preset.seed, model=title)
        for run in runs
        for title, evaluation in run.sweeps.items()
    ]
    return pd.concat(tables, ignore_index=True)


def _curves(runs: Sequence[Run]) -> pd.DataFrame:
    """Columns: seed, units, k, value, original."""
    tables = []
    for run in runs:
        found = run.greater_than
        is_main = (found.curves["ranking"] == "variance") & found.curves["units"].isin(
            [FEATURES, NEURONS]
        )
        own = found.curves[is_main][["units", "k", "value"]]
        tables.append(own.assign(seed=run.preset.seed, original=found.summary["original"]))
    return pd.concat(tables, ignore_index=True)


def kept_seeds(preset: Preset) -> Path | None:
    """Where the tables over seeds lie: in the preset's run, or else among the references of the package."""
    name = Path(preset.asked.get("--preset", preset.name)).stem
    places = (preset.step(STEP).folder, DATA / "reference" / name / STEP)
    return next((place for place in places if (place / MANIFEST).is_file()), None)


def read_seeds(folder: Path) -> dict[str, pd.DataFrame]:
    """`TABLES` as they were written."""
    return {name: pd.read_csv(folder / f"{name}.csv") for name in TABLES}
