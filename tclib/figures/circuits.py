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

from tclib.figures.style import BLUE, VERMILION, plain, styled, write_cells


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
def predicted_against_actual(table: pd.DataFrame, unit: str) -> Figure:
    """Change of the root when a feature is taken out, against its total effect over all paths.

    Left with nothing frozen, right with the norm scales frozen.

    The table is that of `circuits.interventions.ablation_table`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.1), sharex=True, sharey=True)
    titles = {"actual": "nothing frozen", "actual_norms_frozen": "norm scales frozen"}
    layers = sorted(table["layer"].unique())
    markers = dict(zip(layers, "os^Dv*Xph<>P" * (1 + len(layers) // 12), strict=False))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for layer, points in table.groupby("layer"):
            x, y, marker = points["predicted_total"], points[column], markers[layer]
            axis.scatter(x, y, s=18, marker=marker, alpha=0.7, label=f"layer {layer}")
        both = table[["predicted_total", column]].to_numpy()
        ends = [both.min(), both.max()]
        axis.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="exact")
        r = np.corrcoef(both.T)[0, 1]
        axis.set_title(f"{title}: r = {r:.3f}, {len(table)} features")
        axis.set_xlabel("Predicted change, all paths (logits)")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"Change of {plain(unit)}")
    axes[0].legend()
    return figure


OF_ALL: dict[str, Any] = {"marker": "o"}
OF_ACTIVE: dict[str, Any] = {"marker": "o", "mfc": "white", "linestyle": "-."}
MANY_PAIRS, FAINT = 6, {"alpha": 0.25, "linewidth": 1, "markersize": 0}


def _overlap_curves(axis: Axes, lines: pd.DataFrame, ks: Sequence[int], **style: Any) -> None:
    """Mean overlap at each k, over all features and over those that are active together."""
    axis.plot(ks, lines[[f"overlap_{k}" for k in ks]].mean(), **OF_ALL, **style)
    axis.plot(ks, lines[[f"active_overlap_{k}" for k in ks]].mean(), **OF_ACTIVE, **style)


@styled
def connection_agreement(table: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Top-k overlap of pullback and mean pullback: ours by pair of layers, the paper's two features.

    `table` is that of `features.connections.compare_connections`; `paper` has feature, earlier_layer, k, overlap.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8))
    ks = [int(str(c).removeprefix("overlap_")) for c in table if str(c).startswith("overlap_")]
    pairs = list(table.groupby(["layer", "earlier_layer"]))
    are_many = len(pairs) > MANY_PAIRS
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(pairs)))
    for i, ((_, lines), colour) in enumerate(zip(pairs, colours, strict=True)):
        _overlap_curves(left, lines, ks, color=colour, **(FAINT if are_many else {}))
        spread = np.linspace(-0.15, 0.15, len(lines)) if len(lines) > 1 else np.zeros(1)
        right.scatter(i + spread, lines["spearman"], s=16, color=colour)
        right.hlines(lines["spearman"].mean(), i - 0.3, i + 0.3, color="black", linewidth=1)
    if are_many:
        _overlap_curves(left, table, ks, color="black", linewidth=2.5)
    for style, (name, lines) in zip(("--", ":"), paper.groupby("name", sort=False), strict=False):
        left.plot(
            lines["k"],
            lines["overlap"],
            color=VERMILION,
            marker="x",
            linestyle=style,
            label=f"paper, {name}",
        )
    left.set(xlabel="k", ylabel="Overlap of the top k (mean over features)", xticks=ks, ylim=(0, 1))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    which = f" (bold: mean of {len(pairs)} pairs)" if are_many else ""
    left.plot([], [], color="black", label=f"ours, of all features{which}", **OF_ALL)
    left.plot([], [], color="black", label=f"ours, of co-active features{which}", **OF_ACTIVE)
    left.legend()
    right.set_xticks(range(len(pairs)), [f"{layer} ← {earlier}" for (layer, earlier), _ in pairs])
    if are_many:
        right.tick_params(axis="x", rotation=90, labelsize=7)
    right.set_xlabel("Layers of the feature ← of its sources")
    right.set_ylabel("Spearman (a dot a feature, bar: mean)")
    right.axhline(0, color="grey", linewidth=0.6)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure
