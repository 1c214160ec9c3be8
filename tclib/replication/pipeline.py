"""The steps that the notebooks tell: each makes its artifact, or loads it if it is there already.

    00_model_and_data          tokens
    01_train_transcoders       one transcoder a layer, and its training log
    02_sparsity_vs_faithfulness  the sweep of λ and the table behind Figure 3
    03_circuit_tools           a prompt's attribution graph, and how far connections can be read off weights
    04_blind_case_studies      features studied without their text, and graded
    05_interpretability_comparison  transcoder and SAE features, rated blind
    06_greater_than            the circuit, its features' curves, features against neurons
    07_results                 claim, paper, ours, verdict

A step that lacks an earlier one makes it first, so every notebook can be opened by itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tclib.dictionaries import published
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.evaluate import Evaluation, evaluate
from tclib.models.language_model import LanguageModel
from tclib.models.locate import BUNDLED, check_hub_reachable, locate
from tclib.replication import (
    case_studies,
    circuits,
    comparison,
    greater_than,
    greater_than_report,
    published_checks,
    report,
)
from tclib.replication.presets import Preset, load_preset
from tclib.support.runs import (
    MANIFEST,
    InputError,
    Step,
    exclusive,
    file_hash,
    new_file,
    read_manifest,
    write_manifest,
)
from tclib.support.steps import ensure, weight_hashes, write_csv
from tclib.text.corpus import Corpus, build_corpus, bundled_dump, check_disjoint
from tclib.training.train import CACHE, LOG, LOG_COLUMNS, DictionarySpec, TrainingConfig, train

DATA_STEP = "00_model_and_data"
TRANSCODERS_STEP = "01_train_transcoders"
SWEEP_STEP = "02_sparsity_vs_faithfulness"
CHECKS_STEP = "07_published_checks"
RESULTS_STEP = "07_results"


@dataclass(frozen=True)
class Trained:
    """Trained dictionaries by name, their training log, and where they lie."""

    dictionaries: dict[str, Dictionary]
    log: pd.DataFrame
    step: Step


def load_model(preset: Preset) -> LanguageModel:
    """The preset's language model, in float32 on the best device."""
    return LanguageModel.load(preset.model)


def check_ready(preset: Preset) -> None:
    """Raise `InputError`, before anything is written, if the model or the corpus cannot be had."""
    locate(preset.model)
    if (
        preset.transcoders.published
        and not (preset.step(TRANSCODERS_STEP).folder / MANIFEST).is_file()
    ):
        published.locate_published(
            preset.transcoders.published, preset.transcoders.layers or range(12)
        )
    corpus_here = (preset.step(DATA_STEP).folder / MANIFEST).is_file()
    source = preset.corpus.source
    if preset.corpus.kind == "wikipedia" and not corpus_here and not source:
        bundled_dump()
    if preset.corpus.kind == "huggingface" and not corpus_here and not Path(source).exists():
        check_hub_reachable(f"dataset {source!r} is streamed from the Hugging Face hub")


# ---------------------------------------------------------------------------------------------
# 00: tokens


def prepare_corpus(preset: Preset, lm: LanguageModel) -> Corpus:
    """The preset's rows of tokens, built once and then read from the step's folder."""
    step = preset.step(DATA_STEP)
    parameters = {"model": preset.model, "corpus": asdict(preset.corpus)}

    def make() -> Mapping[str, Any]:
        corpus = build_corpus(preset.corpus, lm)
        check_disjoint(corpus.train, corpus.evaluation)
        for name in ("train", "evaluation"):
            with new_file(step.folder / f"{name}.npy") as path, open(path, "wb") as file:
                np.save(file, getattr(corpus, name).numpy(), allow_pickle=False)
        return corpus.summary()

    ensure(step, parameters, {}, make)
    return Corpus(_rows(step, "train"), _rows(step, "evaluation"), lm.bos_id)


def _rows(step: Step, name: str) -> torch.Tensor:
    # Copy on write: torch wants a writable array, and nothing must reach the file.
    return torch.from_numpy(np.load(step.folder / f"{name}.npy", mmap_mode="c"))


def demo_world_card(preset: Preset) -> dict[str, Any]:
    """What a bundled model was trained on, its held-out loss, and the language's entropy bound."""
    return json.loads((BUNDLED[preset.model] / "card.json").read_text())


# ---------------------------------------------------------------------------------------------
# 01: one transcoder a layer


