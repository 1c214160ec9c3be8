"""Checks of types and shapes, tiny random models of every geometry, a tokenizer of a hundred words."""

from __future__ import annotations

import sys
import types
from dataclasses import make_dataclass
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# What functions and dataclasses take and give is checked in every module of tclib that names shapes,
# and in no other: the hook costs most where small functions are called most, in the bundled grammar. An int
# is a float, as mypy has it. This stands before anything imports tclib.
PACKAGE = Path(__file__).parents[1] / "tclib"
with_shapes = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if "from jaxtyping import" in path.read_text()
]
install_import_hook(
    with_shapes, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

from tiny import GEOMETRIES, random_rows, tiny_lm  # noqa: E402

from tclib.models.language_model import LanguageModel  # noqa: E402
from tclib.text.corpus import Corpus  # noqa: E402


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
