"""What readers of the committed notebooks see: every figure, and no cell that was left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tclib.support.places import NOTEBOOKS

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
FIGURE = re.compile(r"\bfigure_?\w*\(|_figure\(")


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_cell_that_draws_shows_its_figure(path: Path) -> None:
    drawing = [
        c for c in cells(path) if c["cell_type"] == "code" and FIGURE.search("".join(c["source"]))
    ]
    for cell in drawing:
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        assert "image/png" in kinds, "".join(cell["source"])
    assert drawing or path.stem[:2] in ("04", "07")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_cells_were_executed_once_in_order_and_none_failed(path: Path) -> None:
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for c in code for output in c["outputs"])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_captions_have_three_short_lines_at_most(path: Path) -> None:
    for cell in cells(path):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and re.match(r"\*\*[^*]+\*\*", text):
            caption = text.split("\n\n")[0]
            assert len(caption) <= 420, caption