def train_transcoders(preset: Preset, lm: LanguageModel, corpus: Corpus) -> Trained:
    """Notebook 01: transcoders of all layers of the preset, from one harvest, or the released ones."""
    config = preset.transcoders
    if config.published:
        return _released(preset, lm)
    return _trained(preset, TRANSCODERS_STEP, lm, corpus, config.specs(lm), config.training)


def _released(preset: Preset, lm: LanguageModel) -> Trained:
    """The paper's transcoders, checked against the model and kept in the step's folder."""
    step = preset.step(TRANSCODERS_STEP)
    source = preset.transcoders.published
    layers = preset.transcoders.layers or range(lm.n_layers)
    names = {layer: f"transcoder-L{layer}-published" for layer in layers}

    def make() -> Mapping[str, Any]:
        folder = None if source == "hub" else Path(source).expanduser()
        found = published.load_published(layers, folder)
        for dictionary in found.values():
            dictionary.check_model(lm)
        for layer, dictionary in found.items():
            dictionary.save(step.folder / f"{names[layer]}.safetensors")
        return {"n_dictionaries": len(found)}

    ensure(step, {"published": source, "layers": list(layers)}, {"model": preset.model}, make)
    dictionaries = {
        name: Dictionary.load(step.folder / f"{name}.safetensors", step.remedy).to(lm.device)
        for name in names.values()
    }
    return Trained(dictionaries, pd.DataFrame(columns=list(LOG_COLUMNS)), step)


def evaluate_transcoders(
    preset: Preset, lm: LanguageModel, corpus: Corpus, trained: Trained
) -> Evaluation:
    """Notebook 01's table: each layer's transcoder in its MLP's place."""
    return _evaluated(preset, f"{TRANSCODERS_STEP}_evaluation", lm, corpus, trained)


# ---------------------------------------------------------------------------------------------
# 02: the sweep


def train_sweep(preset: Preset, lm: LanguageModel, corpus: Corpus) -> Trained:
    """Notebook 02: transcoders and SAEs of one layer over several λ, from one harvest."""
    lm.check_layer(preset.sweep.layer)
    return _trained(preset, SWEEP_STEP, lm, corpus, preset.sweep.specs(), preset.sweep.training)


def evaluate_sweep(
    preset: Preset, lm: LanguageModel, corpus: Corpus, trained: Trained
) -> Evaluation:
    """The table behind Figure 3, with each dictionary's family and sparsity (λ, λ₀ or k)."""
    evaluation = _evaluated(preset, f"{SWEEP_STEP}_evaluation", lm, corpus, trained)
    specs = {spec.name: spec for spec in preset.sweep.specs()}
    own = [specs[name] for name in evaluation.table["name"]]
    table = evaluation.table.assign(
        family=[spec.family for spec in own], sparsity=[spec.sparsity for spec in own]
    )
    return Evaluation(table, evaluation.row_ce)


def run_sweeps(preset: Preset) -> dict[str, Evaluation]:
    """Everything that Figure 3 needs, made or loaded: this preset's sweep and its companions'."""
    presets = [preset, *(companion(preset, name) for name in preset.companions)]
    return {f"{p.model}, layer {p.sweep.layer}": _run_sweep(p) for p in presets}


def companion(preset: Preset, name: str) -> Preset:
    """Preset `name` with this preset's seed and folder of runs."""
    own_seed = load_preset(name).seed
    seed = None if preset.seed == own_seed else preset.seed
    return load_preset(name, seed, preset.runs_dir)


def _run_sweep(preset: Preset) -> Evaluation:
    lm = load_model(preset)
    corpus = prepare_corpus(preset, lm)
    return evaluate_sweep(preset, lm, corpus, train_sweep(preset, lm, corpus))


# ---------------------------------------------------------------------------------------------
# Training and evaluating, once


def _trained(
    preset: Preset,
    step_name: str,
    lm: LanguageModel,
    corpus: Corpus,
    specs: list[DictionarySpec],
    training: TrainingConfig,
) -> Trained:
    step = preset.step(step_name)
    parameters = {"specs": [asdict(spec) for spec in specs], "training": asdict(training)}
    inputs = {"model": preset.model, "corpus": corpus.content_hash}

    def make() -> Mapping[str, Any]:
        train(lm, corpus.train, specs, training, step.folder, preset.folder / CACHE)
        return {"n_dictionaries": len(specs)}

    ensure(step, parameters, inputs, make)
    dictionaries = {
        spec.name: Dictionary.load(step.folder / f"{spec.name}.safetensors", step.remedy).to(
            lm.device
        )
        for spec in specs
    }
    return Trained(dictionaries, pd.read_csv(step.folder / LOG), step)


