"""Every matplotlib figure: tables in, Figure out. Saving is `save_figure`, after the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tclib.support.runs import Step, record_extra

# Colour-blind safe (Okabe and Ito), and different in print: each kind has a marker of its own.
KIND_STYLE: dict[str, dict[str, Any]] = {
    "transcoder": {"color": "#0072B2", "marker": "o", "label": "transcoder"},
    "sae_mlp_out": {"color": "#D55E00", "marker": "s", "label": "SAE on mlp_out"},
    "sae_mlp_in": {"color": "#009E73", "marker": "^", "label": "SAE on mlp_in"},
}
FAMILY_STYLE: dict[str, dict[str, Any]] = {
    **KIND_STYLE,
    "transcoder topk": {**KIND_STYLE["transcoder"], "label": "transcoder, top-k"},
    "sae_mlp_out topk": {**KIND_STYLE["sae_mlp_out"], "label": "SAE on mlp_out, top-k"},
    "transcoder skip topk": {
        "color": "#56B4E9",
        "marker": "D",
        "label": "transcoder, top-k with skip",
    },
    "transcoder skip": {"color": "#56B4E9", "marker": "D", "label": "transcoder with skip"},
    "transcoder batch_topk": {
        "color": "#009E73",
        "marker": "^",
        "label": "transcoder, batch top-k",
    },
    "transcoder jumprelu": {"color": "#CC79A7", "marker": "v", "label": "transcoder, JumpReLU"},
}
OTHER_STYLE: dict[str, Any] = {"color": "0.4", "marker": "x"}
SAVED_DPI = 150


def save_figure(figure: Figure, step: Step, name: str) -> Figure:
    """Write `<name>.png` and `<name>.pdf` into the step's folder and its manifest; return it."""
    for suffix in ("png", "pdf"):
        path = step.folder / f"{name}.{suffix}"
        figure.savefig(path, dpi=SAVED_DPI, bbox_inches="tight")
        record_extra(step, path)
    plt.close(figure)  # or a notebook would show it twice
    return figure


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
    figure, axes = plt.subplots(
        1, n_panels, figsize=(5.2 * n_panels, 4.6), squeeze=False, layout="constrained"
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
    table = table if "family" in table else table.assign(family=table["kind"])
    # The k of a top-k dictionary is its L0: only λ needs a label.
    has_label = ~table["family"].str.contains("topk")
    smallest = table.loc[has_label, "sparsity"].min()
    exponent = int(np.floor(np.log10(smallest))) if has_label.any() else 0
    for family, points in table.groupby("family", sort=False):
        points = points.sort_values("l0")
        style = FAMILY_STYLE.get(str(family), {**OTHER_STYLE, "label": str(family)})
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
        if column != "dead_share":
            axis.set_yscale("log")
        else:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
            axis.set_ylim(0, max(0.01, 1.1 * log[column].max()))
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
        "ce_recovered": "Share of CE recovered",
    }
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        bars = axis.bar(table["layer"].astype(str), table[column], color="#0072B2")
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.set_xlabel("Layer")
        axis.set_ylabel(label)
        axis.margins(y=0.15)
    return figure


def probability_heatmap(
    probabilities: np.ndarray,
    title: str,
    numbers: Sequence[int] = range(100),
    answers: Sequence[int] = range(100),
) -> Figure:
    """p(answer | first year): rows are the prompt's YY, columns the predicted YY, or its tens digit."""
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    is_digits = len(answers) <= 10
    # A square-root-like scale: late first years leave few answers, which share all the mass.
    scale = PowerNorm(0.4, vmin=0)
    extent = (answers[0] - 0.5, answers[-1] + 0.5, numbers[0] - 0.5, numbers[-1] + 0.5)
    image = axis.imshow(
        probabilities, origin="lower", cmap="viridis", norm=scale, aspect="auto", extent=extent
    )
    edge = [number / 10 - 0.5 if is_digits else number for number in numbers]
    axis.plot(edge, list(numbers), color="white", linewidth=0.8, linestyle="--")
    axis.set_xlim(extent[:2])
    axis.set_xlabel(
        "Predicted tens digit of the second year" if is_digits else "Predicted second year YY"
    )
    axis.set_ylabel("First year YY in the prompt")
    axis.set_title(title)
    kind = "10 digits" if is_digits else f"{len(answers)} YY tokens"
    figure.colorbar(image, ax=axis, label=f"Probability among the {kind}")
    return figure


# ---------------------------------------------------------------------------------------------
# Circuits


