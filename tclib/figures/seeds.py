"""Figures 3 and 5 over training seeds."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclib.figures.style import BLUE, GREEN, VERMILION, plain, styled

COLOURS = (BLUE, VERMILION, GREEN)
MAX_K = 60  # as in the paper's Figure 5


@styled
def seeds_figure(gaps: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Left: SAE − transcoder CE at equal L0, a line a seed; right: the metric with the first k units kept.

    Columns of `gaps`: seed, model, l0, ce_gap; of `curves`: seed, units, k, value, original.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.2, 4.2))
    _lines(left, gaps, "model", "l0", "ce_gap")
    left.axhline(0, color="0.2", linewidth=1, linestyle="--")
    left.set_xscale("log")
    left.set_xlabel("L0 (mean active features a token)")
    left.set_ylabel("CE, SAE − transcoder (nats a token)")
    left.set_title("Figure 3: transcoders ahead above 0", fontsize=12)
    _lines(right, curves[curves["k"] <= MAX_K], "units", "k", "value")
    right.axhline(curves["original"].mean(), color="0.2", linewidth=1, linestyle="--")
    right.set_xlabel("k (units kept, by variance)")
    right.set_ylabel("Probability difference")
    right.set_title("Figure 5: dashed, the original model", fontsize=12)
    return figure


def _lines(axis: Axes, table: pd.DataFrame, by: str, x: str, y: str) -> None:
    """A line a seed, in the colour of what it is of."""
    for colour, (name, own) in zip(COLOURS, table.groupby(by, sort=False), strict=False):
        for i, (_, one) in enumerate(own.groupby("seed")):
            label = plain(str(name)) if i == 0 else None
            axis.plot(
                one[x], one[y], color=colour, linewidth=1.0, marker=".", alpha=0.75, label=label
            )
    axis.grid(alpha=0.25)
    if axis.lines:
        axis.legend()
