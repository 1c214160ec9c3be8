"""Presets: all parse, the paper's are the paper's, and mistakes are named."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jsonschema
import pytest
import yaml

from tclib.models.language_model import LanguageModel
from tclib.replication import presets
from tclib.replication.presets import PRESETS, load_preset, preset_names
from tclib.replication.run import Run
from tclib.replication.sweep import paper_sweep
from tclib.support.declared import descriptions
from tclib.support.errors import InputError
from tclib.support.files import copy_folder
from tclib.training.spec import DictionarySpec, Recipe

PAPER = ("gpt2", "pythia-410m", "pythia-1.4b")
LOG = {"min_log10_frequency": 4.0}


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
    with pytest.raises(InputError, match="unknown preset 'dmeo': expected one of demo, demo-long"):
        load_preset("dmeo")
    values = yaml.safe_load((presets.PRESETS / "demo.yaml").read_text())
    monkeypatch.setattr(presets, "PRESETS", tmp_path)

    def refused(message: str, **changes: object) -> None:
        (tmp_path / "x.yaml").write_text(yaml.safe_dump({**values, **changes}))
        with pytest.raises(InputError, match=message):
            load_preset("x")

    refused("preset 'x', colour: no such name; expected one of name, desc", colour="red")
    refused("corpus.n_cxt: no such name; did you mean n_ctx", corpus={"n_cxt": 3})
    refused("corpus.kind 'web': expected 'demo', 'text'", corpus={"kind": "web"})
    refused("corpus: corpus kind 'text' needs a source", corpus={"kind": "text"})
    training = {**values["transcoders"]["training"], "batch_size": 0}
    refused(
        "transcoders.training.batch_size 0: expected at least 1",
        transcoders={**values["transcoders"], "training": training},
    )
    refused("sweep.layer 'two': expected a whole number", sweep={"layer": "two"})
    refused("sweep.layer: expected a value, found none", sweep={})
    refused(
        "sweep.transcoder_l1.0 -1.0: expected more", sweep={"layer": 1, "transcoder_l1": [-1.0]}
    )
    family = {"kind": "transcoder", "sparsity": [1]}
    refused("sweep.families.0.sparsity: .* mean sparsities", sweep={"families": [family]})
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(InputError, match="x.yaml is not YAML"):
        load_preset("x")


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (
            "companions 'gpt3': expected one of demo-long, demo-neox, demo-wide, gpt2",
            {"companions": ["gpt3"]},
        ),
        ("companions 'demo': expected one of demo-long, demo-neox", {"companions": ["demo"]}),
        ("skipped '3': expected one of 00, 01, .*, 07$", {"skipped": {"3": "why"}}),
        (
            "greater_than: templates 'in 17': expected .* {yy:02d}",
            {"greater_than": {"templates": ["in 17"]}},
        ),
        (
            "greater_than: templates '{yy:02d} {x}'",
            {"greater_than": {"templates": ["{yy:02d} {x}"]}},
        ),
        ("greater_than: templates '{yy'", {"greater_than": {"templates": ["{yy"]}}),
        ("greater_than: templates '': expected", {"greater_than": {"templates": []}}),
        ("circuits.year 100: expected at most 99", {"circuits": {"year": 100}}),
        ("circuits.min_log10_frequency 4.0: expected at most 0", {"circuits": LOG}),
        ("case_studies.min_log10_frequency 4.0: expected at most 0", {"case_studies": LOG}),
        (
            "case_studies: n_full 0 and n_restricted 0: expected one",
            {"case_studies": {"n_full": 0, "n_restricted": 0}},
        ),
        ("comparison.min_log10_frequency 4.0: expected at most 0", {"comparison": LOG}),
        (
            "comparison: n_rated 50: expected at most n_features, 20, of which they are",
            {"comparison": {"n_features": 20}},
        ),
        ("transcoders: k None for topk: .* need one", {"transcoders": {"activation": "topk"}}),
        ("transcoders: l1_coefficient 0: a relu", {"transcoders": {"layers": None}}),
        (r"transcoders: layers \[\]: expected different", {"transcoders": {"layers": []}}),
        (r"transcoders: layers \[1, 1\]: expected", {"transcoders": {"layers": [1, 1]}}),
        (
            r"case_studies.layer 2: expected one of transcoders.layers, \[0, 1\], or skip notebook 04",
            {"transcoders": {"layers": [0, 1], "l1_coefficient": 1}},
        ),
        (
            r"greater_than.layer 3: expected one of transcoders.layers, \[0, 2\], or skip notebook 06",
            {
                "transcoders": {"layers": [0, 2], "l1_coefficient": 1},
                "greater_than": {"layer": 3},
            },
        ),
        (
            r"transcoders.layers \[2\]: expected two or more, or skip notebook 03",
            {"transcoders": {"layers": [2], "l1_coefficient": 1}},
        ),
        (
            r"transcoders.layers \[2\]: expected two or more, or skip notebook 06",
            {"transcoders": {"layers": [2], "l1_coefficient": 1}, "skipped": {"03": "why"}},
        ),
        (
            "sweep: expected transcoder_l1, sae_mlp_out_l1 or families, .* skip notebook 02",
            {"sweep": {"layer": 2}},
        ),
        ("sweep: expected .* skip notebook 02", {"sweep": {"layer": 2, "transcoder_l1": [1]}}),
        (
            "sweep: expected .* skip notebook 05",
            {"sweep": {"layer": 2}, "skipped": {"02": "why"}},
        ),
        (
            "sweep: k 8 for relu: topk and batch_topk need one",
            {"sweep": {"layer": 2, "transcoder_l1": [1], "k": 8}},
        ),
        (
            "sweep: transcoder-L2-x32-l1-1: expected each sparsity of a family once",
            {"sweep": {"layer": 2, "transcoder_l1": [1, 1]}},
        ),
        (
            r"case_studies.layer 0 \(null: the sweep's\): restricted studies ask nothing of layer 0",
            {"case_studies": {"layer": 0}},
        ),
        (
            "case_studies.layer 0 .* n_restricted 0, or skip notebook 04",
            {"case_studies": {"layer": 0, "features": [3, 4, 5], "n_full": 2}},
        ),
        ("corpus.seed 7: seed belongs at the top level", {"corpus": {"seed": 7}}),
        (
            "sweep.training.seed 7: seed belongs at the top level",
            {"sweep": {"layer": 2, "training": {"seed": 7}}},
        ),
    ],
)
def test_what_a_run_would_stumble_over_is_refused_when_the_preset_is_read(
    message: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({**values, **changes}))
    with pytest.raises(InputError, match=f"preset 'demo', {message}"):
        load_preset(str(tmp_path / "demo.yaml"))


def test_a_preset_that_trains_nothing_needs_neither_sparsity_nor_sweep(tmp_path: Path) -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    with_sae = {**values, "skipped": {"02": "no sweep", "05": "no sweep"}, "sweep": {"layer": 2}}
    del values["case_studies"]["n_sae"]
    path = tmp_path / "mine.yaml"
    changes: dict[str, Any] = {"sweep": {"layer": 2}, "transcoders": {"published": "hub"}}
    skipped = {"02": "no sweep", "05": "no sweep"}
    path.write_text(yaml.safe_dump({**values, **changes, "skipped": skipped}))
    assert load_preset(str(path)).sweep.specs() == []
    path.write_text(yaml.safe_dump({**with_sae, "case_studies": {"n_sae": 5}}))
    with pytest.raises(InputError, match="case_studies.n_sae 5: expected an sae_mlp_in among the"):
        load_preset(str(path))
    with pytest.raises(InputError, match=r"case_studies.layer 0 \(null: the sweep's\)"):
        path.write_text(yaml.safe_dump({**values, "skipped": skipped, "sweep": {"layer": 0}}))
        load_preset(str(path))
    for studies in (
        {"n_restricted": 0},
        {"features": [3], "n_full": 1, "n_restricted": 0},
        {"layer": 1},
    ):
        changes = {"sweep": {"layer": 0}, "case_studies": studies, "skipped": skipped}
        path.write_text(yaml.safe_dump({**values, **changes}))
        preset = load_preset(str(path), runs_dir=tmp_path / "runs")
        assert preset.sweep.specs() == []
        with pytest.raises(
            InputError, match="preset mine has no sweep: give it sweep.transcoder_l1"
        ):
            _ = Run(preset).sweep
    assert not (tmp_path / "runs").exists()


def test_a_preset_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((presets.PRESETS / "demo.yaml").read_text())
    demo = load_preset("demo", runs_dir=tmp_path)
    assert load_preset(str(path), runs_dir=tmp_path) == replace(demo, name="mine")
    monkeypatch.chdir(tmp_path)
    assert load_preset("mine.yaml", seed=7).name == "mine-seed7"
    with pytest.raises(InputError, match="unknown preset './other': no such file"):
        load_preset("./other")


def test_every_hyperparameter_can_be_given_in_a_preset_and_families_share_the_sweeps() -> None:
    given = {
        "activation": "jumprelu",
        "expansion": 2,
        "l1_coefficient": 0.25,
        "l0_coefficient": 0.5,
        "bandwidth": 0.1,
        "k": None,
        "loss": "paper",
        "skip": True,
        "initial_norm": 1.0,
        "auxk_coefficient": 0.03,
        "auxk_k": 7,
        "learning_rate": 0.02,
    }
    assert list(given) == [field.name for field in fields(Recipe)]
    spec = DictionarySpec("transcoder", 1, **given)  # type: ignore[arg-type]
    assert presets.TranscodersConfig(**given).at("transcoder", 1) == spec
    family = {"kind": "transcoder", "sparsities": [0.5]}
    whole = presets.SweepConfig(layer=1, families=[{**given, **family}])  # type: ignore[arg-type]
    shared = presets.SweepConfig(layer=1, families=[family], **given)  # type: ignore[arg-type]
    assert whole.specs() == shared.specs() == [spec]


def declared_classes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting: list[Any] = [presets.Preset, DictionarySpec]
    while waiting:
        one = waiting.pop()
        waiting += get_args(one)
        if is_dataclass(one):
            found[one.__name__] = one  # type: ignore[union-attr]
            waiting += get_type_hints(one).values()
    return found


def test_every_field_says_what_it_means() -> None:
    classes = declared_classes()
    assert {"CorpusConfig", "DictionaryFamily", "TrainingConfig", "DictionarySpec"} <= set(classes)
    for name, cls in classes.items():
        missing = [field for field, text in descriptions(cls).items() if not text.strip()]
        assert not missing, (name, missing)


def test_the_committed_schema_is_the_declarations_and_every_preset_follows_it() -> None:
    committed = (presets.PRESETS / presets.SCHEMA).read_text()
    assert committed == presets.preset_schema(), "run `tclib preset schema`"
    for name in preset_names():
        text = (presets.PRESETS / f"{name}.yaml").read_text()
        assert text.startswith(f"# yaml-language-server: $schema={presets.SCHEMA}\n")
        jsonschema.validate(yaml.safe_load(text), json.loads(committed))
    declared = json.loads(committed)
    assert "seed" in declared["properties"]
    assert not any("seed" in part["properties"] for part in declared["$defs"].values())


def test_a_preset_of_ones_own_finds_what_lies_beside_it_and_cannot_leave_the_runs_folder(
    tmp_path: Path,
) -> None:
    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    corpus = {**values["corpus"], "kind": "text", "source": "text.txt"}
    path = tmp_path / "own.yaml"
    path.write_text(
        yaml.safe_dump({**values, "model": "./mine", "corpus": corpus, "runs_dir": "r"})
    )
    preset = load_preset(str(path))
    assert preset.model == str(tmp_path / "mine")
    assert preset.corpus.source == str(tmp_path / "text.txt")
    assert preset.runs_dir == tmp_path / "r"
    path.write_text(yaml.safe_dump({**values, "name": ".."}))
    with pytest.raises(InputError, match="leave out the keys name and asked"):
        load_preset(str(path))
    path.write_bytes("description: \u03bb".encode("utf-16"))
    with pytest.raises(InputError, match="is not YAML"):
        load_preset(str(path))


def test_relative_paths_of_a_preset_are_taken_from_its_file_and_names_stay_names(
    tmp_path: Path,
) -> None:
    values = yaml.safe_load((PRESETS / "gpt2-published.yaml").read_text())
    path = tmp_path / "own.yaml"

    def loaded(**changes: Any) -> presets.Preset:
        path.write_text(yaml.safe_dump({**values, **changes}))
        return load_preset(str(path))

    (tmp_path / "demo").mkdir()
    ids = loaded()
    assert (ids.model, ids.corpus.source) == ("openai-community/gpt2", "Skylion007/openwebtext")
    assert ids.transcoders.published == "hub"
    assert loaded(model="demo").model == "demo"  # the bundled one, whatever lies beside
    missing = loaded(
        model="./none",
        corpus={"kind": "docstrings", "source": "code"},
        transcoders={"published": "released"},
    )
    assert missing.model == str(tmp_path / "none")
    assert missing.corpus.source == str(tmp_path / "code")
    assert missing.transcoders.published == str(tmp_path / "released")
    (tmp_path / "text").mkdir()
    folder = loaded(corpus={"kind": "huggingface", "source": "text"})
    assert folder.corpus.source == str(tmp_path / "text")


def test_released_transcoders_have_names_without_a_recipe(gpt2_lm: LanguageModel) -> None:
    names = load_preset("gpt2-published").transcoders.names(gpt2_lm)
    assert names == [f"transcoder-L{layer}-published" for layer in range(gpt2_lm.n_layers)]
    trained = load_preset("demo").transcoders
    assert trained.names(gpt2_lm) == [spec.name for spec in trained.specs(gpt2_lm)]


def test_a_file_is_no_folder_for_runs_or_notebooks(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(InputError, match="a_file is a file: expected a folder"):
        load_preset("demo", runs_dir=tmp_path / "a_file")
    with pytest.raises(InputError, match="a_file is a file: expected a folder"):
        copy_folder(PRESETS, tmp_path / "a_file")


@pytest.mark.parametrize(
    "name", ["/some/folder", "..", "../x", "a/b", ".hidden", "", "-x", "a\nb", "x" * 101]
)
def test_a_run_cannot_be_called_so_that_its_folder_lies_elsewhere(
    name: str, tmp_path: Path
) -> None:
    preset = load_preset("demo", runs_dir=tmp_path)
    with pytest.raises(InputError, match="^name .*: expected letters, digits, -, _, ., a letter"):
        replace(preset, name=name)
    assert replace(preset, name="my.preset-2_b").folder == tmp_path / "my.preset-2_b"
    path = tmp_path / "own.yaml"
    path.write_text(f"name: {json.dumps(name)}\n{(PRESETS / 'demo.yaml').read_text()}")
    with pytest.raises(InputError, match="leave out the keys name and asked"):
        load_preset(str(path))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed {seed}: expected at (least 0|most 922337203)"):
        load_preset("demo", seed=seed)
    assert load_preset("demo", seed=2**63 - 1).seed == 2**63 - 1
