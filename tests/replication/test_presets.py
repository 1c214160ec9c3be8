"""Presets: all parse, the paper's are the paper's, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tclib.replication import presets
from tclib.replication.presets import load_preset, preset_names
from tclib.replication.sweep import paper_sweep
from tclib.support.errors import InputError

PAPER = ("gpt2", "pythia-410m", "pythia-1.4b")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_parses_and_describes_itself(name: str) -> None:
    preset = load_preset(name)
    assert preset.description
    assert len(preset.sweep.specs()) == len({spec.name for spec in preset.sweep.specs()})
    assert all(c in preset_names() for c in preset.companions)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_presets_have_the_papers_parameters(name: str) -> None:
    preset = load_preset(name)
    assert preset.corpus.n_ctx == 128
    assert preset.seed == preset.sweep.training.seed == 42
    assert preset.sweep.expansion == 32
    assert preset.sweep.training.n_tokens == 60_000_000
    assert preset.sweep.training.batch_size == 4096
    assert preset.sweep.training.learning_rate == 2e-5
    assert preset.sweep.loss == "authors"
    assert preset.sweep.layer == (8 if name == "gpt2" else 15)
    assert not any(spec.auxk_coefficient for spec in preset.sweep.specs())


def test_the_pythia_sweep_has_the_published_l1_coefficients() -> None:
    table = paper_sweep()
    sweep = load_preset("pythia-410m").sweep
    for kind, ours in (("transcoder", sweep.transcoder_l1), ("sae_mlp_out", sweep.sae_mlp_out_l1)):
        assert sorted(ours) == sorted(table[table["kind"] == kind]["sparsity"])


def test_the_demo_sweeps_six_l1_of_each_kind_on_both_models() -> None:
    demo = load_preset("demo")
    for preset in (demo, load_preset(demo.companions[0])):
        kinds = [spec.kind for spec in preset.sweep.specs()]
        assert kinds.count("transcoder") >= 6
        assert kinds.count("sae_mlp_out") >= 6


def test_the_seed_reaches_everything_that_draws_and_gets_its_own_folder(tmp_path: Path) -> None:
    preset = load_preset("demo", seed=7, runs_dir=tmp_path)
    assert preset.corpus.seed == preset.transcoders.training.seed == preset.sweep.training.seed == 7
    assert preset.folder == tmp_path / "demo-seed7"
    assert load_preset("demo", seed=42, runs_dir=tmp_path).folder == tmp_path / "demo"


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown preset 'dmeo': expected one of demo, demo-neox"):
        load_preset("dmeo")
    values = yaml.safe_load((presets.PRESETS / "demo.yaml").read_text())
    monkeypatch.setattr(presets, "PRESETS", tmp_path)

    def refused(message: str, **changes: object) -> None:
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({**values, **changes}))
        with pytest.raises(InputError, match=message):
            load_preset("x")

    refused("preset 'x', colour: Unexpected keyword", colour="red")
    refused("corpus.n_cxt: Unexpected keyword", corpus={**values["corpus"], "n_cxt": 3})
    refused("corpus.kind: Input should be 'demo'", corpus={**values["corpus"], "kind": "web"})
    training = {**values["transcoders"]["training"], "batch_size": 0}
    refused("batch_size 0", transcoders={**values["transcoders"], "training": training})
    refused("sweep.layer", sweep={**values["sweep"], "layer": "two"})


def test_a_negative_l1_in_a_preset_is_refused_when_its_specs_are_made() -> None:
    from dataclasses import replace

    sweep = replace(load_preset("demo").sweep, transcoder_l1=(-1.0,))
    with pytest.raises(InputError, match="l1_coefficient -1.0"):
        sweep.specs()
