"""The command line: what it runs, how it resumes, and how it ends on bad input."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import papermill
import pytest
import typer
from tiny import random_transcoder, write_notebook
from typer.testing import CliRunner

from tclib import cli
from tclib.cli import _spec
from tclib.dictionaries.dictionary import Dictionary
from tclib.replication.collect import collect
from tclib.replication.presets import PRESETS, Preset, load_preset
from tclib.replication.run import Run
from tclib.support import places
from tclib.support.declared import descriptions
from tclib.support.errors import InputError
from tclib.support.files import exclusive, load_tensors
from tclib.support.steps import Step, ensure, read_manifest, write_manifest
from tclib.training.spec import DictionarySpec, TrainingConfig

RUNNER = CliRunner()


@pytest.fixture
def sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three notebooks that note their parameters; the second fails unless a file `ok` exists."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    note = "open(runs_dir + '/log', 'a').write('{} {} {}\\n'.format({n!r}, preset, seed))"
    for name in ("00_a", "01_b", "02_c"):
        check = "assert __import__('os').path.exists(runs_dir + '/ok'), 'not ok'\n"
        write_notebook(
            folder / f"{name}.ipynb",
            (check if name == "01_b" else "") + note.replace("{n!r}", repr(name)),
        )
    monkeypatch.setattr(cli, "NOTEBOOKS", folder)
    return tmp_path


def invoke(*arguments: str) -> str:
    result = RUNNER.invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


@pytest.mark.slow
def test_run_resumes_from_the_notebook_that_failed(sequence: Path) -> None:
    arguments = ("run", "--preset", "demo", "--runs-dir", str(sequence))
    with pytest.raises(InputError, match=r"01_b\.ipynb stopped: AssertionError: not ok"):
        invoke(*arguments)
    assert log(sequence) == ["00_a demo 42"]
    with pytest.raises(InputError, match="not ok"):
        invoke(*arguments, "--only", "01")
    assert "going on from there" not in invoke(*arguments, "--only", "00")
    (sequence / "log").write_text("00_a demo 42\n")
    with pytest.raises(InputError, match="not ok"):
        invoke(*arguments, "--from", "01")
    (sequence / "ok").touch()
    assert "going on from there" in invoke(*arguments)
    assert log(sequence) == ["00_a demo 42", "01_b demo 42", "02_c demo 42"]
    assert (sequence / "demo" / "notebooks" / "02_c.ipynb").is_file()
    assert "02_c is executed already" in invoke(*arguments)
    assert len(log(sequence)) == 3


@pytest.mark.slow
def test_a_notebook_is_run_again_when_what_it_came_from_has_changed(sequence: Path) -> None:
    (sequence / "ok").touch()
    arguments = ("run", "--preset", "demo", "--runs-dir", str(sequence))
    invoke(*arguments)
    invoke(*arguments)
    assert len(log(sequence)) == 3
    write_notebook(
        sequence / "notebooks" / "01_b.ipynb", "open(runs_dir + '/log', 'a').write('new\\n')"
    )
    invoke(*arguments)  # and what stands behind it
    assert [line.split()[0] for line in log(sequence)[3:]] == ["new", "02_c"]
    step = Step("demo", "00_a", sequence / "demo" / "00_a", "tclib run")
    step.folder.mkdir()
    (step.folder / "table.csv").write_text("1")
    write_manifest(step, {}, {}, 0.0)
    invoke(*arguments)
    assert len(log(sequence)) == 5
    (step.folder / "table.csv").write_text("2")
    invoke(*arguments)
    assert len(log(sequence)) == 8


@pytest.mark.slow
def test_from_only_and_seed_choose(sequence: Path) -> None:
    (sequence / "ok").touch()
    base = ("run", "--runs-dir", str(sequence))
    invoke(*base, "--only", "01")
    invoke(*base, "--from", "02", "--seed", "7")
    assert log(sequence) == ["01_b demo 42", "02_c demo 7"]
    assert (sequence / "demo-seed7").is_dir()
    with pytest.raises(InputError, match="--only 09: expected one of 00, 01, 02"):
        invoke(*base, "--only", "09")


def test_the_notebooks_find_a_preset_of_ones_own(
    sequence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sequence / "mine.yaml").write_text((PRESETS / "demo.yaml").read_text())
    monkeypatch.chdir(sequence)
    invoke("run", "--preset", "mine.yaml", "--runs-dir", str(sequence), "--only", "00")
    assert log(sequence) == [f"00_a {sequence / 'mine.yaml'} 42"]
    assert (sequence / "mine" / "notebooks").is_dir()


@pytest.fixture
def earlier(sequence: Path) -> tuple[Path, ...]:
    """A file of an earlier run, and one of its companion's."""
    files = tuple(
        sequence / name / "00_model_and_data" / "train.npy" for name in ("demo", "demo-neox")
    )
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    return files


