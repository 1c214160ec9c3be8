"""Notebook 01: one transcoder a layer; and how any dictionaries of a run are trained and evaluated once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.published import load_published, locate_published
from tclib.evaluation.evaluate import Evaluation, evaluate
from tclib.evaluation.whole_model import (
    MEAN,
    ORIGINAL,
    REPLACED,
    ZERO,
    WholeModel,
    evaluate_whole_model,
)
from tclib.figures.style import save_figure
from tclib.figures.training import layer_faithfulness, training_curves
from tclib.models.language_model import LanguageModel
from tclib.replication.artifacts import Trained
from tclib.replication.model_and_data import TRANSCODERS_STEP as STEP
from tclib.replication.paper import paper_table
from tclib.replication.run import Run
from tclib.replication.verdicts import Line, Measured, claim_line, decided
from tclib.support.errors import InputError
from tclib.support.files import json_ready, new_file
from tclib.support.paths import expanded
from tclib.support.steps import (
    MANIFEST,
    SOURCE_STATE,
    Step,
    ensure,
    read_manifest,
    source_input,
    source_state,
    write_csv,
)
from tclib.training.log import LOG, LOG_COLUMNS
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.train import CACHE, train

EVALUATION_STEP = f"{STEP}_evaluation"
EVALUATION_TABLES = tuple(field.name for field in fields(Evaluation))
WHOLE_MODEL_STEP = f"{STEP}_whole_model"
WHOLE_MODEL_TABLES = tuple(field.name for field in fields(WholeModel))
PUBLISHED = ("original", "transcoders", "zero-ablated")  # as data/paper calls them
MIN_WORTH = 0.1  # nats a token that the MLPs are worth together, for a verdict


def make_transcoders(run: Run) -> Trained:
    """Transcoders of all layers of the preset, from one harvest, or the released ones."""
    config = run.preset.transcoders
    if config.published:
        return _released(run)
    return train_once(run, STEP, config.specs(run.lm), config.training)


def evaluate_transcoders(run: Run) -> Evaluation:
    """Each layer's transcoder in its MLP's place."""
    return evaluate_once(run, EVALUATION_STEP, run.trained)


def evaluate_all_at_once(run: Run) -> WholeModel:
    """Every transcoder in its MLP's place at the same time, measured if it has not been yet."""
    step, rows = run.step(WHOLE_MODEL_STEP), run.corpus.evaluation[: run.preset.n_evaluation_rows]

    def make() -> Mapping[str, Any]:
        found = evaluate_whole_model(run.lm, run.transcoders.values(), rows, run.corpus.train)
        for name in WHOLE_MODEL_TABLES:
            write_csv(getattr(found, name), step, name)
        return {"n_dictionaries": len(run.transcoders)}

    ensure(step, {"n_eval_rows": len(rows)}, run.inputs(run.trained), make)
    return WholeModel(*(pd.read_csv(step.folder / f"{name}.csv") for name in WHOLE_MODEL_TABLES))


def _released(run: Run) -> Trained:
    """The paper's transcoders, checked against the model and kept in the step's folder."""
    step, config = run.step(STEP), run.preset.transcoders
    source, layers = config.published, config.chosen_layers(run.lm)
    names = dict(zip(layers, config.names(run.lm), strict=True))

    def make() -> Mapping[str, Any]:
        state = source_state(_released_files(run))
        found = load_published("gpt2", layers, None if source == "hub" else expanded(source))
        for dictionary in found.values():
            dictionary.check_model(run.lm)
        for layer, dictionary in found.items():
            dictionary.save(step.folder / f"{names[layer]}.safetensors")
        return {"n_dictionaries": len(found), SOURCE_STATE: state}

    parameters = {"published": source, "layers": layers}
    inputs = {"model": run.model_hash, **released_input(run)}
    manifest = ensure(step, parameters, inputs, make)
    log = pd.DataFrame(columns=list(LOG_COLUMNS))
    return _loaded(run, step, manifest, names.values(), log)


