"""The figures of the greater-than analysis (paper Figures 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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

STYLE: dict[str, dict[str, Any]] = {
    "transcoder features": {"color": BLUE, "linestyle": "-"},
    "neurons": {"color": VERMILION, "linestyle": "--"},
    "SAE features": {"color": GREEN, "linestyle": "-."},
    "random directions": {"color": "#777777", "linestyle": ":"},
    "transcoder of the shuffled MLP": {"color": "#8C5A2B", "linestyle": (0, (5, 2, 1, 2, 1, 2))},
    "transcoder features, without the one that hurts": {"color": PINK, "linestyle": "-"},
    "neurons, without the one that hurts": {"color": "#E69F00", "linestyle": "--"},
}
AT_MEAN, WITHOUT = ", others at their mean", "without the one that hurts"
LEVELS = {
    "original": "original",
    "all features": "all_features",
    "MLP's output bias alone": "mlp_bias_only",
    "MLP at its mean": "mlp_mean_ablated",
    "MLP at 0": "mlp_removed",
}
PAPER_K = 60  # to which the paper draws its curves
CURVES = {
    "dla": ("direct logit attribution", BLUE, "-"),
    "de_embedding": ("de-embedding score (rescaled)", VERMILION, "--"),
    "exact": ("brought by the head (rescaled)", GREEN, ":"),
}
MANY_LAYERS = 12  # above this, every third is named on an axis


@styled
def component_figure(components: pd.DataFrame) -> Figure:
    """What ablating each MLP and head costs, and each one's direct attribution to the root."""
    mlps = components[components["head"] < 0].sort_values("layer")
    heads = components[components["head"] >= 0]
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9))
    places = np.arange(len(mlps))
    axes[0].bar(places - 0.2, mlps["mean_drop"], 0.4, color=BLUE, label="mean ablation")
    axes[0].bar(
        places + 0.2,
        mlps["zero_drop"],
        0.4,
        color="#E69F00",
        hatch="//",
        edgecolor="black",
        linewidth=0.4,
        label="zero ablation",
    )
    if len(mlps) <= MANY_LAYERS:
        axes[0].set_xticks(places, [f"MLP {layer}" for layer in mlps["layer"]])
    else:
        axes[0].set_xticks(places[::3], mlps["layer"].iloc[::3].tolist())
        axes[0].set_xlabel("MLP of layer")
    axes[0].axhline(0, color="black", linewidth=0.6)
    axes[0].set_ylabel("Drop of the probability difference")
    axes[0].legend(fontsize=8)
    _head_panel(figure, axes[1], heads, "mean_drop", "Drop, mean ablation of heads")
    _head_panel(figure, axes[2], heads, "from_subject", "Direct attribution from the year (logits)")
    return figure


