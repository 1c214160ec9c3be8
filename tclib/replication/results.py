"""Notebook 07: claim, paper, ours, verdict, from the artifacts of the earlier notebooks."""

from __future__ import annotations

import pandas as pd

from tclib.models.language_model import LanguageModel
from tclib.replication import case_studies, circuits, comparison
from tclib.replication.circuits import closure_claim, connections_claim, prediction_claim
from tclib.replication.greater_than import greater_than_claims, run_greater_than
from tclib.replication.model_and_data import load_model, prepare_corpus
from tclib.replication.presets import Preset
from tclib.replication.sweep import SWEEP_STEP, run_sweeps, sweep_claim, train_sweep
from tclib.replication.transcoders import (
    TRANSCODERS_STEP,
    dead_feature_claim,
    evaluate_transcoders,
    layer_claim,
    train_transcoders,
)
from tclib.replication.verdicts import Line, results_table
from tclib.support.files import file_hash, new_file
from tclib.support.steps import (
    write_csv,
    write_manifest,
)
from tclib.text.corpus import Corpus

RESULTS_STEP = "07_results"


def make_results(preset: Preset) -> pd.DataFrame:
    """Claim, paper, ours, verdict, from the artifacts of the earlier steps (made where missing)."""
    lm = load_model(preset)
    corpus = prepare_corpus(preset, lm)
    layers = evaluate_transcoders(preset, lm, corpus, train_transcoders(preset, lm, corpus))
    lines: list[Line] = []
    if "02" not in preset.skipped:
        lines += [sweep_claim(title, one) for title, one in run_sweeps(preset).items()]
    lines += [layer_claim(layers), dead_feature_claim(layers)]
    if "03" not in preset.skipped:
        lines += _circuit_claims(preset, lm, corpus)
    if "04" not in preset.skipped:
        transcoders = train_transcoders(preset, lm, corpus).dictionaries
        studies = case_studies.make_case_studies(preset, lm, corpus, transcoders)
        lines.append(case_studies.claim(studies))
    if "05" not in preset.skipped:
        sweep = train_sweep(preset, lm, corpus).dictionaries
        lines += comparison.claims(
            comparison.make_comparison(preset, lm, corpus, sweep), preset.seed
        )
    if "06" not in preset.skipped:
        lines += greater_than_claims(run_greater_than(preset, lm, corpus).summary, preset.model)
    table = results_table(lines)
    _save_results(preset, table)
    return table


def _circuit_claims(preset: Preset, lm: LanguageModel, corpus: Corpus) -> list[Line]:
    transcoders = train_transcoders(preset, lm, corpus).dictionaries
    found = circuits.make_circuits(preset, lm, corpus, transcoders)
    return [
        closure_claim(found.graph.closure()),
        connections_claim(found.connections),
        prediction_claim(found.ablations),
    ]


def _save_results(preset: Preset, table: pd.DataFrame) -> None:
    step = preset.step(RESULTS_STEP)
    write_csv(table, step, "results")
    with new_file(step.folder / "results.md") as path:
        path.write_text(markdown(table))
    tables = {
        name: preset.step(name).folder / "table.csv"
        for name in (f"{TRANSCODERS_STEP}_evaluation", f"{SWEEP_STEP}_evaluation")
    }
    sources = {name: file_hash(path) for name, path in tables.items() if path.is_file()}
    write_manifest(step, {"n_claims": len(table)}, sources, 0.0)


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
