"""Colours, markers and how a figure is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclib.support.files import new_file
from tclib.support.steps import Step, save_extra

# Colour-blind safe (Okabe and Ito), and different in print: each kind has a marker of its own.
BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
FAMILY_STYLE: dict[str, dict[str, Any]] = {
    "transcoder": {"color": BLUE, "marker": "o", "label": "transcoder"},
    "sae_mlp_out": {"color": VERMILION, "marker": "s", "label": "SAE on mlp_out"},
    "sae_mlp_in": {"color": GREEN, "marker": "^", "label": "SAE on mlp_in"},
    "transcoder topk": {"color": BLUE, "marker": "o", "label": "transcoder, top-k"},
    "sae_mlp_out topk": {"color": VERMILION, "marker": "s", "label": "SAE on mlp_out, top-k"},
    "transcoder skip topk": {
        "color": "#56B4E9",
        "marker": "D",
        "label": "transcoder, top-k with skip",
    },
    "transcoder skip": {"color": "#56B4E9", "marker": "D", "label": "transcoder with skip"},
    "transcoder batch_topk": {"color": GREEN, "marker": "^", "label": "transcoder, batch top-k"},
    "transcoder jumprelu": {"color": PINK, "marker": "v", "label": "transcoder, JumpReLU"},
}

OTHER_STYLE: dict[str, Any] = {"color": "0.4", "marker": "x"}
OTHER_MARKERS = "xv^<>Pd*"
SAVED_DPI = 150

# A function that draws a figure does so in the style that all share.
styled = plt.style.context(Path(__file__).with_name("tclib.mplstyle"))


def family_style(family: str, n_drawn: int) -> dict[str, Any]:
    """How a family of dictionaries is drawn; one of another width in its kind's colour, dashed, by its own marker."""
    if family in FAMILY_STYLE:
        return FAMILY_STYLE[family]
    kind, _, width = family.partition(" ×")
    own = FAMILY_STYLE.get(kind, {**OTHER_STYLE, "label": kind})
    marker = OTHER_MARKERS[n_drawn % len(OTHER_MARKERS)]
    label = f"{own['label']} ×{width}" if width else own["label"]
    return {**own, "marker": marker, "label": label, "linestyle": "--", "alpha": 0.7}


def plain(text: str) -> str:
    """`text` as matplotlib is to show it: a $ in a token, a name or a title begins no formula."""
    return text.replace("$", r"\$")


def legend_below(figure: Figure, axis: Axes, ncols: int, **options: Any) -> None:
    """One legend for all panels, of the lines of one of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, **options)


def write_cells(axis: Axes, values: np.ndarray, form: str, is_dark: np.ndarray) -> None:
    """The number in each cell of an image, white where the cell is dark."""
    for (row, column), value in np.ndenumerate(values):
        text, colour = format(value, form), "white" if is_dark[row, column] else "black"
        axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def save_whole(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format of the file's suffix."""
    with new_file(path) as temporary:
        _write(figure, path.suffix[1:], temporary)


def save_figure(figure: Figure, step: Step, name: str) -> Figure:
    """Write `<name>.png` and `<name>.pdf` into the step's folder and its manifest; return it."""
    for suffix in ("png", "pdf"):
        save_extra(step, f"{name}.{suffix}", partial(_write, figure, suffix))
    plt.close(figure)  # or a notebook would show it twice
    return figure


def _write(figure: Figure, suffix: str, path: Path) -> None:
    figure.savefig(path, format=suffix, dpi=SAVED_DPI, bbox_inches="tight")
