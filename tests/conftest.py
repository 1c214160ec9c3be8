"""Tiny random models of every geometry, and a tokenizer of a hundred words."""

from __future__ import annotations

import sys
import types
from dataclasses import make_dataclass

import pytest
from tiny import GEOMETRIES, random_rows, tiny_lm

from tclib.models.language_model import LanguageModel
from tclib.text.corpus import Corpus


@pytest.fixture(params=GEOMETRIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture
def gpt2_lm() -> LanguageModel:
    return tiny_lm("gpt2")


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(random_rows(64), random_rows(16, seed=1), bos_id=0)


@pytest.fixture
def runner_config(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that the published pickles name, in a module that only the writing test has."""
    fields = ["is_transcoder", "hook_point", "hook_point_layer", "d_in", "d_out", "d_sae"]
    made = make_dataclass(
        "LanguageModelSAERunnerConfig", [*fields, "model_name", "device", "dtype"]
    )
    made.__module__ = "sae_training.config"
    package, module = types.ModuleType("sae_training"), types.ModuleType("sae_training.config")
    module.LanguageModelSAERunnerConfig = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sae_training", package)
    monkeypatch.setitem(sys.modules, "sae_training.config", module)
    return made