@pytest.mark.slow
def test_fresh_deletes_the_earlier_run_and_no_companions(
    sequence: Path, earlier: tuple[Path, ...]
) -> None:
    arguments = ("run", "--runs-dir", str(sequence), "--only")
    invoke(*arguments, "00")
    with pytest.raises(InputError, match="--only 99"):
        invoke(*arguments, "99", "--fresh", "--fresh-companions")
    assert [file.exists() for file in earlier] == [True, True]
    invoke(*arguments, "00", "--fresh")
    assert [file.exists() for file in earlier] == [False, True]
    invoke(*arguments, "00", "--fresh-companions")
    assert [file.exists() for file in earlier] == [False, False]


def test_nothing_is_deleted_while_another_run_works_or_where_a_link_leads_out(
    sequence: Path, earlier: tuple[Path, ...], tmp_path: Path
) -> None:
    arguments = ("run", "--runs-dir", str(sequence), "--fresh", "--fresh-companions")
    with exclusive(sequence / "demo-neox"), pytest.raises(InputError, match="another run is"):
        invoke(*arguments)
    assert [file.exists() for file in earlier] == [True, True]
    elsewhere = (sequence / "demo-neox").rename(tmp_path / "elsewhere")
    (sequence / "demo-neox").symlink_to(elsewhere)
    with pytest.raises(InputError, match="demo-neox is a link: delete it"):
        invoke(*arguments)
    assert [file.exists() for file in earlier] == [True, True]