def score_bars(tables: Mapping[str, pd.DataFrame], unit: str = "score") -> Figure:
    """Ranked tables side by side as horizontal bars, strongest on top: tokens or features.

    Each table has `score` and one of `token`, `feature`.
    """
    n_bars = max(len(table) for table in tables.values())
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(3.4 * len(tables), 0.9 + 0.19 * n_bars),
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        ranked = table.sort_values("score", ascending=True, kind="stable")
        is_token = "token" in ranked
        names = ranked["token"].map(repr) if is_token else ranked["feature"].astype(str)
        places = np.arange(len(ranked))
        colours = np.where(ranked["score"] >= 0, "#0072B2", "#D55E00")
        axis.barh(places, ranked["score"], color=colours, height=0.75)
        axis.set_yticks(places, [name.replace("$", r"\$") for name in names], fontsize=7)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel(unit, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.margins(y=0.01)
    return figure


def head_heatmap(norms: np.ndarray, title: str, unit: str = "‖W_V W_O f‖") -> Figure:
    """A value a head: layers up, heads across, each cell with its number."""
    figure, axis = plt.subplots(
        figsize=(1.6 + 0.55 * norms.shape[1], 1.2 + 0.42 * norms.shape[0]), layout="constrained"
    )
    image = axis.imshow(norms, origin="lower", cmap="viridis", aspect="auto", vmin=0)
    middle = (norms.min() + norms.max()) / 2 if norms.size else 0.0
    for (layer, head), norm in np.ndenumerate(norms):
        colour = "white" if norm < middle else "black"
        axis.text(head, layer, f"{norm:.2g}", ha="center", va="center", color=colour, fontsize=7)
    axis.set_xticks(range(norms.shape[1]))
    axis.set_yticks(range(norms.shape[0]))
    axis.set_xlabel("Head")
    axis.set_ylabel("Layer")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axis, label=unit)
    return figure


def predicted_against_actual(table: pd.DataFrame, unit: str) -> Figure:
    """Change of the root when a feature is taken out, against its total effect over all paths.

    Left with nothing frozen, right with the norm scales frozen.

    The table is that of `interventions.ablation_table`.
    """
    figure, axes = plt.subplots(
        1, 2, figsize=(8.6, 4.1), sharex=True, sharey=True, layout="constrained"
    )
    titles = {"actual": "nothing frozen", "actual_norms_frozen": "norm scales frozen"}
    layers = sorted(table["layer"].unique())
    markers = dict(zip(layers, "os^Dv*Xph<>P" * (1 + len(layers) // 12), strict=False))
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for layer, points in table.groupby("layer"):
            axis.scatter(
                points["predicted_total"],
                points[column],
                s=18,
                marker=markers[layer],
                alpha=0.7,
                label=f"layer {layer}",
            )
        both = table[["predicted_total", column]].to_numpy()
        ends = [both.min(), both.max()]
        axis.plot(ends, ends, color="black", linewidth=0.8, linestyle="--", label="exact")
        r = np.corrcoef(both.T)[0, 1]
        axis.set_title(f"{title}: r = {r:.3f}, {len(table)} features", fontsize=9)
        axis.set_xlabel("Predicted change, all paths (logits)")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"Change of {unit}")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


OF_ALL: dict[str, Any] = {"marker": "o"}
OF_ACTIVE: dict[str, Any] = {"marker": "o", "mfc": "white", "linestyle": "-."}
MANY_PAIRS, FAINT = 6, {"alpha": 0.25, "linewidth": 1, "markersize": 0}


def _overlap_curves(axis: Axes, lines: pd.DataFrame, ks: Sequence[int], **style: Any) -> None:
    """Mean overlap at each k, over all features and over those that are active together."""
    axis.plot(ks, lines[[f"overlap_{k}" for k in ks]].mean(), **OF_ALL, **style)
    axis.plot(ks, lines[[f"active_overlap_{k}" for k in ks]].mean(), **OF_ACTIVE, **style)


def connection_agreement(table: pd.DataFrame, paper: pd.DataFrame) -> Figure:
    """Top-k overlap of pullback and mean pullback: ours by pair of layers, the paper's two features.

    `table` is that of `connections.compare_connections`; `paper` has feature, earlier_layer, k, overlap.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
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
            color="#D55E00",
            marker="x",
            linestyle=style,
            label=f"paper, {name}",
        )
    left.set_xlabel("k")
    left.set_xticks(ks)
    left.set_ylim(0, 1)
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_ylabel("Overlap of the top k (mean over features)")
    which = f" (bold: mean of {len(pairs)} pairs)" if are_many else ""
    left.plot([], [], color="black", label=f"ours, of all features{which}", **OF_ALL)
    left.plot([], [], color="black", label=f"ours, of co-active features{which}", **OF_ACTIVE)
    left.legend(fontsize=7, frameon=False)
    names = [f"{layer} ← {earlier}" for (layer, earlier), _ in pairs]
    right.set_xticks(range(len(names)), names)
    if are_many:
        right.tick_params(axis="x", rotation=90, labelsize=7)
    right.set_xlabel("Layers of the feature ← of its sources")
    right.set_ylabel("Spearman (a dot a feature, bar: mean)")
    right.axhline(0, color="grey", linewidth=0.6)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure
