"""Notebook 00: the model, and its rows of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tclib.dictionaries import published
from tclib.models.language_model import LanguageModel
from tclib.models.locate import BUNDLED, check_hub_reachable, locate
from tclib.replication.presets import Preset
from tclib.replication.transcoders import TRANSCODERS_STEP
from tclib.support.files import new_file
from tclib.support.steps import (
    MANIFEST,
    Step,
    ensure,
)
from tclib.text.corpus import Corpus, build_corpus, check_disjoint
from tclib.text.documents import bundled_dump

DATA_STEP = "00_model_and_data"


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
    card: dict[str, Any] = json.loads((BUNDLED[preset.model] / "card.json").read_text())
    return card