def run_process(
    preset: str, runs_dir: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`tclib run` in a process of its own."""
    command = [sys.executable, "-m", "tclib.cli", "run", "--preset", preset]
    return subprocess.run(
        [*command, "--runs-dir", str(runs_dir)], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2", "pythia-410m", "pythia-1.4b"])
def test_the_papers_presets_end_in_one_sentence_without_a_hub(preset: str, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = run_process(preset, tmp_path / "r", environment)
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(f"tclib: model '{load_preset(preset).model}' is not in the local")
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_an_unknown_preset_ends_in_one_sentence(tmp_path: Path) -> None:
    done = run_process("nope", tmp_path / "r")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("tclib: unknown preset 'nope': expected one of demo")
    assert not (tmp_path / "r").exists()


def test_presets_lists_every_preset() -> None:
    output = invoke("presets")
    assert all(path.stem in output for path in PRESETS.glob("*.yaml"))


def test_presets_lists_the_others_where_one_file_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("demo", "demo-neox"):
        (tmp_path / f"{name}.yaml").write_text((PRESETS / f"{name}.yaml").read_text())
    (tmp_path / "a.yaml").touch()
    monkeypatch.setattr("tclib.replication.presets.PRESETS", tmp_path)
    first, *others = invoke("presets").splitlines()
    assert first.startswith("a ") and "cannot be used: " in first and "a.yaml" in first
    assert [line.split()[0] for line in others] == ["demo", "demo-neox"]


def advice(preset: Preset, options: list[str]) -> dict[str, str]:
    """What is said at each place that advises a command, for a run without and with files."""
    step = preset.step("03_circuit_tools")
    found: dict[str, str] = {}

    def note(place: str, call: Callable[[], object]) -> None:
        with pytest.raises(InputError) as caught:
            call()
        found[place] = str(caught.value)

    note("nothing made", lambda: read_manifest(step))
    note("nothing to collect", lambda: collect(preset, preset.runs_dir / "kept"))
    note("nothing to report", lambda: invoke("report", *options))
    step.folder.mkdir(parents=True)
    note("neither figures nor results", lambda: invoke("report", *options))
    (step.folder / "a.csv").touch()
    write_manifest(step, {}, {}, 0.0)
    note("other parameters", lambda: ensure(step, {"k": 1}, {}, dict))
    (step.folder / "a.csv").write_text("altered")
    note("altered", lambda: read_manifest(step))
    (step.folder / "manifest.json").write_text("{")
    note("truncated", lambda: read_manifest(step))
    return found


@pytest.mark.parametrize("name", ["demo", "my presets/own.yaml"])
@pytest.mark.parametrize("seed", [[], ["--seed", "7"], ["--seed", "42"]])
@pytest.mark.parametrize("runs_dir", [[], ["--runs-dir", "my runs"]])
def test_every_advised_command_is_one_that_makes_that_run(
    name: str,
    seed: list[str],
    runs_dir: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "CHECKOUT", tmp_path)  # for runs that say no folder
    (tmp_path / "my presets").mkdir()
    (tmp_path / "my presets" / "own.yaml").write_text((PRESETS / "demo.yaml").read_text())
    options = ["--preset", name, *seed, *runs_dir]
    asked = run_options(options)
    preset = load_preset(asked["preset"], asked["seed"], asked["runs_dir"])
    (tmp_path / "elsewhere").mkdir()
    said = advice(preset, options)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place, sentence in said.items():
        (command,) = re.findall("`(tclib run[^`]*)`", sentence)
        given = run_options(shlex.split(command)[2:])
        advised = load_preset(given["preset"], given["seed"], given["runs_dir"])
        assert (advised, advised.command) == (preset, preset.command), place
        assert given["only"] == (None if "first" in sentence else "03"), place
        assert ("--seed" in command) == ("7" in seed), place
        assert ("--runs-dir" in command) == bool(runs_dir), place


def run_options(arguments: list[str]) -> dict[str, Any]:
    """What `tclib run` takes from these arguments."""
    command = typer.main.get_command(cli.app).commands["run"]  # type: ignore[attr-defined]
    options: dict[str, Any] = command.make_context("run", list(arguments)).params
    return options


def test_commands_are_advised_from_one_place() -> None:
    """So that the test above holds for all of them, companions' and damaged dictionaries' too."""
    package = Path(cli.__file__).parent
    written = [path.name for path in package.rglob("*.py") if "tclib run --" in path.read_text()]
    assert written == []
    (companion,) = Run(load_preset("demo", 7, "/x")).companions
    assert companion.step("02_a").command == (
        "tclib run --preset demo-neox --seed 7 --runs-dir /x --only 02"
    )


def trained_with(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = load_tensors(file, "")[1]["training"]["config"]
    return config


@pytest.mark.slow
def test_train_and_evaluate_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    del values["companions"]
    values["corpus"].update(n_train_tokens=12_800, n_eval_tokens=1_280)
    values["transcoders"]["training"].update(n_tokens=5_120, decay_steps=0)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("tclib.replication.presets.PRESETS", tmp_path / "presets")
    common = ("--preset", "small", "--runs-dir", str(tmp_path / "runs"))
    out = tmp_path / "mine"
    options = ("--layer", "1", "--l1", "1e-3", "--expansion", "2", "--batch-size", "256")
    trained = invoke("train", str(out), *options, *common)
    assert "ce_recovered" in trained
    (file,) = out.glob("*.safetensors")
    assert (out / "training_curves.png").stat().st_size > 5000
    assert Dictionary.load(file).config.n_features == 256
    rate = values["transcoders"]["learning_rate"]  # the recipe's, not the training's
    assert trained_with(file)["learning_rate"] == rate
    other = tmp_path / "other"
    invoke("train", str(other), *options, "--learning-rate", "1e-5", *common)
    assert trained_with(other / file.name)["learning_rate"] == 1e-5
    evaluated = invoke("evaluate", str(file), *common)
    assert evaluated.strip().splitlines()[-1].startswith("transcoder-L1-x2-l1-0.001,transcoder,1")
    with pytest.raises(InputError, match="layer 9 is out of range"):
        invoke("train", str(tmp_path / "no"), "--layer", "9", "--l1", "1", *common)
    assert not (tmp_path / "no").exists()


def test_two_files_of_one_name_are_not_evaluated_as_one(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"]
    for file in files:
        random_transcoder(0, "relu").save(file)
    with pytest.raises(InputError, match="^x: more than one file of this name"):
        invoke("evaluate", *map(str, files))


def test_a_model_is_not_trained_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    for out in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(InputError, match="is there already|is a file"):
            invoke("demo-model", "gpt2", str(out))


def test_train_has_an_option_for_every_hyperparameter_with_its_description() -> None:
    text = " ".join(invoke("train", "--help").split())
    # Where both have a field, one dictionary needs the training's alone.
    for name, description in {
        **descriptions(DictionarySpec),
        **descriptions(TrainingConfig),
    }.items():
        if name != "seed":
            assert f"--{name.replace('_', '-')}" in text
            assert " ".join(description.split())[:40] in text, name
    assert text.count("[default: transcoder]") == 1 and "--l1 <float>" in text


def test_train_takes_from_the_preset_what_is_not_given_but_no_other_activations_sparsity() -> None:
    recipe = load_preset("demo").transcoders
    assert _spec(recipe, {}) == recipe.at("transcoder", 0)
    assert _spec(recipe, {"layer": 2, "l1_coefficient": 2.0}) == recipe.at(
        "transcoder", 2, l1_coefficient=2.0
    )
    topk = _spec(recipe, {"activation": "topk", "k": 5, "kind": "sae_mlp_out"})
    assert (topk.k, topk.l1_coefficient, topk.expansion) == (5, 0.0, recipe.expansion)
    with pytest.raises(InputError, match="k None for topk"):
        _spec(recipe, {"activation": "topk"})


def test_train_refuses_what_a_preset_would(tmp_path: Path) -> None:
    for options, message in (
        (("--expansion", "0"), "expansion 0: expected at least 1"),
        (("--activation", "jumprelu"), "l0_coefficient 0.0 for jumprelu"),
        (("--l1", "1", "--batch-size", "0"), "batch_size 0: expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            invoke("train", str(tmp_path / "no"), *options)
    assert "'mse' is not one of 'paper', 'authors'" in invoke(
        "train", str(tmp_path / "no"), "--loss", "mse"
    )


def test_the_version_is_the_packages() -> None:
    assert invoke("--version").split() == ["tclib", importlib.metadata.version("tclib")]


def test_help_comes_at_once_without_what_is_slow_to_import() -> None:
    code = (
        "import sys; from tclib import cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: print({'torch', 'pandas', 'transformers', 'numpy'} & set(sys.modules))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.perf_counter() - began < 1.5
    assert "demo-model" in done.stdout and done.stdout.strip().endswith("set()"), done.stderr


def test_the_notebooks_have_one_typed_parameters_cell_and_no_functions() -> None:
    for path in sorted(cli.NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, path.name
        for line in "".join(tagged[0]["source"]).splitlines():
            assert ": " in line.split("=")[0] and "  # " in line, (path.name, line)
            assert len(line) <= 100, (path.name, line)
        # As `papermill --help-notebook` lists them; one that it cannot read would be called unknown.
        listed = papermill.inspect_notebook(str(path))
        assert list(listed)[:3] == ["preset", "seed", "runs_dir"], path.name
        assert listed["seed"]["default"] == "None", path.name  # the preset's own
        assert not any("def " in source for source in code), path.name


def test_a_link_that_leads_nowhere_is_not_written_over(tmp_path: Path) -> None:
    random_transcoder(0, "relu").save(tmp_path / "x.safetensors")
    (tmp_path / "out.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="is there already"):
        invoke("convert", str(tmp_path / "x.safetensors"), str(tmp_path / "out.safetensors"))
    assert (tmp_path / "out.safetensors").is_symlink()