def released_input(run: Run) -> dict[str, str]:
    """`source_input` of the released files, of which the step holds copies; empty where it trains."""
    return source_input(run.step(STEP), _released_files(run))


def _released_files(run: Run) -> list[Path]:
    config = run.preset.transcoders
    try:
        if not config.published:
            return []
        return list(locate_published(config.published, config.layers or None).values())
    except InputError:
        return []


class Teacher(NamedTuple):
    """Another model than the run's, from which dictionaries learn: what it is, and how it is made."""

    what: str
    make: Callable[[], LanguageModel]


def train_once(
    run: Run,
    step_name: str,
    specs: list[DictionarySpec],
    training: TrainingConfig,
    teacher: Teacher | None = None,
) -> Trained:
    """Dictionaries of a step, trained if they are not there yet.

    One that step 01 has trained in the same way is copied from there: it has the same bytes in any company.
    """
    step = run.step(step_name)
    parameters = {"specs": [asdict(spec) for spec in specs], "training": asdict(training)}
    parameters |= {"teacher": teacher.what} if teacher else {}
    inputs = run.inputs()

    def make() -> Mapping[str, Any]:
        cache = run.preset.folder / CACHE
        lm, copied = run.lm, []
        if teacher is None:
            copied = _copy_trained(run.step(STEP), step, parameters, inputs)
        else:
            lm = teacher.make()
        rest = [spec for spec in specs if spec.name not in copied]
        if rest:
            train(lm, run.corpus.train, rest, training, step.folder, cache)
        return {"n_dictionaries": len(specs)}

    manifest = ensure(step, parameters, inputs, make)
    return _loaded(
        run, step, manifest, [spec.name for spec in specs], pd.read_csv(step.folder / LOG)
    )


def _copy_trained(
    done: Step, step: Step, parameters: Mapping[str, Any], inputs: Mapping[str, str]
) -> list[str]:
    """Copy what `done` has trained of the parameters' specs into `step`, with its log; return the names."""
    if step.name == done.name or not (done.folder / MANIFEST).is_file():
        return []
    held, wanted = read_manifest(done), json_ready(parameters)
    same = (
        held["inputs"] == dict(inputs) and held["parameters"].get("training") == wanted["training"]
    )
    shared = [one for one in wanted["specs"] if same and one in held["parameters"]["specs"]]
    names = [DictionarySpec(**one).name for one in shared]
    for name in names:
        with new_file(step.folder / f"{name}.safetensors") as temporary:
            shutil.copyfile(done.folder / f"{name}.safetensors", temporary)
    if names and not (step.folder / LOG).exists():  # else a run that was killed has begun it
        lines = pd.read_csv(done.folder / LOG)
        with new_file(step.folder / LOG) as temporary:
            lines[lines["dictionary"].isin(names)].to_csv(temporary, index=False)
    return names


def _loaded(
    run: Run, step: Step, manifest: Mapping[str, Any], names: Any, log: pd.DataFrame
) -> Trained:
    """What the step's folder holds, whose bytes the manifest has just been held against."""
    dictionaries = {
        name: Dictionary.load(step.folder / f"{name}.safetensors", step.remedy, is_checked=True).to(
            run.lm.device
        )
        for name in names
    }
    hashes = {name: value for name, value in manifest["outputs"].items() if name != LOG}
    return Trained(dictionaries, log, step, hashes)


def evaluate_once(run: Run, step_name: str, trained: Trained) -> Evaluation:
    """The losses of a step's dictionaries, measured if they have not been yet."""
    step = run.step(step_name)
    inputs = {"corpus": run.corpus.content_hash, **trained.hashes}
    rows = run.corpus.evaluation[: run.preset.n_evaluation_rows]

    def make() -> Mapping[str, Any]:
        evaluation = evaluate(run.lm, trained.dictionaries, rows, run.corpus.train)
        for name in EVALUATION_TABLES:
            write_csv(getattr(evaluation, name), step, name)
        return {"n_dictionaries": len(trained.dictionaries)}

    # Runs of earlier versions, which had other tables, are refused.
    parameters = {"n_eval_rows": len(rows), "tables": list(EVALUATION_TABLES)}
    ensure(step, parameters, inputs, make)
    return Evaluation(*(pd.read_csv(step.folder / f"{name}.csv") for name in EVALUATION_TABLES))


