"""Notebook 07: claim, paper, ours, verdict, from the artifacts of the earlier notebooks."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from tclib.replication import (
    case_studies,
    circuits,
    comparison,
    greater_than,
    sweep,
    transcoders,
)
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, Measured, results_table
from tclib.support.files import file_hash, new_file
from tclib.support.steps import MANIFEST, Step, read_manifest, write_csv, write_manifest

STEP = "07_results"
NOTEBOOKS = {
    "02": sweep,
    "01": transcoders,
    "03": circuits,
    "04": case_studies,
    "05": comparison,
    "06": greater_than,
}  # in the order of the table
MEASURED = {
    "02": sweep,
    "01": transcoders,
    "04": case_studies,
    "05": comparison,
    "06": greater_than,
}


def make_results(run: Run) -> pd.DataFrame:
    """Claim, paper, ours, verdict, from the artifacts of the earlier steps (made where missing)."""
    lines: list[Line] = []
    for number, notebook in NOTEBOOKS.items():
        if run.tells(number):
            lines += notebook.claims(run)
    table = results_table(lines)
    step, text = run.step(STEP), markdown(table)
    names = (transcoders.EVALUATION_STEP, sweep.EVALUATION_STEP)
    tables = {name: run.step(name).folder / "table.csv" for name in names}
    sources = {name: file_hash(path) for name, path in tables.items() if path.is_file()}
    if not _is_written(step, text, sources):
        write_csv(table, step, "results")
        with new_file(step.folder / "results.md") as path:
            path.write_text(text, encoding="utf-8")
        write_manifest(step, {"n_claims": len(table)}, sources, 0.0)
    return table


def statistics(run: Run) -> dict[str, Measured]:
    """The statistic of every claim that a rule decides, by the rule's name (and the model, of several)."""
    found: dict[str, Measured] = {}
    for number, notebook in MEASURED.items():
        if run.tells(number):
            found |= notebook.measured(run)
    return found


def _is_written(step: Step, text: str, sources: Mapping[str, str]) -> bool:
    """Whether the step holds these results: a finished run may lie where nothing can be written."""
    place = step.folder / "results.md"
    if not (step.folder / MANIFEST).is_file() or not place.is_file():
        return False
    return place.read_text(encoding="utf-8") == text and read_manifest(step)["inputs"] == sources


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
