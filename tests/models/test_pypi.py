"""Models of PyPI: parts that are put together and checked, and terms that are accepted once."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tclib import cli
from tclib.models import pypi
from tclib.models.identity import names_differ
from tclib.models.locate import locate
from tclib.models.pypi import MODELS, PypiModel, ask_for_terms, check_terms, pypi_folder
from tclib.support.errors import InputError

GEMMA = MODELS["gemma3-270m"]
PIECES = (b"GGUF", b" of two")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PypiModel:
    """Gemma's entry with two small parts, installed where Python finds them; nothing is accepted yet."""
    for i, piece in enumerate(PIECES):
        package = tmp_path / "site" / f"tiny_part{i}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "part.bin").write_bytes(piece)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    monkeypatch.setenv("TCLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TCLIB_ACCEPT_GEMMA_TERMS", raising=False)
    (tmp_path / "cache").mkdir()
    return replace(
        GEMMA,
        parts=tuple((f"tiny_part{i}", "part.bin") for i in range(len(PIECES))),
        sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
    )


def put(gguf: Path, folder: Path) -> None:
    """Instead of the conversion: what it was given, and a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(gguf.read_bytes())


def test_nothing_is_loaded_before_the_terms_are_accepted(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pypi, "dequantise", put)
    with pytest.raises(InputError, match=r"ai.google.dev/gemma/terms.*make gemma3.*GEMMA_TERMS=1"):
        pypi_folder(model)
    assert not list((tmp_path / "cache").iterdir())
    for no in ("0", "", "false"):
        monkeypatch.setenv("TCLIB_ACCEPT_GEMMA_TERMS", no)
        with pytest.raises(InputError, match="GEMMA_TERMS"):
            pypi_folder(model)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setenv("TCLIB_ACCEPT_GEMMA_TERMS", "1")
    folder = pypi_folder(model)
    assert (folder / "config.json").read_bytes() == b"".join(PIECES)
    # Once: what is converted and what was accepted stays.
    monkeypatch.delenv("TCLIB_ACCEPT_GEMMA_TERMS")
    check_terms(model)
    assert pypi_folder(model) == folder


def test_terms_are_asked_for_once_and_a_no_is_kept_to(model: PypiModel) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match="were not accepted: gemma3-270m is not loaded"):
        ask_for_terms(model, lambda _question: False, said.append)
    assert "ai.google.dev/gemma/terms" in said[0]
    ask_for_terms(model, lambda _question: True, said.append)
    ask_for_terms(model, lambda _question: pytest.fail("asked again"), said.append)
    assert len(said) == 2
    check_terms(model)


def test_parts_that_are_damaged_or_missing_are_named(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TCLIB_ACCEPT_GEMMA_TERMS", "1")
    (tmp_path / "site/tiny_part1/part.bin").write_bytes(b" of one")
    with pytest.raises(InputError, match=r"have sha256 .*, expected .*: install them again"):
        pypi_folder(model)
    (tmp_path / "site/tiny_part1/part.bin").unlink()
    with pytest.raises(InputError, match=r"run `make gemma3`, or .*part4==1.0.0"):
        pypi_folder(model)
    assert not (tmp_path / "cache" / model.folder).exists()


def test_the_command_asks_and_a_no_is_one_sentence(
    model: PypiModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "gemma3-270m", model)
    with pytest.raises(InputError, match="the Gemma Terms of Use were not accepted"):
        CliRunner().invoke(cli.app, ["gemma3"], input="n\n", catch_exceptions=False)
    with pytest.raises(InputError, match="read and accept them with `make gemma3`"):
        locate("gemma3-270m")


def test_its_names_are_one_model() -> None:
    assert not names_differ("gemma3-270m", "google/gemma-3-270m")
    assert names_differ("gemma3-270m", "google/gemma-3-270m-it")
