"""Notebook 01: one transcoder a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tclib.dictionaries import published
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.evaluate import Evaluation, evaluate
from tclib.models.language_model import LanguageModel
from tclib.replication.paper import paper_table
from tclib.replication.presets import Preset
from tclib.replication.verdicts import Line, claim_line
from tclib.support.files import exclusive
from tclib.support.steps import (
    Step,
    ensure,
    read_manifest,
    write_csv,
)
from tclib.text.corpus import Corpus
from tclib.training.log import LOG, LOG_COLUMNS
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.train import CACHE, train


def layer_caption(evaluation: Evaluation) -> str:
    """The caption of notebook 01's figure (Markdown)."""
    table = evaluation.table.sort_values("ce_recovered")
    worst, best = table.iloc[0], table.iloc[-1]
    return (
        "**One transcoder a layer.** *Paper:* twelve GPT-2 transcoders were published; their CE one "
        "layer at a time was not. *Ours:* L0 "
        f"{table['l0'].min():.1f} to {table['l0'].max():.1f}; CE recovered between mean ablation and "
        f"original from {worst['ce_recovered']:.3f} (layer {int(worst['layer'])}) to "
        f"{best['ce_recovered']:.3f} (layer {int(best['layer'])}). *Differs because* a layer whose "
        "MLP hardly matters (mean ablation costs "
        f"{worst['ce_mean_ablated'] - worst['ce_original']:.3f} nats at layer {int(worst['layer'])}) "
        "leaves little to recover, so a small error is a large share of it."
    )


def dead_feature_claim(evaluation: Evaluation) -> Line:
    """The share of features that never fire."""
    dead = evaluation.table["dead_share"]
    published = [
        f"about {int(row['n_dead']) / int(row['n_features']):.0%} ({row['model']} layer {row['layer']})"
        for row in paper_table("dead_features")
        if row["kind"] == "transcoder"
    ]
    return claim_line(
        "Features that never fire on the evaluation set",
        "; ".join(published),
        f"{dead.min():.1%} to {dead.max():.1%} over layers",
        "differs: few features of ours never fire" if dead.max() < 0.05 else "similar",
    )


def layer_claim(evaluation: Evaluation) -> Line:
    """How much of each MLP its transcoder stands in for."""
    table = evaluation.table
    recovered = ", ".join(f"layer {r.layer}: {r.ce_recovered:.3f}" for r in table.itertuples())
    return claim_line(
        "A transcoder stands in for its MLP (CE recovered over mean ablation)",
        "not published per layer",
        recovered,
        "no counterpart",
    )


TRANSCODERS_STEP = "01_train_transcoders"


@dataclass(frozen=True)
class Trained:
    """Trained dictionaries by name, their training log, and where they lie."""

    dictionaries: dict[str, Dictionary]
    log: pd.DataFrame
    step: Step


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
