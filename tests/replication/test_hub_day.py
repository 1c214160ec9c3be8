"""The paper's presets on a folder as the hub's libraries fill it: from the cache alone, to the last notebook."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from gpt2_tokenizer import gpt2_ranks, merges
from hub_rehearsal import (
    PAPERS_PRESETS,
    build_home,
    write_presets,
)
from huggingface_hub import scan_cache_dir
from transformers import AutoTokenizer

from tclib.dictionaries.released_sets import GPT2_FILE
from tclib.support.places import PRESETS

TESTS = Path(__file__).parents[1]
RUN = """
import sys
from pathlib import Path
from hub_rehearsal import run_here
from tclib.replication.model_and_data import check_ready
from tclib.replication.run import open_run

runs, *presets = sys.argv[1:]
between = presets.index("then load")
for preset in presets[:between]:
    run_here(Path(preset), Path(runs))
for preset in presets[between + 1 :]:
    run = open_run(preset, runs_dir=runs)
    check_ready(run.preset)
    _ = run.lm, run.corpus
    _ = run.preset.transcoders.published and run.trained
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build_home(folder / "home")
    write_presets(folder / "presets")
    return folder


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that is down, and what it was asked for."""
    asked: list[str] = []

    class Down(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Down) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def run_presets(
    folder: Path, endpoint: str, offline: str, run: Iterable[str], load: Iterable[str]
) -> None:
    """Run presets to the end, and load what others load, as a user whose HF_HOME is the folder's."""
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "MPLBACKEND": "agg",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "TCLIB_QUIET": "1",
    }
    first, second = ([f"{folder}/presets/{name}.yaml" for name in names] for names in (run, load))
    command = [
        sys.executable,
        "-c",
        RUN,
        str(folder / "runs" / offline),
        *first,
        "then load",
        *second,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offline", "names"),
    [("0", ("gpt2-published", "pythia-410m")), ("1", ("gpt2", "pythia-1.4b"))],
)
def test_every_preset_of_the_paper_runs_to_its_end_and_asks_no_hub(
    folder: Path, hub: tuple[str, list[str]], offline: str, names: tuple[str, ...]
) -> None:
    endpoint, asked = hub
    # With the hub unreachable or switched off, the other two find all that they load, too.
    others = sorted(set(PAPERS_PRESETS) - set(names))
    run_presets(folder, endpoint, offline, names, others)
    assert asked == []
    for name in names:
        run = folder / "runs" / offline / name
        assert (run / "07_results" / "results.md").is_file()
        skipped = yaml.safe_load((PRESETS / f"{name}.yaml").read_text()).get("skipped", {})
        made = {path.name[:2] for path in run.iterdir() if (path / "manifest.json").is_file()}
        assert made == {f"{i:02}" for i in range(8)} - set(skipped)


@pytest.mark.slow
def test_the_rehearsed_folder_is_what_the_hubs_own_libraries_take_for_a_cache(folder: Path) -> None:
    found = scan_cache_dir(folder / "home" / "hub")
    assert not found.warnings
    revisions = {repo.repo_id: list(repo.refs) for repo in found.repos}
    assert revisions == {
        "openai-community/gpt2": ["main"],
        "EleutherAI/pythia-410m": ["main"],
        "EleutherAI/pythia-1.4b": ["main"],
        "pchlenski/gpt2-transcoders": ["main"],
        "Skylion007/openwebtext": ["refs/convert/parquet"],
    }
    (released,) = folder.glob(
        "home/hub/models--pchlenski*/snapshots/*/" + GPT2_FILE.format(layer=3)
    )
    assert released.is_symlink()
    with zipfile.ZipFile(released) as parts:
        (pickled,) = (name for name in parts.namelist() if name.endswith("data.pkl"))
        assert b"cuda:0" in parts.read(pickled)  # as saved on a GPU


@pytest.mark.slow
def test_the_tokenizer_made_from_ranks_is_gpt2s(folder: Path) -> None:
    ranks = gpt2_ranks()
    assert len(ranks) == 50_256 and len(merges(ranks)) == 50_000
    (snapshot,) = folder.glob("home/hub/models--openai-community--gpt2/snapshots/*")
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    assert len(tokenizer) == 50_257 and tokenizer.bos_token_id == 50_256
    known = {
        "Hello world": [15496, 995],
        " 1700": [35665],
        "The war lasted from 1735 to 17": [464, 1175, 15436, 422, 1596, 2327, 284, 1596],
        "<|endoftext|>": [50256],
    }
    for text, ids in known.items():
        assert tokenizer(text)["input_ids"] == ids
    text = "naïve — 東京\n\n\tdef f():"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # By the ranks alone, as tiktoken merges: the pair of the lowest rank first.
    for word in (" Dunefsky", " transcoders", "0x1F600"):
        parts = [word[i : i + 1].encode() for i in range(len(word))]
        while pairs := [i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]:
            i = min(pairs, key=lambda i: ranks[parts[i] + parts[i + 1]])
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert tokenizer(word)["input_ids"] == [ranks[part] for part in parts]


def test_the_presets_differ_from_the_papers_in_sizes_alone(tmp_path: Path) -> None:
    sizes = {
        *("batch_size", "block_rows", "components_every", "dead_after_tokens", "expansion"),
        *("features", "templates", "min_log10_frequency", "warmup_steps", "rows_per_forward"),
    }

    def differing(a: object, b: object, name: str) -> set[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return {n for key in {*a, *b} for n in differing(a.get(key, {}), b.get(key, {}), key)}
        return set() if a == b else {name}

    write_presets(tmp_path)
    for name in PAPERS_PRESETS:
        ours, papers = (
            yaml.safe_load((place / f"{name}.yaml").read_text()) for place in (tmp_path, PRESETS)
        )
        changed = differing(ours, papers, "")
        assert all(key in sizes or key.startswith("n_") for key in changed), changed
