"""A figure of sixty nodes: no two labels overlap, signs and kinds differ without colour."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.patches import FancyArrowPatch
from tiny import freeze

from tclib.circuits.graph import BIAS_KINDS, INPUT_KINDS, AttributionGraph, attribution_graph
from tclib.circuits.prune import prune, sum_over_tokens
from tclib.figures.graph import NODE_STYLE, layered_graph
from tclib.support.errors import InputError

mpl.use("Agg")


def sixty_nodes() -> AttributionGraph:
    graph = attribution_graph(freeze("gpt2", "relu", n_prompts=1, n_pos=8))
    counted = INPUT_KINDS | BIAS_KINDS
    sizes = {share: prune(graph, share, 0.9, counted) for share in np.arange(0.2, 0.9, 0.05)}
    return min(sizes.values(), key=lambda pruned: abs(len(pruned.nodes) - 60))


@pytest.mark.slow
def test_no_two_labels_overlap() -> None:
    graph = sixty_nodes()
    assert 50 <= len(graph.nodes) <= 75
    figure = layered_graph(graph, "sixty nodes")
    figure.canvas.draw()
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) > 50
    for one, other in itertools.combinations(boxes, 2):
        assert not one.shrunk(0.97, 0.9).overlaps(other.shrunk(0.97, 0.9))


def test_signs_differ_by_line_and_kinds_by_marker() -> None:
    graph = sixty_nodes()
    (axis,) = layered_graph(graph, max_edges=40).axes
    lines = [patch for patch in axis.patches if isinstance(patch, FancyArrowPatch)]
    assert len(lines) == 40
    assert len({patch.get_linestyle() for patch in lines}) == 2
    looks = [(marker, fill) for _, marker, fill, _ in NODE_STYLE.values()]
    assert len(set(looks)) == len(looks)
    assert "the 40 strongest of" in axis.get_title()


@pytest.mark.slow
def test_merged_graphs_are_drawn_and_impossible_ones_refused() -> None:
    graph = sixty_nodes()
    assert layered_graph(sum_over_tokens(graph)).axes
    whole = attribution_graph(freeze("gpt2", "relu", n_prompts=1, n_pos=30))
    with pytest.raises(InputError, match="prune the graph first"):
        layered_graph(whole)
