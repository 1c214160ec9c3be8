"""Checks of types and shapes, tiny random models of every geometry, a tokenizer of a hundred words."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadScopeScheduling

# What functions and dataclasses take and give is checked in every module of tclib that names shapes,
# and in no other: the hook costs most where small functions are called most, in the bundled grammar. An int
# is a float, as mypy has it. This stands before anything imports tclib.
PACKAGE = Path(__file__).parents[1] / "tclib"
with_shapes = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if "from jaxtyping import" in path.read_text()
]
install_import_hook(
    with_shapes, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

# Coverage is of what the hook makes of a module, so what measures it comes before the hook.
sys.meta_path.sort(key=lambda finder: not type(finder).__module__.startswith("slipcover"))

# Hashes of models are kept there; a user's own are left alone.
CACHE = tempfile.TemporaryDirectory(prefix="tclib-tests-")
os.environ["TCLIB_CACHE"] = CACHE.name

from tiny import GEOMETRIES, random_rows, runner_config_class, tiny_lm  # noqa: E402

from tclib.models.language_model import LanguageModel  # noqa: E402
from tclib.text.corpus import Corpus  # noqa: E402


class Shares(LoadScopeScheduling):
    """What two processes run is shared out by file, so that a file's fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        # These make data/runs/demo and read it: two at once would be in each other's way.
        uses_demo_run = file.endswith((".ipynb", "test_public_face.py"))
        return "the demo run" if uses_demo_run else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    return Shares(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first, which take longest, then files with slow tests: what comes last is short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path not in slow))


@pytest.fixture(params=GEOMETRIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_lm(request.param)


@pytest.fixture
def gpt2_lm() -> LanguageModel:
    return tiny_lm("gpt2")


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(random_rows(64), random_rows(16, seed=1), bos_id=0)


@pytest.fixture
def runner_config() -> Iterator[type]:
    """The class that the published pickles name, while a test lasts."""
    with runner_config_class() as made:
        yield made