def _evaluated(
    preset: Preset, step_name: str, lm: LanguageModel, corpus: Corpus, trained: Trained
) -> Evaluation:
    step = preset.step(step_name)
    manifest = read_manifest(trained.step)
    inputs = {"corpus": corpus.content_hash, **manifest["outputs"]}
    inputs.pop(LOG, None)

    rows = corpus.evaluation[: preset.n_evaluation_rows]

    def make() -> Mapping[str, Any]:
        with exclusive(step.folder):
            evaluation = evaluate(lm, trained.dictionaries, rows, corpus.train)
        for name, frame in (("table", evaluation.table), ("row_ce", evaluation.row_ce)):
            write_csv(frame, step, name)
        return {"n_dictionaries": len(trained.dictionaries)}

    ensure(step, {"n_eval_rows": len(rows)}, inputs, make)
    return Evaluation(
        pd.read_csv(step.folder / "table.csv"), pd.read_csv(step.folder / "row_ce.csv")
    )


# ---------------------------------------------------------------------------------------------
# 06: greater-than


def run_greater_than(
    preset: Preset, lm: LanguageModel, corpus: Corpus
) -> greater_than.GreaterThanResults:
    """Notebook 06: find the MLP and the head, train SAEs beside its transcoder, analyse."""
    effects = greater_than.make_components(preset, lm)
    layer = greater_than.chosen_layer(preset, effects)
    transcoders = train_transcoders(preset, lm, corpus).dictionaries
    saes = _task_saes(preset, lm, corpus, layer)
    return greater_than.make_greater_than(preset, lm, effects, transcoders, saes)


def _task_saes(
    preset: Preset, lm: LanguageModel, corpus: Corpus, layer: int
) -> dict[str, Dictionary]:
    specs = preset.greater_than.sae_specs(layer, preset.transcoders)
    if not specs:
        return {}
    training = preset.transcoders.training
    rate = preset.greater_than.sae_learning_rate
    if rate is not None:
        training = replace(training, learning_rate=rate)
    return _trained(preset, greater_than.SAES_STEP, lm, corpus, specs, training).dictionaries


# ---------------------------------------------------------------------------------------------
# 07: results


def make_results(preset: Preset) -> pd.DataFrame:
    """Claim, paper, ours, verdict, from the artifacts of the earlier steps (made where missing)."""
    lm = load_model(preset)
    corpus = prepare_corpus(preset, lm)
    layers = evaluate_transcoders(preset, lm, corpus, train_transcoders(preset, lm, corpus))
    lines: list[report.Line] = []
    if "02" not in preset.skipped:
        lines += [report.sweep_claim(title, one) for title, one in run_sweeps(preset).items()]
    lines += [report.layer_claim(layers), report.dead_feature_claim(layers)]
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
        lines += greater_than_report.greater_than_claims(
            run_greater_than(preset, lm, corpus).summary, preset.model
        )
    table = report.results_table(lines)
    _save_results(preset, table)
    return table


def make_published_checks(preset: Preset) -> pd.DataFrame:
    """Notebook 07 at `gpt2-published`: every figure of data/paper that needs no training, with verdicts.

    Errors: `InputError` at a preset of other transcoders.
    """
    if not preset.transcoders.published:
        raise InputError(f"preset {preset.name} trains its own transcoders: nothing to check")
    lm = load_model(preset)
    corpus = prepare_corpus(preset, lm)
    transcoders = train_transcoders(preset, lm, corpus).dictionaries
    found = run_greater_than(preset, lm, corpus)
    step = preset.step(CHECKS_STEP)
    inputs = {"model": preset.model, "corpus": corpus.content_hash} | weight_hashes(transcoders)

    def make() -> Mapping[str, Any]:
        compared = greater_than_report.greater_than_table(found.summary, found.curves, True)
        by_layer = {d.config.layer: d for d in transcoders.values()}
        table = published_checks.published_table(lm, by_layer, corpus.evaluation, compared)
        write_csv(table, step, "checks")
        return {
            "n_checks": len(table),
            "n_reproduced": int((table["verdict"] == "reproduced").sum()),
        }

    ensure(step, {"n_eval_rows": len(corpus.evaluation)}, inputs, make)
    return pd.read_csv(step.folder / "checks.csv")


def _circuit_claims(preset: Preset, lm: LanguageModel, corpus: Corpus) -> list[report.Line]:
    transcoders = train_transcoders(preset, lm, corpus).dictionaries
    found = circuits.make_circuits(preset, lm, corpus, transcoders)
    return [
        report.closure_claim(found.graph.closure()),
        report.connections_claim(found.connections),
        report.prediction_claim(found.ablations),
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
