"""Shapes are checked while tests run; names in annotations exist."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from tclib.evaluation.metrics import kl_from, l0


def test_calls_of_a_wrong_shape_are_found_in_tests() -> None:
    with pytest.raises(TypeCheckError):
        l0(torch.zeros(3))
    with pytest.raises(TypeCheckError):
        l0(torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(TypeCheckError):
        kl_from(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))


SHAPED = ("Float", "Int", "Bool", "Shaped")


def _shape_strings(path: Path) -> list[ast.Constant]:
    """The strings in Float["..."], Int["..."], Bool["..."], whose names stand for no object."""
    return [
        part
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in SHAPED
        for part in ast.walk(node.slice)
        if isinstance(part, ast.Constant)
    ]


def test_every_name_is_defined() -> None:
    """Ruff and mypy look for undefined names with shape strings left out (they take those for names)."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    run = subprocess.run(
        [*command, "--output-format", "json", "tclib", "tests", "benchmarks"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    undefined = []
    for found in json.loads(run.stdout):
        line, column = found["location"]["row"], found["location"]["column"] - 1
        if not any(
            shape.lineno == line and shape.col_offset <= column < (shape.end_col_offset or 0)
            for shape in _shape_strings(Path(found["filename"]))
        ):
            undefined.append(f"{found['filename']}:{line}: {found['message']}")
    assert not undefined