def _head_panel(figure: Figure, axis: Axes, heads: pd.DataFrame, column: str, title: str) -> None:
    grid = heads.pivot(index="layer", columns="head", values=column).to_numpy()
    size = np.abs(grid).max() or 1.0
    image = axis.imshow(grid, origin="lower", cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
    if grid.size <= 64:
        write_cells(axis, grid, ".2f", np.abs(grid) > 0.6 * size)
    axis.set_xticks(range(grid.shape[1]))
    axis.set_yticks(range(0, grid.shape[0], 1 if grid.shape[0] <= MANY_LAYERS else 3))
    axis.set(xlabel="Head", ylabel="Layer", title=title)
    figure.colorbar(image, ax=axis)


@styled
def feature_curve_figure(
    curves: pd.DataFrame, lags: pd.DataFrame, n_large: int = 3, n_small: int = 7
) -> Figure:
    """Figure 4: the first features large, the next as small multiples, in the order of the ranking.

    Over each stands how many years later its attribution lies than its de-embedding, if `lags` says so.
    """
    features = curves.drop_duplicates("feature").sort_values("rank")["feature"].tolist()
    large, small = features[:n_large], features[n_large : n_large + n_small]
    figure = plt.figure(figsize=(12.5, 6.4))
    panels: Any = figure.subfigures(2, 1, height_ratios=(3, 2))
    top, bottom = panels
    for axis, feature in zip(top.subplots(1, len(large), squeeze=False)[0], large, strict=True):
        draw_feature_curves(axis, curves, feature)
    top.axes[0].set_ylabel("Logits a unit of activation")
    small_axes = bottom.subplots(1, len(small), squeeze=False)[0] if small else ()
    for axis, feature in zip(small_axes, small, strict=True):
        draw_feature_curves(axis, curves, feature)
        axis.tick_params(labelsize=6)
        axis.set_xlabel("")
    for axis, feature in zip([*top.axes, *small_axes], features, strict=False):
        own = lags[lags["feature"] == feature]["lag"].tolist()
        axis.set_title(f"feature {feature}{_later(*own)}")
    legend_below(figure, top.axes[0], 3, fontsize=8)
    return figure


def _later(lag: int | None = None) -> str:
    if lag is None:
        return ""
    return f": {abs(lag)} {'later' if lag > 0 else 'earlier'}" if lag else ": same year"


def draw_feature_curves(axis: Axes, curves: pd.DataFrame, feature: int) -> None:
    """One feature's curves over the answers; scores are rescaled to the attribution's range."""
    own = curves[curves["feature"] == feature].sort_values("answer")
    low, high = own["dla"].min(), own["dla"].max()
    for column, (label, colour, style) in CURVES.items():
        values = own[column]
        if values.notna().sum() < 2:
            continue
        if column != "dla":
            span = values.max() - values.min()
            values = low + (values - values.min()) / (span if span else 1.0) * (high - low)
        marker = "o" if len(own) <= 10 else ""
        axis.plot(
            own["answer"],
            values,
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=3,
            label=label,
        )
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set_title(f"feature {feature}")
    axis.set_xlabel("Answer" if len(own) <= 10 else "YY", fontsize=8)


@styled
def ablation_figure(curves: pd.DataFrame, summary: dict[str, Any]) -> Figure:
    """Figure 5 left: keep only the first k, to 60 as the paper draws it and to all; by other rules; remove them."""
    figure, grid = plt.subplots(2, 3, figsize=(13.5, 8.0), sharey=True)
    own = curves[~curves["units"].str.contains(WITHOUT)]
    is_mean = own["units"].str.endswith(AT_MEAN)
    zero = own[~is_mean]
    by_mean = own[is_mean].assign(units=own["units"].str.removesuffix(AT_MEAN))
    variance = zero[zero["ranking"] == "variance"]
    panels = [
        ("keep the first k by variance, others at 0 (the paper's axis)", variance, PAPER_K),
        ("the same, all k", variance, None),
        ("keep the first k by variance, others at their mean", by_mean, None),
        (
            "keep the first k by attribution, others at 0",
            zero[zero["ranking"] == "attribution"],
            None,
        ),
        (
            "put the first k by attribution at 0",
            zero[zero["ranking"].str.startswith("removed")],
            None,
        ),
    ]
    for axis, (title, shown, to_k) in zip(grid.flat, panels, strict=False):
        draw_k_curves(axis, shown, to_k)
        _baselines(axis, summary)
        axis.set_title(title)
    _focus(grid[0, 0], zero, [summary[name] for name in LEVELS.values()])
    for axis in grid[:, 0]:
        axis.set_ylabel("Probability difference")
    grid[1, 2].axis("off")
    grid[1, 2].legend(*grid[0, 0].get_legend_handles_labels(), loc="center", fontsize=9)
    return figure


def _focus(axis: Axes, curves: pd.DataFrame, levels: Sequence[float]) -> None:
    """The range of features, of neurons and of what stands in for the MLP; a control may fall out of it below."""
    main = curves[curves["units"].isin(["transcoder features", "neurons"])]
    low, high = min(main["low"].min(), *levels), max(main["high"].max(), *levels)
    axis.set_ylim(low - 0.25 * (high - low), high + 0.04 * (high - low))


def draw_k_curves(axis: Axes, curves: pd.DataFrame, to_k: int | None = None) -> None:
    """Each kind of unit's curve with its band; linear to `to_k`, else linear to 10 and logarithmic beyond."""
    for units, own in curves.groupby("units", sort=False):
        own = own.sort_values("k")
        style = STYLE[str(units)]
        axis.plot(own["k"], own["value"], linewidth=1.4, label=str(units), **style)
        axis.fill_between(
            own["k"], own["low"], own["high"], color=style["color"], alpha=0.12, linewidth=0
        )
    if to_k is None:
        axis.set_xscale("symlog", linthresh=10, linscale=1.0)
    else:
        axis.set_xlim(0, to_k)
    axis.set_xlabel("k")
    axis.grid(alpha=0.25)


def _baselines(axis: Axes, summary: dict[str, Any]) -> None:
    """A line for the model as it is, and for each thing that can stand in for its MLP."""
    looks = [("black", "-"), (BLUE, "-"), (VERMILION, "--"), ("#444444", "-."), ("#444444", ":")]
    for (label, key), (colour, style) in zip(LEVELS.items(), looks, strict=True):
        value, text = summary[key], f"{label} ({summary[key]:.3f})"
        axis.axhline(value, color=colour, linestyle=style, linewidth=0.8, label=text)


@styled
def harmful_figure(
    curves: pd.DataFrame, features: pd.DataFrame, held_out: pd.DataFrame, summary: dict[str, Any]
) -> Figure:
    """Figure 5 right: the feature that hurts, the curves with and without it, the worst neuron beside it."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14.5, 4.4), width_ratios=(1, 1.25, 0.9)
    )
    draw_feature_curves(left, features, summary["harmful_feature"])
    left.set_ylabel("Logits a unit of activation")
    left.legend(fontsize=8)
    names = ["transcoder features", "neurons"]
    names += [f"{name}, {WITHOUT}" for name in names]
    own = curves[(curves["ranking"] == "variance") & curves["units"].isin(names)]
    draw_k_curves(middle, own)
    middle.axhline(summary["original"], color="black", linewidth=0.8, label="original")
    middle.set_ylabel("Probability difference")
    middle.legend(fontsize=8)
    _draw_held_out(right, held_out)
    return figure


def _draw_held_out(axis: Axes, held_out: pd.DataFrame) -> None:
    """What leaving out the worst unit adds on prompts that did not choose it, with its interval."""
    splits = held_out[["chosen_on", "tested_on"]].drop_duplicates()
    labels = [
        f"chosen on {one.chosen_on},\ntested on {one.tested_on}" for one in splits.itertuples()
    ]
    for kind, own in held_out.groupby("kind", sort=False):
        places = np.arange(len(own)) + (-0.1 if kind == "neurons" else 0.1)
        spread = [own["gain"] - own["low"], own["high"] - own["gain"]]
        label = {"neurons": "worst neuron"}.get(str(kind), "worst feature")
        marker = "s" if kind == "neurons" else "o"
        colour = STYLE[str(kind)]["color"]
        axis.errorbar(
            own["gain"], places, xerr=spread, fmt=marker, color=colour, capsize=3, label=label
        )
        for place, line in zip(places, own.itertuples(), strict=True):
            axis.annotate(
                f"{line.unit}",
                (line.gain, place),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axis.axvline(0, color="grey", linewidth=0.6)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(-0.5, len(labels) - 0.5)
    axis.set_xlabel("Gain without it (probability difference)")
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.legend(fontsize=8, loc="upper left")


@styled
def probability_heatmap(
    probabilities: np.ndarray,
    title: str,
    numbers: Sequence[int] = range(100),
    answers: Sequence[int] = range(100),
) -> Figure:
    """p(answer | first year): rows are the prompt's YY, columns the predicted YY, or its tens digit."""
    figure, axis = plt.subplots(figsize=(5.2, 4.4))
    is_digits = len(answers) <= 10
    # A square-root-like scale: late first years leave few answers, which share all the mass.
    scale = PowerNorm(0.4, vmin=0)
    extent = (answers[0] - 0.5, answers[-1] + 0.5, numbers[0] - 0.5, numbers[-1] + 0.5)
    image = axis.imshow(probabilities, origin="lower", norm=scale, aspect="auto", extent=extent)
    edge = [number / 10 - 0.5 if is_digits else number for number in numbers]
    axis.plot(edge, list(numbers), color="white", linewidth=0.8, linestyle="--")
    axis.set_xlim(extent[:2])
    predicted = "tens digit of the second year" if is_digits else "second year YY"
    axis.set_xlabel(f"Predicted {predicted}")
    axis.set_ylabel("First year YY in the prompt")
    axis.set_title(plain(title), fontsize=12)
    kind = "10 digits" if is_digits else f"{len(answers)} YY tokens"
    figure.colorbar(image, ax=axis, label=f"Probability among the {kind}")
    return figure
