"""`tclib upload` from the outside, to an endpoint of this test's own that answers as the hub does."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import random_transcoder
from typer.testing import CliRunner

from tclib import cli
from tclib.dictionaries.dictionary import Dictionary
from tclib.dictionaries.formats.any import load_dictionary, read_any
from tclib.dictionaries.formats.parts import HOOK_IN
from tclib.evaluation.evaluate import COLUMNS
from tclib.support.errors import InputError

REPO = "someone/tiny-transcoders"
TRAINING = {
    "config": {"n_tokens": 307_200, "batch_size": 512, "learning_rate": 4e-4, "seed": 42},
    "spec": {"loss": "authors", "learning_rate": None},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload meets; what it is sent is kept."""

    repository: dict[str, Any]
    files: dict[str, bytes]
    refuses: bool
    is_private: bool

    def _json(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self._json({})

    def do_GET(self) -> None:
        private = type(self).is_private
        self._json({"id": REPO, "sha": "0" * 40, "siblings": [], "private": private})

    def do_PUT(self) -> None:
        oid = self.path.rsplit("/", 1)[1]
        type(self).files[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self._json({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        here = f"http://127.0.0.1:{self.server.server_address[1]}"  # type: ignore[attr-defined]
        if type(self).refuses:
            self._json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            type(self).repository.update(json.loads(body))
            self._json({"url": f"{here}/{REPO}", "id": REPO, "name": REPO})
        elif self.path.endswith("/preupload/main"):
            paths = [one["path"] for one in json.loads(body)["files"]]
            self._json({"files": [self._mode(path) for path in paths]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{here}/put/{one['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                self._commit(line["key"], line["value"])
            url = f"{here}/{REPO}/commit/{'1' * 40}"
            self._json({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self._json({"errors": [], "warnings": []})

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, kind: str, value: dict[str, Any]) -> None:
        if kind == "file":
            type(self).files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            type(self).files[value["path"]] = type(self).files.pop(value["oid"])

    def log_message(self, *_arguments: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type(
        "OneHub", (Hub,), {"repository": {}, "files": {}, "refuses": False, "is_private": True}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's transcoders, their evaluation and its text, as notebooks 00 and 01 leave them."""
    folder = tmp_path / "run/01_train_transcoders"
    folder.mkdir(parents=True)
    for layer in range(2):
        made = random_transcoder(layer, "relu", torch.float32)
        made.save(folder / f"transcoder-L{layer}.safetensors", TRAINING)
    evaluated = folder.with_name("01_train_transcoders_evaluation")
    evaluated.mkdir()
    line = dict.fromkeys(COLUMNS, "0") | {"name": "transcoder-L1", "l0": "12.3456", "fvu": "0.25"}
    line["ce_recovered"] = "0.987"
    lines = [",".join(line), ",".join(line.values())]
    (evaluated / "table.csv").write_text("\n".join(lines))
    text = {"parameters": {"corpus": {"kind": "huggingface", "source": "some/text"}}}
    (tmp_path / "run/00_model_and_data").mkdir()
    (tmp_path / "run/00_model_and_data/manifest.json").write_text(json.dumps(text))
    return folder


def upload(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_none",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "tclib.cli", "upload", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_files_and_a_card_arrive(
    hub: tuple[str, type[Hub]], run_folder: Path, tmp_path: Path
) -> None:
    endpoint, received = hub
    done = upload(endpoint, str(run_folder), "--repo", REPO, "--private", "--licence", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert f"{endpoint}/{REPO}: 2 dictionaries" in done.stdout
    made = received.repository
    assert made["name"] == "tiny-transcoders"
    assert made.get("visibility") == "private" or made.get("private") is True
    names = {"transcoder-L0.safetensors", "transcoder-L1.safetensors", "README.md"}
    assert set(received.files) - {".gitattributes"} == names
    (tmp_path / "back.safetensors").write_bytes(received.files["transcoder-L1.safetensors"])
    assert load_dictionary(tmp_path / "back.safetensors").config.layer == 1
    _, front, card = received.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front)["library_name"] == "tclib"
    measured = next(line for line in card.splitlines() if "`transcoder-L1.safetensors`" in line)
    assert all(text in measured for text in ("12.3", "0.25", "0.987", "blocks.1.hook_mlp_out"))
    other = next(line for line in card.splitlines() if "`transcoder-L0.safetensors`" in line)
    assert "not measured" in other
    for text in ("tokens: 307,200", "huggingface (some/text)", "objective: authors", "seed: 42"):
        assert text in card


def test_a_public_repository_is_not_taken_for_a_private_one(
    hub: tuple[str, type[Hub]], run_folder: Path
) -> None:
    endpoint, received = hub
    received.is_private = False
    done = upload(endpoint, str(run_folder), "--repo", REPO, "--private")
    assert done.returncode != 0
    assert "is there already, and public: nothing was uploaded" in done.stderr
    assert not received.files


@pytest.mark.parametrize("form", ["saelens", "circuit-tracer", "sparsify"])
def test_what_would_be_uploaded_is_written_in_other_formats(
    run_folder: Path, tmp_path: Path, form: str
) -> None:
    out = tmp_path / "out"
    if form == "sparsify":
        for path in run_folder.glob("*.safetensors"):
            one = Dictionary.load(path)
            made = random_transcoder(one.config.layer, "topk", torch.float32)
            raw = Dictionary(replace(made.config, basis="raw"), **made.parameters())
            path.unlink()
            raw.save(path)
    command = ["upload", str(run_folder), "--repo", REPO, "--to", form, "--out", str(out)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    place = {"saelens": "transcoder-L1", "circuit-tracer": "set", "sparsify": "layers.1.mlp"}[form]
    assert read_any(out / place).dictionaries[1].config.n_features > 0
    card = (out / "README.md").read_text()
    assert "library_name: tclib" in card
    # What the card says to load is there, and reads what it says.
    path, layer = re.findall(r'load_dictionary\("transcoders/([^"]+)"(?:, layer=(\d))?\)', card)[0]
    loaded = load_dictionary(out / path, int(layer) if layer else None)
    hook = HOOK_IN[loaded.config.basis]
    assert f"`blocks.{loaded.config.layer}.{hook}`" in card
    assert ("tc.to_processed" in card) == (form == "sparsify")


@pytest.mark.parametrize("form", ["circuit-tracer", "sparsify"])
def test_two_of_a_layer_are_not_one(run_folder: Path, tmp_path: Path, form: str) -> None:
    random_transcoder(0, "relu", torch.float32).save(run_folder / "other.safetensors")
    command = ["upload", str(run_folder), "--repo", REPO, "--to", form, "--out"]
    with pytest.raises(InputError, match="other and transcoder-L0 are both of one layer"):
        CliRunner().invoke(cli.app, [*command, str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "is no evaluation of tclib"),
        ("name,l0\na,1\n", "is no evaluation of tclib"),
        ("name,l0,fvu,ce_recovered\na,x,1,1\n", "is no evaluation of tclib"),
    ],
)
def test_an_evaluation_that_is_none_is_named(
    run_folder: Path, tmp_path: Path, table: str, message: str
) -> None:
    place = run_folder.with_name("01_train_transcoders_evaluation") / "table.csv"
    place.write_text(table)
    command = ["upload", str(run_folder), "--repo", REPO, "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
    place.unlink()
    (run_folder.parent / "00_model_and_data/manifest.json").write_text("{}")
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert "text: not said" in (tmp_path / "out/README.md").read_text()


def test_a_hub_that_is_gone_is_one_sentence(run_folder: Path) -> None:
    done = upload("http://127.0.0.1:9", str(run_folder), "--repo", REPO)
    assert done.returncode != 0
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_refuses_is_one_sentence(hub: tuple[str, type[Hub]], run_folder: Path) -> None:
    endpoint, received = hub
    received.refuses = True
    done = upload(endpoint, str(run_folder), "--repo", REPO)
    assert done.returncode != 0
    assert "log in with `hf auth login`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not received.files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--repo", "alone"], "repository 'alone': expected owner/name"),
        (["{run}", "--repo", "a b/c"], "repository 'a b/c'"),
        (["{run}", "--repo", REPO, "--to", "onnx"], "format 'onnx': expected one of tclib"),
        (["{empty}", "--repo", REPO], "no dictionary in it"),
        (["{run}", "--repo", REPO, "--licence", " "], "licence '': expected one"),
        (["{run}", "--repo", REPO, "--out", "{empty}"], "is there already"),
    ],
)
def test_what_cannot_be_uploaded_is_named_before_anything_is_sent(
    run_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"run": run_folder, "empty": tmp_path / "empty"}
    given = [one.format(**places) for one in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(cli.app, ["upload", *given], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_a_training_that_has_not_ended_is_not_uploaded(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "transcoder-L0.safetensors").rename(run_folder / "checkpoint.safetensors")
    command = ["upload", str(run_folder), "--repo", REPO, "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="training has not ended"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)
