"""Imports point down, and the library stays behind lm.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tclib

FOLDER = Path(tclib.__file__).parent
# Bottom first: a module may import only what stands before it.
ORDER = [
    "runs",
    "packing",
    "progress",
    "demo",
    "geometry",
    "model_files",
    "lm",
    "metrics",
    "corpus",
    "dictionary",
    "formats",
    "objective",
    "tracking",
    "activations",
    "replace",
    "published",
    "attribution",
    "graph",
    "direct_effects",
    "influence",
    "attribution_graph",
    "prune",
    "graph_files",
    "graph_figure",
    "interventions",
    "examples",
    "features",
    "connections",
    "published_checks",
    "dashboard",
    "html",
    "blind",
    "predicates",
    "investigator",
    "latents",
    "train",
    "tasks",
    "components",
    "unit_ablation",
    "evaluate",
    "report",
    "presets",
    "reference",
    "plots",
    "task_figures",
    "steps",
    "circuits",
    "case_studies",
    "ratings",
    "comparison",
    "greater_than",
    "greater_than_report",
    "pipeline",
    "cli",
]


def imported(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tclib":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tclib."):
            found.add(str(node.module).split(".")[1])
    return found


def test_every_module_has_its_place() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module: str) -> None:
    above = set(ORDER[ORDER.index(module) :])
    assert not imported(module) & above


@pytest.mark.parametrize("module", sorted(set(ORDER) - {"geometry", "model_files", "lm", "demo"}))
def test_only_the_modules_of_the_model_know_transformers(module: str) -> None:
    assert "transformers" not in (FOLDER / f"{module}.py").read_text().split()
    assert "import transformers" not in (FOLDER / f"{module}.py").read_text()