# ---------------------------------------------------------------------------------------------
# Figures, words, claims


def training_figure(run: Run) -> Figure:
    """The training log, drawn."""
    return save_figure(training_curves(run.trained.log), run.trained.step, "training_curves")


def layer_figure(run: Run) -> Figure:
    """L0, FVU and recovered cross-entropy by layer."""
    return save_figure(layer_faithfulness(run.layers.table), run.trained.step, "layer_faithfulness")


def layers_in_words(run: Run) -> str:
    """Ours, of notebook 01's figure (Markdown)."""
    table = run.layers.table.sort_values("ce_recovered")
    worst, best = table.iloc[0], table.iloc[-1]
    return (
        f"*Ours:* L0 {table['l0'].min():.1f} to {table['l0'].max():.1f}; CE recovered between mean ablation "
        f"and original from {worst['ce_recovered']:.3f} (layer {int(worst['layer'])}, whose mean ablation "
        f"costs {worst['ce_mean_ablated'] - worst['ce_original']:.3f} nats) to {best['ce_recovered']:.3f} "
        f"(layer {int(best['layer'])})."
    )


def whole_model_in_words(run: Run) -> str:
    """Paper and ours, of all transcoders at once (Markdown)."""
    of = run.whole_model.lines
    original, theirs, ablated = (_published_ce(what) for what in PUBLISHED)
    return (
        f"*Paper:* CE {original:.3f} → {theirs:.3f} with GPT-2's layers 0 to 10 replaced, {ablated:.3f} "
        f"zero-ablated. *Ours:* {of[ORIGINAL]['ce']:.3f} → {of[REPLACED]['ce']:.3f} with "
        f"{of[REPLACED]['n_layers']} layers of {run.lm.n_layers}, {of[MEAN]['ce']:.3f} mean-ablated, "
        f"{of[ZERO]['ce']:.3f} zero-ablated; the most likely token stays the same on "
        f"{of[REPLACED]['agreement']:.1%} of tokens ({of[MEAN]['agreement']:.1%} mean-ablated)."
    )


def measured(run: Run) -> dict[str, Measured]:
    """The statistic of all transcoders at once."""
    return {"whole_model": whole_model_measured(run.whole_model)}


def claims(run: Run) -> list[Line]:
    """How much of the MLPs the transcoders stand in for, and the features that never fire."""
    return [
        layer_claim(run.layers),
        whole_model_claim(run.whole_model),
        dead_feature_claim(run.layers),
    ]


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


def whole_model_claim(found: WholeModel) -> Line:
    """How much of all MLPs together their transcoders stand in for."""
    replaced, measured = found.lines[REPLACED], whole_model_measured(found)
    return decided(
        "whole_model",
        f"{paper_recovered():.3f} (GPT-2, layers 0 to 10)",
        f"{measured.in_words}; CE {replaced['ce_increase']:+.3f}, KL {replaced['kl']:.3f}, the same top token on "
        f"{replaced['agreement']:.0%} ({replaced['n_layers']} layers)",
        measured,
    )


def whole_model_measured(found: WholeModel) -> Measured:
    """The statistic of the rule "whole_model"."""
    return Measured(*found.recovered(), found.worth >= MIN_WORTH)


def paper_recovered() -> float:
    """The same share, of the paper's numbers."""
    original, replaced, ablated = (_published_ce(what) for what in PUBLISHED)
    return (ablated - replaced) / (ablated - original)


def _published_ce(what: str) -> float:
    """The first CE of `what` in data/paper/whole_model.csv."""
    return next(float(row["ce"]) for row in paper_table("whole_model") if row["what"] == what)


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
