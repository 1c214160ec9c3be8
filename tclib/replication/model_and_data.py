"""Notebook 00: the model, its rows of tokens, and the behaviour that later notebooks explain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from tclib.dictionaries.published import locate_published
from tclib.figures.greater_than import probability_heatmap
from tclib.figures.style import save_figure
from tclib.greater_than.task import GreaterThan, mean_probability_difference
from tclib.models.locate import BUNDLED, check_hub_reachable, locate
from tclib.replication.presets import Preset
from tclib.replication.run import Run
from tclib.support.files import new_file
from tclib.support.steps import MANIFEST, Step, ensure, save_table
from tclib.text.corpus import Corpus, build_corpus, check_disjoint
from tclib.text.documents import bundled_dump

STEP = "00_model_and_data"
TRANSCODERS_STEP = "01_train_transcoders"
STRONG_ENOUGH = 0.8  # probability difference from which on the behaviour counts as present


def check_ready(preset: Preset) -> None:
    """Raise `InputError`, before anything is written, if the model or the corpus cannot be had."""
    locate(preset.model)
    released = preset.transcoders.published
    if released and not (preset.step(TRANSCODERS_STEP).folder / MANIFEST).is_file():
        locate_published(released, preset.transcoders.layers or range(12))
    corpus_here = (preset.step(STEP).folder / MANIFEST).is_file()
    source = preset.corpus.source
    if preset.corpus.kind == "wikipedia" and not corpus_here and not source:
        bundled_dump()
    if preset.corpus.kind == "huggingface" and not corpus_here and not Path(source).exists():
        check_hub_reachable(f"dataset {source!r} is streamed from the Hugging Face hub")


def make_corpus(run: Run) -> Corpus:
    """The preset's rows of tokens, built once and then read from the step's folder."""
    step, config = run.step(STEP), run.preset.corpus

    def make() -> Mapping[str, Any]:
        corpus = build_corpus(config, run.lm)
        check_disjoint(corpus.train, corpus.evaluation)
        for name in ("train", "evaluation"):
            with new_file(step.folder / f"{name}.npy") as path, open(path, "wb") as file:
                np.save(file, getattr(corpus, name).numpy(), allow_pickle=False)
        return corpus.summary()

    ensure(step, {"model": run.preset.model, "corpus": asdict(config)}, {}, make)
    return Corpus(_rows(step, "train"), _rows(step, "evaluation"), run.lm.bos_id)


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
