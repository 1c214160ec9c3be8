"""The two bundled models: what is committed, and how such models are trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tclib.models.language_model import LanguageModel
from tclib.models.locate import BUNDLED
from tclib.support.errors import InputError
from tclib.text import world
from tclib.training import world_models


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUNDLED))
def test_the_committed_models_have_the_losses_on_their_cards(name: str) -> None:
    lm = LanguageModel.load(name, device="cpu")
    card = json.loads((BUNDLED[name] / "card.json").read_text())
    pairs = world.held_out_pairs(lm.n_ctx)
    loss = world_models.held_out_loss(lm.model, pairs, lm.tokenizer.get_vocab())
    bound = world.surprisal_bound([second for _, second in pairs])
    assert loss == pytest.approx(card["held_out_loss_nats"], abs=1e-3)
    assert bound == pytest.approx(card["derivation_bound_nats"])
    assert loss < card["derivation_bound_nats"] + 0.05
    size = sum(file.stat().st_size for file in BUNDLED[name].iterdir())
    assert size < 4_000_000


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_training_learns_writes_a_model_and_repeats(architecture: str, tmp_path: Path) -> None:
    config = world_models.ModelTraining(
        architecture, n_layers=1, d_model=32, n_heads=2, n_ctx=32, n_steps=30, rows_per_step=8,
        warmup_steps=5,
    )  # fmt: skip
    first = world_models.train_model(config, tmp_path / "a")
    again = world_models.train_model(config, tmp_path / "b")
    assert first == again
    uniform = math.log(len(world.vocabulary()))
    assert first["held_out_loss_nats"] < uniform - 0.5
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
    assert LanguageModel.load(str(tmp_path / "a")).n_layers == 1


@pytest.mark.slow
def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture 'mamba'"):
        world_models.train_model(world_models.ModelTraining("mamba"), tmp_path / "x")
