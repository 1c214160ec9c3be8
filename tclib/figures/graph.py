"""The attribution graph as a layered figure: tokens across, layers up, roots on top.

Kinds differ by marker and fill, signs by line style as well as by colour, so that a print in grey can be
read. Labels are short (the layer and the token are on the axes) and every node has a slot of its own, as
wide as its label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from tclib.circuits.graph import AttributionGraph, edges_between
from tclib.figures.style import BLUE, VERMILION, plain, styled
from tclib.support.checked import checked
from tclib.support.declared import Natural
from tclib.support.errors import InputError

SLOT_INCHES, ROW_INCHES = 0.46, 0.42
SLOTS_A_ROW = 4
POSITIVE, NEGATIVE = BLUE, VERMILION
NODE_STYLE = {  # label in the legend, marker, fill, edge
    "feature": ("feature (its index)", "o", "white", "black"),
    "root": ("root", "*", "#F0E442", "black"),
    "embedding": ("token embedding", "s", "white", "black"),
    "error": ("transcoder error", "D", "#999999", "black"),
    "mlp": ("MLP without transcoder", "D", "black", "black"),
    "head": ("head, by source token", "h", "white", "black"),
    "position": ("position embedding", "v", "#CCCCCC", "#666666"),
    "attention_bias": ("attention bias", "^", "#CCCCCC", "#666666"),
    "decoder_bias": ("decoder bias", "^", "#666666", "#666666"),
    "supernode": ("supernode", "H", "#E6E6E6", "black"),
}


@dataclass(frozen=True)
class _Layout:
    """Where each node stands, in inches, and the bands of layers and columns of tokens."""

    x: np.ndarray
    y: np.ndarray
    bands: list[tuple[float, str]]
    columns: list[tuple[float, float, str]]  # left, right, token
    width: float
    height: float


@checked
@styled
def layered_graph(graph: AttributionGraph, title: str = "", max_edges: Natural = 150) -> Figure:
    """Draw a (pruned) graph; nodes that no shown edge touches are left out, roots are not.

    Args:
        graph: at most some hundred nodes; prune a larger one first.
        title: above the figure.
        max_edges: only the strongest are drawn, and the title says how many there are.

    Errors: `InputError` for a graph without nodes or with more than 400.
    """
    if not 0 < len(graph.nodes) <= 400:
        raise InputError(
            f"{len(graph.nodes)} nodes: a readable figure has 1 to 400; prune the graph first"
        )
    edges = sorted(edges_between(graph), key=lambda edge: -abs(edge[2]))
    shown = edges[:max_edges]
    touched = {end for source, target, _ in shown for end in (source, target)}
    nodes = graph.nodes[graph.is_root | graph.nodes.index.isin(touched)]
    layout = _lay_out(nodes, graph.tokens)
    figure, axis = plt.subplots(figsize=(layout.width + 1.0, layout.height + 1.3))
    _draw_frame(axis, layout)
    places = dict(zip(nodes.index, zip(layout.x, layout.y, strict=True), strict=True))
    _draw_edges(axis, shown, places)
    _draw_nodes(axis, nodes, layout)
    note = f"the {len(shown)} strongest of {len(edges)} edges" if len(edges) > len(shown) else ""
    axis.set_title(plain("; ".join(part for part in (title, note) if part)))
    _draw_legend(figure, nodes)
    return figure


def _lay_out(nodes: pd.DataFrame, tokens: tuple[str, ...]) -> _Layout:
    """One column a token with nodes, one band a layer; up to four nodes side by side in a cell."""
    cells = nodes.groupby(["layer", "pos"])
    rank = cells.cumcount().to_numpy()
    sizes = cells.size().reset_index(name="n")
    slots = sizes["n"].clip(upper=SLOTS_A_ROW).groupby(sizes["pos"]).max()
    rows = np.ceil(sizes["n"] / SLOTS_A_ROW).groupby(sizes["layer"]).max()
    right = (slots + 0.35).cumsum() * SLOT_INCHES
    left = right - (slots + 0.35) * SLOT_INCHES
    top = (rows + 0.5).cumsum() * ROW_INCHES
    bottom = top - (rows + 0.5) * ROW_INCHES
    x = left[nodes["pos"]].to_numpy() + (0.65 + rank % SLOTS_A_ROW) * SLOT_INCHES
    y = bottom[nodes["layer"]].to_numpy() + (0.75 + rank // SLOTS_A_ROW) * ROW_INCHES
    highest = int(nodes["layer"].max())
    has_root = (nodes["kind"] == "root").to_numpy()
    bands = []
    for layer in rows.index:
        only_roots = bool(has_root[nodes["layer"].to_numpy() == layer].all())
        name = "roots" if only_roots and layer == highest else f"layer {layer}"
        bands.append((float(bottom[layer]), "tokens" if layer < 0 else name))
    columns = [
        (float(left[pos]), float(right[pos]), _token_label(tokens, int(pos))) for pos in slots.index
    ]
    return _Layout(x, y, bands, columns, float(right.iloc[-1]), float(top.iloc[-1]))


def _token_label(tokens: tuple[str, ...], pos: int) -> str:
    if pos < 0:
        return "all tokens"
    text = tokens[pos].replace("\n", "⏎")
    return f"{text}\n{pos}"


def _draw_frame(axis: Axes, layout: _Layout) -> None:
    for i, (left, right, label) in enumerate(layout.columns):
        if i % 2:
            axis.axvspan(left, right, color="#F4F4F4", zorder=0)
        wide = max(4, int((right - left) / 0.085))
        shown = "\n".join(
            line if len(line) <= wide else line[: wide - 1] + "…" for line in label.split("\n")
        )
        axis.text((left + right) / 2, -0.08, plain(shown), ha="center", va="top", fontsize=7.5)
    for bottom, name in layout.bands:
        axis.axhline(bottom, color="#DDDDDD", linewidth=0.6, zorder=0)
        axis.text(-0.08, bottom + 0.3 * ROW_INCHES, name, ha="right", va="bottom", fontsize=7.5)
    axis.set(xlim=(-0.1, layout.width), ylim=(-0.05, layout.height))
    axis.axis("off")


def _draw_edges(
    axis: Axes, edges: list[tuple[int, int, float]], places: dict[int, tuple[float, float]]
) -> None:
    largest = max((abs(effect) for *_, effect in edges), default=1.0)
    for source, target, effect in reversed(edges):  # the strongest on top
        if source == target:
            continue
        share = abs(effect) / largest
        axis.add_patch(
            FancyArrowPatch(
                places[source],
                places[target],
                arrowstyle="-",
                connectionstyle="arc3,rad=0.08",
                color=POSITIVE if effect > 0 else NEGATIVE,
                linestyle="-" if effect > 0 else (0, (4, 2)),
                linewidth=0.35 + 2.2 * share,
                alpha=0.35 + 0.55 * share,
                shrinkA=4,
                shrinkB=4,
                zorder=1,
            )
        )


def _draw_nodes(axis: Axes, nodes: pd.DataFrame, layout: _Layout) -> None:
    kinds = nodes["kind"].to_numpy()
    for kind in dict.fromkeys(kinds):
        mine = kinds == kind
        size = 110 if kind == "root" else 42
        _, marker, fill, edge = NODE_STYLE[str(kind)]
        style: dict[str, Any] = {"marker": marker, "facecolor": fill, "edgecolor": edge}
        axis.scatter(layout.x[mine], layout.y[mine], s=size, zorder=3, **style)
    root_room = 22 if (kinds == "root").sum() == 1 else 9  # characters; a lone root has space
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.4}
    small: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 6, "zorder": 4, "bbox": box}
    for x, y, (_, line) in zip(layout.x, layout.y, nodes.iterrows(), strict=True):
        axis.text(x, y - 0.09, plain(_node_label(line, root_room)), **small)


def _node_label(line: pd.Series, root_room: int) -> str:
    kind = str(line["kind"])
    if kind == "feature":
        return str(line["feature"]) if line["feature"] >= 0 else str(line["name"])[:9]
    if kind == "root":
        text = str(line["name"]).split("@")[0].removeprefix("logit ")
        return text if len(text) <= root_room else text[: root_room - 1] + "…"
    short = {"embedding": "embed", "error": "error", "mlp": "MLP", "position": "pos"}
    short |= {"attention_bias": "b attn", "decoder_bias": "b dec"}
    return short.get(kind, f"h{line['head']}" if kind == "head" else str(line["name"])[:9])


def _draw_legend(figure: Figure, nodes: pd.DataFrame) -> None:
    handles = [
        Line2D([], [], linestyle="none", marker=marker, mfc=fill, mec=edge, label=label)
        for kind, (label, marker, fill, edge) in NODE_STYLE.items()
        if kind in set(nodes["kind"])
    ]
    handles.append(Line2D([], [], color=POSITIVE, label="raises its target"))
    handles.append(Line2D([], [], color=NEGATIVE, linestyle=(0, (4, 2)), label="lowers its target"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
