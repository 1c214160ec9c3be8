"""Notebook 00: the model, its rows of tokens, and the behaviour that later notebooks explain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from tclib.dictionaries.published import locate_published
from tclib.figures.greater_than import probability_heatmap
from tclib.figures.style import save_figure
from tclib.greater_than.task import GreaterThan, mean_probability_difference
from tclib.models.language_model import LanguageModel
from tclib.models.locate import BUNDLED, geometry, locate
from tclib.replication.presets import Preset
from tclib.replication.run import Run
from tclib.support.errors import InputError
from tclib.support.files import new_file
from tclib.support.paths import expanded
from tclib.support.steps import (
    MANIFEST,
    SOURCE_STATE,
    Step,
    ensure,
    save_table,
    source_input,
    source_state,
)
from tclib.text.corpus import Corpus, build_corpus, check_disjoint, source_files
from tclib.text.documents import bundled_dump, text_documents
from tclib.text.hub_datasets import locate_dataset

STEP = "00_model_and_data"
SAMPLES = "00_sampled_text"  # folder of what the model writes, block by block
TRANSCODERS_STEP = "01_train_transcoders"
STRONG_ENOUGH = 0.8  # probability difference from which on the behaviour counts as present


def check_ready(preset: Preset) -> None:
    """Raise `InputError`, before anything is written, if the model or the corpus cannot be had."""
    check_model(preset)
    released = preset.transcoders.published
    if released and not (preset.step(TRANSCODERS_STEP).folder / MANIFEST).is_file():
        locate_published(released, preset.transcoders.layers or None)
    corpus = preset.corpus
    if (preset.step(STEP).folder / MANIFEST).is_file():
        return
    if corpus.kind == "huggingface":
        locate_dataset(corpus.source, corpus.revision, corpus.data_files)
    elif corpus.source and not expanded(corpus.source).exists():
        raise InputError(f"corpus.source {corpus.source}: no such file or folder")
    elif corpus.kind == "wikipedia" and not corpus.source:
        bundled_dump()
    elif corpus.kind == "text":
        text_documents(expanded(corpus.source))


def check_model(preset: Preset) -> None:
    """Raise `InputError` if the model cannot be had, or lacks a layer, head or context of the preset."""
    n_layers, n_heads, n_ctx = geometry(locate(preset.model))
    if preset.corpus.n_ctx > n_ctx:
        raise InputError(
            f"corpus.n_ctx {preset.corpus.n_ctx}: expected 2 to {n_ctx} for {preset.model}"
        )
    keys = [("transcoders.layers", layer, n_layers) for layer in preset.transcoders.layers or ()]
    for section in ("sweep", "case_studies", "greater_than"):
        keys.append((f"{section}.layer", getattr(preset, section).layer, n_layers))
    if preset.greater_than.head is not None:
        layer, head = preset.greater_than.head
        keys += [("greater_than.head.0", layer, n_layers), ("greater_than.head.1", head, n_heads)]
    for key, value, n in keys:
        if value is not None and value >= n:
            raise InputError(f"{key} {value}: expected 0 to {n - 1} for {preset.model}")


def check_year(preset: Preset, lm: LanguageModel) -> None:
    """Raise `InputError` if circuits.year has no earlier or no later answer in the model's form."""
    try:
        task = GreaterThan.of(lm, preset.greater_than.templates[0])
    except InputError:
        return  # said where the task is asked for
    rows = zip(task.numbers, task.is_greater.tolist(), strict=True)
    years = [number for number, right in rows if any(right) and not all(right)]
    if years and preset.circuits.year not in years:
        raise InputError(
            f"circuits.year {preset.circuits.year}: expected a year with earlier and later answers, "
            f"{years[0]} to {years[-1]} for {preset.model}"
        )


def make_corpus(run: Run) -> Corpus:
    """The preset's rows of tokens, built once and then read from the step's folder."""
    step, config = run.step(STEP), run.preset.corpus
    lm = run.lm  # which is checked before the step's folder is there

    def make() -> Mapping[str, Any]:
        state = source_state(source_files(config))
        corpus = build_corpus(config, lm, run.preset.folder / SAMPLES)
        check_disjoint(corpus.train, corpus.evaluation)
        for name in ("train", "evaluation"):
            with new_file(step.folder / f"{name}.npy") as path, open(path, "wb") as file:
                np.save(file, getattr(corpus, name).numpy(), allow_pickle=False)
        return {**corpus.summary(), SOURCE_STATE: state}

    text = asdict(config)
    if not config.n_sampled_tokens:  # runs from before there was such text stay good
        del text["n_sampled_tokens"]
    inputs = {"model": run.model_hash, **text_input(run)}
    ensure(step, {"corpus": text}, inputs, make)
    return Corpus(_rows(step, "train"), _rows(step, "evaluation"), lm.bos_id)


def text_input(run: Run) -> dict[str, str]:
    """`source_input` of the preset's text: a run does not go on silently when that was edited."""
    return source_input(run.step(STEP), source_files(run.preset.corpus))


def _rows(step: Step, name: str) -> torch.Tensor:
    # Copy on write: torch wants a writable array, and nothing must reach the file.
    return torch.from_numpy(np.load(step.folder / f"{name}.npy", mmap_mode="c"))


def demo_world_card(run: Run) -> dict[str, Any]:
    """What a bundled model was trained on, its held-out loss, and the language's entropy bound."""
    card: dict[str, Any] = json.loads((BUNDLED[run.preset.model] / "card.json").read_text())
    return card


@torch.no_grad()
def second_year_figure(run: Run) -> Figure:
    """The probability of each answer to each prompt of the first sentence, kept and drawn."""
    task = first_sentence(run)
    found = task.answer_probabilities(run.lm.last_logits(task.tokens)).cpu().numpy()
    save_table(pd.DataFrame(found), run.step(STEP), "year_probabilities")
    title = f"{run.lm.name}: the second year comes later"
    figure = probability_heatmap(found, title, task.numbers, task.answers)
    return save_figure(figure, run.step(STEP), "greater_than")


def behaviour(run: Run) -> float:
    """The mean probability difference over the prompts of the first sentence."""
    return mean_probability_difference(run.lm, first_sentence(run))


def first_sentence(run: Run) -> GreaterThan:
    """The task on the first of the preset's sentences."""
    return GreaterThan.of(run.lm, run.preset.greater_than.templates[0])


REASONS = {
    "demo": (
        "the demo world's second year is uniform over the later ones, so all mass should lie above the "
        "dashed diagonal; what is missing is the model's blur around it, widest for late first years, "
        "where few years are left."
    ),
    "digits": (
        "the model writes a year digit by digit: among ten digits those at or above the prompt's tens "
        "digit count as greater (right of the dashed line), an easier question than which of a hundred "
        "years is later."
    ),
    "years": (
        "of the prompts alone, if the model is the paper's: years that do not tokenise as assumed are "
        "left out."
    ),
}


def difference_reason(run: Run) -> str:
    """Why the behaviour may be stronger or weaker than GPT-2's."""
    if run.preset.corpus.kind == "demo":
        return REASONS["demo"]
    return REASONS[first_sentence(run).form]
