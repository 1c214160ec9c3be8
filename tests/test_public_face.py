"""The public names are there, are quick to import, and the README's code runs."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tclib
from tclib.circuits import EQUATIONS
from tclib.support.places import CHECKOUT

assert CHECKOUT is not None
ROOT: Path = CHECKOUT
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.M)


def run_python(code: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT)


def test_importing_tclib_is_quick_and_imports_no_torch() -> None:
    began = time.perf_counter()
    done = run_python("import sys, tclib; assert 'torch' not in sys.modules, 'torch'")
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 1.0  # 0.06 s of its own on an idle core


@pytest.mark.parametrize("name", tclib.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert (getattr(tclib, name).__doc__ or "").strip()


def test_the_public_names_hold_what_was_promised() -> None:
    promised = """LanguageModel Site CorpusConfig build_corpus Dictionary DictionarySpec TrainingConfig
    train evaluate replace_mlp FrozenPrompts sources greedy_paths attribution_graph prune de_embedding
    pullback direct_logit_attribution BlindSession open_run load_dictionary load_published InputError"""
    assert set(promised.split()) <= set(tclib.__all__) <= set(dir(tclib))
    with pytest.raises(
        AttributeError, match="no attribute 'atribution_graph': did you mean attribution_graph"
    ):
        _ = tclib.atribution_graph


@pytest.mark.parametrize("place", sorted(set(EQUATIONS.values())))
def test_every_equation_stands_where_the_table_says(place: str) -> None:
    found, rest = importlib.import_module(".".join(place.split(".")[:3])), place.split(".")[3:]
    for name in rest:
        found = getattr(found, name)
    assert found.__doc__


def test_the_readme_begins_with_ten_lines_and_no_block_is_of_another_language() -> None:
    assert len(BLOCKS) >= 5 and len(BLOCKS[0].strip().splitlines()) <= 10
    assert (ROOT / "README.md").read_text().count("```") == 2 * len(BLOCKS)


# Each block in a namespace of its own; one process, so that what they import is imported once.
RUN_BLOCKS = """
import contextlib, io, json, sys
for block in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(block, block, "exec"), {"__name__": "__main__"})
    assert shown.getvalue().strip(), f"nothing is printed by {block}"
"""


@pytest.mark.slow
def test_every_block_of_the_readme_runs_alone_and_all_run_in_order() -> None:
    done = run_python(RUN_BLOCKS, json.dumps([*BLOCKS, "\n".join(BLOCKS)]))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("0[1-6]_*.ipynb")), ids=str)
def test_captions_have_the_papers_part_ours_and_the_reason(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "*Differs" in prose and "because*" in prose
    assert re.search(
        r"words[.(]", code
    )  # ours, from the numbers; says the paper's part where prose does not
    shown = "".join(
        "".join(o.get("data", {}).get("text/markdown", ""))
        for c in cells
        for o in c.get("outputs", [])
    )
    assert "*Ours:*" in shown and "*Paper:*" in prose + shown
