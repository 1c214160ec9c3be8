"""Figures of training and of the sweep (paper Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from tclib.figures.style import BLUE, FAMILY_STYLE, family_style, legend_below, plain, styled


@styled
def sparsity_faithfulness(
    tables: Mapping[str, pd.DataFrame],
    paper: pd.DataFrame | None = None,
    paper_title: str = "Paper: Pythia-410M, layer 15",
) -> Figure:
    """Figure 3: CE against L0, one panel a model, the paper's published points in the last.

    Each table has kind or family, l0, ce, ce_original, ce_mean_ablated, sparsity (λ or k) and the
    bounds ce_increase_low and ce_increase_high of the paired interval.
    """
    n_panels = len(tables) + (paper is not None)
    figure, axes = plt.subplots(1, n_panels, figsize=(5.2 * n_panels, 4.6), squeeze=False)
    for axis, (title, table) in zip(axes[0], tables.items(), strict=False):
        _pareto_panel(axis, table)
        axis.set_title(plain(title), fontsize=12)
        _draw_baselines(axis, table)
    if paper is not None:
        _pareto_panel(axes[0][-1], paper)
        axes[0][-1].set_title(paper_title, fontsize=12)
        # The figure's own axes: one SAE point, L0 505, lies outside.
        axes[0][-1].set(xlim=(0, 250), ylim=(3.32, 3.42))
    axes[0][0].legend(loc="upper right", fontsize=10)
    return figure


def _pareto_panel(axis: Axes, table: pd.DataFrame) -> None:
    table = table if "family" in table else table.assign(family=table["kind"])
    # The k of a top-k dictionary is its L0: only λ needs a label.
    has_label = ~table["family"].str.contains("topk")
    smallest = table.loc[has_label, "sparsity"].min()
    exponent = int(np.floor(np.log10(smallest))) if has_label.any() else 0
    for n_drawn, (family, points) in enumerate(table.groupby("family", sort=False)):
        points = points.sort_values("l0")
        style = family_style(str(family), n_drawn)
        axis.plot(points["l0"], points["ce"], markersize=5, linewidth=1.3, **style)
        if "ce_increase_low" in points:
            _error_bars(axis, points, style["color"])
        if has_label[points.index].all():
            others = table[table["family"] != family].sort_values("l0")
            _label_sparsities(axis, points, others, exponent, style["color"])
    labels = f"; labels: λ / 10$^{{{exponent}}}$" if has_label.any() else ""
    axis.set_xlabel(f"L0 (mean active features a token){labels}")
    axis.set_ylabel("CE with the MLP replaced (nats a token)")
    axis.grid(alpha=0.25)


def _error_bars(axis: Axes, points: pd.DataFrame, colour: str) -> None:
    bounds = points[["ce_increase_low", "ce_increase_high"]].add(points["ce_original"], axis=0)
    errors = np.abs(bounds.to_numpy().T - points["ce"].to_numpy())
    axis.errorbar(
        points["l0"], points["ce"], errors, fmt="none", ecolor=colour, capsize=2, linewidth=0.8
    )


def _label_sparsities(
    axis: Axes, points: pd.DataFrame, others: pd.DataFrame, exponent: int, colour: str
) -> None:
    """Each point's λ, on the side that faces away from the other curves."""
    for l0, ce, value in points[["l0", "ce", "sparsity"]].to_numpy():
        is_above = ce >= np.interp(l0, others["l0"], others["ce"])
        axis.annotate(
            f"{value / 10.0**exponent:.3g}",
            (l0, ce),
            textcoords="offset points",
            xytext=(5, 5) if is_above else (-5, -5),
            ha="left" if is_above else "right",
            va="bottom" if is_above else "top",
            fontsize=8,
            color=colour,
            annotation_clip=True,
        )


def _draw_baselines(axis: Axes, table: pd.DataFrame) -> None:
    """The original model as a line; mean ablation as a note, since it is far off the axis."""
    original, ablated = table["ce_original"].iloc[0], table["ce_mean_ablated"].iloc[0]
    span = table["ce"].max() - original
    axis.axhline(original, color="0.2", linewidth=1, linestyle="--")
    axis.set_ylim(original - 0.2 * span, table["ce"].max() + 0.3 * span)
    axis.set_xlim(left=0, right=table["l0"].max() * 1.12)
    axis.annotate(
        f"original model {original:.3f}, MLP mean-ablated {ablated:.3f}",
        (0.02, original),
        xycoords=axis.get_yaxis_transform(),
        textcoords="offset points",
        xytext=(0, -6),
        va="top",
        fontsize=8,
        color="0.2",
    )


@styled
def over_tokens(table: pd.DataFrame, title: str) -> Figure:
    """CE and L0 against training tokens, a line a kind: has training ended?

    Columns: kind, n_tokens, ce, l0, ce_original, and the bounds of the CE's interval. Every point is a
    training of its own, with its own decay of the learning rate.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.9))
    for kind, own in table.groupby("kind", sort=False):
        style = {**FAMILY_STYLE[str(kind)], "markersize": 5, "linewidth": 1.3}
        millions = own["n_tokens"] / 1e6
        left.plot(millions, own["ce"], **style)
        _error_bars(left, own.assign(l0=millions), style["color"])
        right.plot(millions, own["l0"], **style)
    left.axhline(table["ce_original"].iloc[0], color="0.2", linewidth=1, linestyle="--")
    left.set_ylabel("CE with the MLP replaced (nats a token)")
    right.set_ylabel("L0 (mean active features a token)")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xscale("log")
        ticks = sorted(set(table["n_tokens"] / 1e6))
        axis.set_xticks(ticks, [f"{value:.3g}" for value in ticks], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("Training tokens (millions)")
        axis.grid(alpha=0.25)
    left.legend()
    figure.suptitle(plain(title), fontsize=12)
    return figure


@styled
def training_curves(
    log: pd.DataFrame, columns: Sequence[str] = ("loss", "l0", "fvu", "dead_share")
) -> Figure:
    """The training log: one panel a quantity, one line a dictionary, over millions of tokens."""
    labels = {
        "loss": "Loss of the batch",
        "l0": "L0 (features a token)",
        "fvu": "FVU",
        "dead_share": "Share of dead features",
    }
    figure, axes = plt.subplots(1, len(columns), figsize=(3.7 * len(columns), 3.3))
    names = list(dict.fromkeys(log["dictionary"]))
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(names)))
    for axis, column in zip(axes, columns, strict=True):
        for name, colour in zip(names, colours, strict=True):
            lines = log[log["dictionary"] == name]
            millions = lines["n_tokens"] / 1e6
            axis.plot(millions, lines[column], color=colour, label=name, linewidth=1.2)
        axis.set(xlabel="Training tokens (millions)", ylabel=labels[column])
        axis.grid(alpha=0.25)
        if column != "dead_share":
            axis.set_yscale("log")
        else:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_ylim(0, max(0.01, 1.1 * log[column].max()))
    legend_below(figure, axes[0], min(4, len(names)))
    return figure


@styled
def layer_faithfulness(table: pd.DataFrame) -> Figure:
    """For the transcoder of each layer: L0, FVU and the share of the MLP's CE that it recovers."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    panels = {
        "l0": "L0 (features a token)",
        "fvu": "FVU",
        "ce_recovered": "Share of CE recovered",
    }
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(table["layer"].astype(str), table[column], color=BLUE)
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.set(xlabel="Layer", ylabel=label)
        axis.margins(y=0.15)
    return figure
