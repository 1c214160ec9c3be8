"""Figures of the circuit tools: ranked tokens and features, heads, predictions, connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tclib.figures.style import (
    BLUE,
    GREEN,
    PINK,
    VERMILION,
    legend_below,
    plain,
    styled,
    write_cells,
)


@styled
def score_bars(tables: Mapping[str, pd.DataFrame], unit: str = "score") -> Figure:
    """Ranked tables side by side as horizontal bars, strongest on top: tokens or features.

    Each table has `score` and one of `token`, `feature`.
    """
    n_bars = max(len(table) for table in tables.values())
    size = (3.4 * len(tables), 0.9 + 0.19 * n_bars)
    figure, axes = plt.subplots(1, len(tables), figsize=size, squeeze=False)
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        ranked = table.sort_values("score", ascending=True, kind="stable")
        is_token = "token" in ranked
        names = ranked["token"].map(repr) if is_token else ranked["feature"].astype(str)
        places = np.arange(len(ranked))
        colours = np.where(ranked["score"] >= 0, BLUE, VERMILION)
        axis.barh(places, ranked["score"], color=colours, height=0.75)
        axis.set_yticks(places, list(map(plain, names)), fontsize=7)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel(plain(unit), fontsize=8)
        axis.set_title(plain(title))
        axis.margins(y=0.01)
    return figure


@styled
def head_heatmap(norms: np.ndarray, title: str, unit: str = "‖W_V W_O f‖") -> Figure:
    """A value a head: layers up, heads across, each cell with its number."""
    figure, axis = plt.subplots(figsize=(1.6 + 0.55 * norms.shape[1], 1.2 + 0.42 * norms.shape[0]))
    image = axis.imshow(norms, origin="lower", cmap="viridis", aspect="auto", vmin=0)
    middle = (norms.min() + norms.max()) / 2 if norms.size else 0.0
    write_cells(axis, norms, ".2g", norms < middle)
    axis.set(xticks=range(norms.shape[1]), yticks=range(norms.shape[0]))
    axis.set(xlabel="Head", ylabel="Layer", title=plain(title))
    figure.colorbar(image, ax=axis, label=plain(unit))
    return figure


@styled
def predicted_against_actual(
    table: pd.DataFrame, panels: Mapping[str, str], unit: str, measured: str = "actual"
) -> Figure:
    """Change of the root when a feature is taken out, against predictions to first order, colours by layer.

    Axes are linear up to a hundredth of the change that a tenth of all exceed, and logarithmic beyond, so that
    small changes are seen.

    Args:
        table: that of `circuits.interventions.ablation_table`.
        panels: the column of a prediction by the panel's title.
        unit: of the root.
        measured: the column of measured changes.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(0.8 + 2.9 * len(panels), 3.6), sharex=True, sharey=True
    )
    layers = sorted(table["layer"].unique())
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.95, len(layers)))
    shuffled = table.sample(frac=1.0, random_state=0)  # no layer lies on top of all others
    rows = [layers.index(layer) for layer in shuffled["layer"]]
    options = {"s": 7, "c": colours[rows], "alpha": 0.7, "linewidths": 0}
    for axis, (title, column) in zip(axes, panels.items(), strict=True):
        is_image = len(table) > 2_000
        axis.scatter(shuffled[column], shuffled[measured], rasterized=is_image, **options)
        axis.set_title(plain(title))
        _near_and_far(axis, table[[measured, *panels.values()]].abs().to_numpy())
    axes[0].set_ylabel(f"Measured change of {plain(unit)}")
    figure.supxlabel("Predicted change (dashed: exact)", fontsize=9)
    for layer, colour in zip(layers, colours, strict=True):
        axes[-1].scatter([], [], s=14, color=colour, label=str(layer))
    axes[-1].legend(title="layer", loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _near_and_far(axis: Axes, sizes: np.ndarray) -> None:
    """The same symlog scale on both axes, and the diagonal."""
    largest = float(sizes.max())
    linear = float(np.quantile(sizes, 0.9)) / 100 or 1.0
    axis.plot([-largest, largest], [-largest, largest], "k--", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=linear)
    axis.set_yscale("symlog", linthresh=linear)
    decades = 10.0 ** np.arange(
        np.ceil(np.log10(linear)) + 1, np.log10(max(largest, linear)) + 1, 2
    )
    ticks = [*-decades[::-1], 0.0, *decades]
    axis.set(xticks=ticks, yticks=ticks)
    axis.grid(alpha=0.25)


CIRCUITS: dict[str, dict[str, Any]] = {
    "graph": {"color": BLUE, "marker": "o", "label": "features by influence in the graph"},
    "gradient": {"color": GREEN, "marker": "^", "label": "features by activation × gradient"},
    "random": {"color": "0.45", "marker": "", "label": "random active features"},
    "neurons": {"color": VERMILION, "marker": "s", "label": "neurons by activation × gradient"},
    "pruned graph": {
        "color": "black",
        "marker": "*",
        "markersize": 11,
        "label": "the pruned graph",
    },
}


@styled
def faithfulness_over_size(summary: pd.DataFrame) -> Figure:
    """Score of circuits kept alone (left) and taken out (right) over their size, errors dropped and kept.

    `summary` is `circuits.faithfulness.faithfulness_summary` of one metric. Bands are its low and high.
    """
    figure, axes = plt.subplots(2, 2, figsize=(9.4, 6.4), sharex=True, sharey=True)
    titles = {"keep": "kept alone", "remove": "taken out"}
    for row, errors in zip(axes, ("dropped", "kept"), strict=True):
        for axis, (direction, title) in zip(row, titles.items(), strict=True):
            shown = summary["errors"].isin([errors, "none"]) & (summary["direction"] == direction)
            _circuit_curves(axis, summary[shown])
            axis.set_title(f"{title}, errors {errors}")
        row[0].set_ylabel("Score (0: empty circuit, 1: full)")
    for axis in axes[1]:
        axis.set_xlabel("Features or neurons of the circuit")
    legend_below(figure, axes[0, 0], ncols=3)
    return figure


def _circuit_curves(axis: Axes, lines: pd.DataFrame) -> None:
    for kind, style in CIRCUITS.items():
        here = lines["is_pruned_size"] if kind == "pruned graph" else ~lines["is_pruned_size"]
        own = lines[here & (lines["kind"] == kind)].sort_values("k")
        axis.plot(own["k"], own["score"], linewidth=1.3, **{"markersize": 4, **style})
        if kind == "pruned graph":
            axis.vlines(own["k"], own["low"], own["high"], color="black", linewidth=1)
        else:
            axis.fill_between(
                own["k"], own["low"], own["high"], color=style["color"], alpha=0.13, linewidth=0
            )
    for level in (0, 1):
        axis.axhline(level, color="black", linewidth=0.6, linestyle=":")
    axis.set(xscale="log", ylim=(-1.0, 2.0))
    axis.grid(alpha=0.25)


OF_ALL: dict[str, Any] = {"marker": "o"}
OF_ACTIVE: dict[str, Any] = {"marker": "o", "mfc": "white", "linestyle": "-."}
RANDOM: dict[str, Any] = {"color": PINK, "linewidth": 2, "markersize": 3}
MANY_PAIRS, FAINT = 6, {"alpha": 0.25, "linewidth": 1, "markersize": 0}


def _overlap_curves(axis: Axes, lines: pd.DataFrame, ks: Sequence[int], **style: Any) -> None:
    """Mean overlap at each k, over all features and over those that are active together."""
    axis.plot(ks, lines[[f"overlap_{k}" for k in ks]].mean(), **OF_ALL, **style)
    axis.plot(ks, lines[[f"active_overlap_{k}" for k in ks]].mean(), **OF_ACTIVE, **style)


@styled
def connection_agreement(table: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Top-k overlap of pullback and mean pullback: ours by pair of layers, the paper's two features.

    Beside it that of random decoder directions. `table` is that of `features.connections.compare_connections`;
    `paper` has feature, earlier_layer, k, overlap.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8))
    ks = [int(str(c).removeprefix("overlap_")) for c in table if str(c).startswith("overlap_")]
    pairs = list(table.groupby(["layer", "earlier_layer"]))
    are_many = len(pairs) > MANY_PAIRS
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(pairs)))
    for (_, lines), colour in zip(pairs, colours, strict=True):
        _overlap_curves(left, lines, ks, color=colour, **(FAINT if are_many else {}))
    if are_many:
        _overlap_curves(left, table, ks, color="black", linewidth=2.5)
    drawn = table[[c for c in table if str(c).startswith("random_")]]
    _overlap_curves(left, drawn.rename(columns=lambda c: c.removeprefix("random_")), ks, **RANDOM)
    _paper_overlaps(left, paper)
    left.set(xlabel="k", ylabel="Overlap of the top k (mean over features)", xticks=ks, ylim=(0, 1))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    which = f" (bold: mean of {len(pairs)} pairs)" if are_many else ""
    left.plot([], [], color="black", label=f"ours, of all features{which}", **OF_ALL)
    left.plot([], [], color="black", label=f"ours, of co-active features{which}", **OF_ACTIVE)
    left.plot([], [], label="of both, random decoders", **RANDOM)
    legend_below(figure, left, ncols=3)
    if ks:  # of a narrow transcoder not even ten features make a tenth
        _overlaps_by_pair(right, pairs, colours, ks[0])
    if are_many:
        right.tick_params(axis="x", rotation=90, labelsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def _paper_overlaps(axis: Axes, paper: pd.DataFrame) -> None:
    for style, (name, lines) in zip(("--", ":"), paper.groupby("name", sort=False), strict=False):
        x, y, label = lines["k"], lines["overlap"], f"paper, {name}"
        axis.plot(x, y, color=VERMILION, marker="x", linestyle=style, label=label)


def _overlaps_by_pair(
    axis: Axes, pairs: Sequence[tuple[Any, pd.DataFrame]], colours: np.ndarray, k: int
) -> None:
    """Every feature's overlap of all features at one k, by pair of layers, with means of ours and of random."""
    for i, ((_, lines), colour) in enumerate(zip(pairs, colours, strict=True)):
        spread = np.linspace(-0.25, 0.25, len(lines)) if len(lines) > 1 else np.zeros(1)
        axis.scatter(i + spread, lines[f"overlap_{k}"], s=14, color=colour)
        axis.hlines(lines[f"overlap_{k}"].mean(), i - 0.35, i + 0.35, color="black", linewidth=1.2)
        random = lines[f"random_overlap_{k}"].mean()
        axis.hlines(random, i - 0.35, i + 0.35, color=PINK, linewidth=1.2, linestyle="--")
    axis.set_xticks(range(len(pairs)), [f"{layer} ← {earlier}" for (layer, earlier), _ in pairs])
    axis.set_xlabel("Layers of the feature ← of its sources")
    axis.set_ylabel(f"Top {k} (bars: means, dashed: random)")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
