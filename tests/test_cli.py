"""The command line: what it runs, how it resumes, and how it ends on bad input."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from tclib import cli
from tclib.dictionaries.dictionary import Dictionary
from tclib.replication.presets import PRESETS, load_preset
from tclib.support.declared import descriptions
from tclib.support.errors import InputError
from tclib.support.steps import Step, write_manifest
from tclib.training.spec import DictionarySpec, TrainingConfig

RUNNER = CliRunner()


def write_notebook(path: Path, code: str) -> None:
    parameters = nbformat.v4.new_code_cell('preset = "demo"\nseed = 42\nruns_dir = ""')
    parameters.metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(notebook, path)


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
    step = Step("demo", "00_a", sequence / "demo" / "00_a")
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


@pytest.mark.slow
def test_fresh_deletes_the_earlier_run(sequence: Path) -> None:
    (sequence / "ok").touch()
    (sequence / "demo").mkdir()
    (sequence / "demo" / "old").touch()
    invoke("run", "--runs-dir", str(sequence), "--only", "00")
    assert (sequence / "demo" / "old").exists()
    with pytest.raises(InputError, match="--only 99"):
        invoke("run", "--runs-dir", str(sequence), "--only", "99", "--fresh")
    assert (sequence / "demo" / "old").exists()
    invoke("run", "--runs-dir", str(sequence), "--only", "00", "--fresh")
    assert not (sequence / "demo" / "old").exists()


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


def test_report_says_what_to_run_when_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `tclib run --preset demo` first"):
        invoke("report", "--runs-dir", str(tmp_path))


@pytest.mark.slow
def test_train_and_evaluate_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    values = yaml.safe_load((PRESETS / "demo.yaml").read_text())
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
    evaluated = invoke("evaluate", str(file), *common)
    assert evaluated.strip().splitlines()[-1].startswith("transcoder-L1-x2-l1-0.001,transcoder,1")
    with pytest.raises(InputError, match="layer 9 is out of range"):
        invoke("train", str(tmp_path / "no"), "--layer", "9", "--l1", "1", *common)
    assert not (tmp_path / "no").exists()


def test_train_has_an_option_for_every_hyperparameter_with_its_description() -> None:
    text = " ".join(invoke("train", "--help").split())
    for cls in (DictionarySpec, TrainingConfig):
        for name, description in descriptions(cls).items():
            if name != "seed":
                assert f"--{name.replace('_', '-')}" in text
                assert " ".join(description.split())[:40] in text, name
    assert text.count("[default: 8]") == 1 and "--l1 <float>" in text


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
        assert not any("def " in source for source in code), path.name
