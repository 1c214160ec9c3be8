"""Each line of `bad_inputs` and `bad_commands` ends in its one sentence and leaves nothing behind.

The checks of types that the test run adds are off: what counts is what a user sees.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_commands import COMMANDS, GONE, NOTEBOOKS, PRESET_FILES, PRESET_KEYS
from bad_inputs import API
from bad_kit import Kit, snapshot
from legitimate_inputs import LEGITIMATE
from tiny import unchecked_types

from tclib import cli
from tclib.replication.presets import PRESETS, load_preset
from tclib.support.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit") / "files")


@pytest.fixture
def unharmed(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder `out` to write; afterwards neither it nor any of the files is other than before."""
    files = kit.names["files"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)
    monkeypatch.chdir(tmp_path)
    before = snapshot(files)
    with unchecked_types():
        yield tmp_path / "out"
    assert snapshot(files) == before
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def assert_says(sentence: str, words: str) -> None:
    assert words in sentence
    assert "\n" not in sentence and len(sentence) < 600


@pytest.mark.parametrize(("expression", "words"), API.items())
def test_code(expression: str, words: str, kit: Kit, unharmed: Path) -> None:
    with pytest.raises(InputError) as caught:
        eval(expression, kit.names_with(unharmed))
    assert_says(str(caught.value), words)


@pytest.mark.parametrize("expression", LEGITIMATE)
def test_what_is_right_is_taken(expression: str, kit: Kit, tmp_path: Path) -> None:
    with unchecked_types():
        eval(expression, kit.names_with(tmp_path / "out"))


@pytest.mark.parametrize(("name", "content", "words"), [(n, *v) for n, v in PRESET_FILES.items()])
def test_a_presets_file(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(content)
    with unchecked_types(), pytest.raises(InputError) as caught:
        load_preset(str(path))
    assert_says(str(caught.value), words)


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    return values


@pytest.mark.parametrize(
    ("key", "value", "words"),
    PRESET_KEYS,
    ids=[f"{key} {'gone' if value is GONE else repr(value)}" for key, value, _ in PRESET_KEYS],
)
def test_a_presets_key(
    key: str, value: Any, words: str, demo: dict[str, Any], tmp_path: Path
) -> None:
    values = json.loads(json.dumps(demo))
    *sections, last = key.split(".")
    part = values
    for section in sections:
        part = part.setdefault(section, {})
    part[last] = value
    if value is GONE:
        del part[last]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    with unchecked_types(), pytest.raises(InputError) as caught:
        load_preset(str(tmp_path / "mine.yaml"))
    assert_says(str(caught.value), words)


@pytest.mark.parametrize(("line", "words"), COMMANDS.items())
def test_a_command(
    line: str,
    words: str,
    kit: Kit,
    unharmed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = shlex.split(line.format(files=kit.names["files"], out=unharmed))
    monkeypatch.setattr(sys, "argv", ["tclib", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    sentences = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(sentences) == 1 and sentences[0].startswith("tclib: ")
    assert_says(sentences[0], words)


@pytest.mark.parametrize(
    ("number", "parameters", "words"), NOTEBOOKS, ids=[f"{n} {p}" for n, p, _ in NOTEBOOKS]
)
def test_a_notebook(
    number: str, parameters: dict[str, Any], words: str, kit: Kit, unharmed: Path
) -> None:
    (notebook,) = cli.NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    assert "parameters" in cells[0]["metadata"]["tags"]
    given = {
        name: value.format(files=kit.names["files"], out=unharmed)
        if isinstance(value, str)
        else value
        for name, value in parameters.items()
    }
    names: dict[str, Any] = {}
    exec("".join(cells[0]["source"]), names)
    with pytest.raises(InputError) as caught:
        exec("".join(cells[1]["source"]), {**names, **given})
    assert_says(str(caught.value), words)


@pytest.mark.parametrize("line", [0, 4, 8], ids=lambda line: f"{NOTEBOOKS[line][:2]}")
def test_a_notebook_by_papermill_itself(line: int, tmp_path: Path) -> None:
    number, parameters, words = NOTEBOOKS[line]
    (notebook,) = cli.NOTEBOOKS.glob(f"{number}_*.ipynb")
    given = [
        part for name, value in parameters.items() for part in ("-y", json.dumps({name: value}))
    ]
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(tmp_path / "out.ipynb"),
        *given,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("InputError: ")
    assert_says(last, words)
    assert [path.name for path in tmp_path.rglob("*")] == ["out.ipynb"]
