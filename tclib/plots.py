"""Every matplotlib figure: tables in, Figure out. Saving is `save_figure`, after the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclib.runs import Step, record_extra

# Colour-blind safe (Okabe and Ito), and different in print: each kind has a marker of its own.
KIND_STYLE: dict[str, dict[str, Any]] = {
    "transcoder": {"color": "#0072B2", "marker": "o", "label": "transcoder"},
    "sae_mlp_out": {"color": "#D55E00", "marker": "s", "label": "SAE on mlp_out"},
    "sae_mlp_in": {"color": "#009E73", "marker": "^", "label": "SAE on mlp_in"},
}
SAVED_DPI = 150


def save_figure(figure: Figure, step: Step, name: str) -> Figure:
    """Write `<name>.png` and `<name>.pdf` into the step's folder and its manifest; return it."""
    for suffix in ("png", "pdf"):
        path = step.folder / f"{name}.{suffix}"
        figure.savefig(path, dpi=SAVED_DPI, bbox_inches="tight")
        record_extra(step, path)
    return figure


def sparsity_faithfulness(
    tables: Mapping[str, pd.DataFrame],
    paper: pd.DataFrame | None = None,
    paper_title: str = "Paper: Pythia-410M, layer 15",
) -> Figure:
    """Figure 3: CE against L0, one panel a model, the paper's published points in the last.

    Each table has kind, l0, ce, ce_original, ce_mean_ablated, l1_coefficient and the bounds
    ce_increase_low and ce_increase_high of the paired interval.
    """
    n_panels = len(tables) + (paper is not None)
    figure, axes = plt.subplots(
        1, n_panels, figsize=(5.2 * n_panels, 4.4), squeeze=False, layout="constrained"
    )
    for axis, (title, table) in zip(axes[0], tables.items(), strict=False):
        _pareto_panel(axis, table)
        axis.set_title(title)
        _draw_baselines(axis, table)
    if paper is not None:
        _pareto_panel(axes[0][-1], paper)
        axes[0][-1].set_title(paper_title)
        axes[0][-1].set_xlim(0, 250)  # the figure's own axes: one SAE point, L0 505, lies outside
        axes[0][-1].set_ylim(3.32, 3.42)
    axes[0][0].legend(loc="upper right", frameon=False)
    return figure


def _pareto_panel(axis: Axes, table: pd.DataFrame) -> None:
    for kind, points in table.groupby("kind", sort=False):
        points = points.sort_values("l0")
        axis.plot(points["l0"], points["ce"], markersize=6, linewidth=1.3, **KIND_STYLE[str(kind)])
        if "ce_increase_low" in points:
            bounds = points[["ce_increase_low", "ce_increase_high"]].add(
                points["ce_original"], axis=0
            )
            errors = np.abs(bounds.to_numpy().T - points["ce"].to_numpy())
            axis.errorbar(
                points["l0"],
                points["ce"],
                yerr=errors,
                fmt="none",
                ecolor=KIND_STYLE[str(kind)]["color"],
                capsize=2,
                linewidth=0.8,
            )
        _label_l1(axis, points, above=kind != "transcoder")
    axis.set_xlabel("L0 (mean active features a token)")
    axis.set_ylabel("Cross-entropy with the MLP replaced (nats a token)")
    axis.grid(alpha=0.25)


def _label_l1(axis: Axes, points: pd.DataFrame, above: bool) -> None:
    """Each point's λ, above the SAEs' and below the transcoders' so that the two never collide."""
    for point in points.itertuples():
        axis.annotate(
            f"{point.l1_coefficient:.2g}",
            (point.l0, point.ce),
            textcoords="offset points",
            xytext=(6, 7) if above else (-6, -7),
            ha="left" if above else "right",
            va="bottom" if above else "top",
            fontsize=7,
            color="0.35",
            annotation_clip=True,
        )


def _draw_baselines(axis: Axes, table: pd.DataFrame) -> None:
    """The original model as a line; mean ablation as a line where it fits, else as a note."""
    original, ablated = table["ce_original"].iloc[0], table["ce_mean_ablated"].iloc[0]
    axis.axhline(original, color="0.2", linewidth=1, linestyle="--")
    top = table["ce"].max()
    span = top - original
    axis.set_ylim(original - 0.16 * span, top + 0.25 * span)
    axis.text(
        0.02,
        original,
        f"original model {original:.3f}",
        transform=axis.get_yaxis_transform(),
        va="top",
        fontsize=8,
        color="0.2",
    )
    axis.text(
        0.02,
        0.98,
        f"MLP mean-ablated: {ablated:.3f} (off the axis)" if ablated > top + 0.25 * span else "",
        transform=axis.transAxes,
        va="top",
        fontsize=8,
        color="0.2",
    )
    axis.set_xlim(left=0, right=table["l0"].max() * 1.12)


def training_curves(
    log: pd.DataFrame, columns: Sequence[str] = ("loss", "l0", "fvu", "dead_share")
) -> Figure:
    """The training log: one panel a quantity, one line a dictionary, over millions of tokens."""
    labels = {
        "loss": "Training loss",
        "l0": "L0 (features a token)",
        "fvu": "FVU",
        "dead_share": "Share of dead features",
    }
    figure, axes = plt.subplots(
        1, len(columns), figsize=(3.7 * len(columns), 3.3), layout="constrained"
    )
    names = list(dict.fromkeys(log["dictionary"]))
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(names)))
    for axis, column in zip(axes, columns, strict=True):
        for name, colour in zip(names, colours, strict=True):
            lines = log[log["dictionary"] == name]
            axis.plot(
                lines["n_tokens"] / 1e6, lines[column], color=colour, label=name, linewidth=1.2
            )
        axis.set_xlabel("Training tokens (millions)")
        axis.set_ylabel(labels[column])
        axis.grid(alpha=0.25)
        if column in ("loss", "fvu"):
            axis.set_yscale("log")
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=min(4, len(names)),
        fontsize=7,
        frameon=False,
    )
    return figure


def layer_faithfulness(table: pd.DataFrame) -> Figure:
    """For the transcoder of each layer: L0, FVU and the share of the MLP's CE that it recovers."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = {
        "l0": "L0 (features a token)",
        "fvu": "FVU",
        "ce_recovered": "CE recovered (1: original, 0: mean-ablated)",
    }
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(table["layer"].astype(str), table[column], color="#0072B2")
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.set_xlabel("Layer")
        axis.set_ylabel(label)
        axis.margins(y=0.15)
    return figure


def probability_heatmap(probabilities: np.ndarray, title: str) -> Figure:
    """p(second year | first year): rows are the prompt's YY, columns the predicted YY."""
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    image = axis.imshow(probabilities, origin="lower", cmap="viridis", vmin=0, aspect="auto")
    axis.plot([0, 99], [0, 99], color="white", linewidth=0.8, linestyle="--")
    axis.set_xlabel("Predicted second year YY")
    axis.set_ylabel("First year YY in the prompt")
    axis.set_title(title)
    figure.colorbar(image, ax=axis, label="Probability among the 100 YY tokens")
    return figure
