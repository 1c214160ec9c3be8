"""Which nodes and edges of an attribution graph matter for its roots (as circuit-tracer defines it).

An edge's share is its magnitude over the summed magnitudes of all edges into the same target. A node's
influence is its share of the roots over every path, the roots weighted by their probabilities:

    influence = w A + w A² + …        A[target, source] = |edge| / Σ_source |edge|

Edges only lead upwards, so the series is summed exactly in one sweep from the top layer down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class EdgeMatrix:
    """Edges with what their rows stand for.

    `target_column` is the column in which a target is a source itself, −1 for a root; `depth` orders
    targets (only targets of smaller depth can be its sources); `root_weight` is w, 0 for all others;
    `counted` marks the columns that take part.
    """

    edges: Float[Tensor, "target column"]
    target_column: Int[Tensor, "target"]
    depth: Int[Tensor, "target"]
    root_weight: Float[Tensor, "target"]
    counted: Bool[Tensor, "column"]


def node_influence(matrix: EdgeMatrix) -> tuple[Float[Tensor, "column"], Float[Tensor, "target"]]:
    """(Influence of every column, influence with which every target passes it on)."""
    influence = matrix.edges.new_zeros(matrix.edges.shape[1])
    passed_on = matrix.root_weight.to(matrix.edges, copy=True)
    for depth in sorted(set(matrix.depth.tolist()), reverse=True):
        rows = (matrix.depth == depth).nonzero()[:, 0]
        inner = matrix.target_column[rows] >= 0
        passed_on[rows[inner]] += influence[matrix.target_column[rows[inner]]]
        sizes = matrix.edges[rows].abs_().mul_(matrix.counted)
        totals = sizes.sum(1)
        share = torch.where(totals > 0, passed_on[rows] / totals, 0.0)
        influence += share @ sizes
    return influence, passed_on


def edge_influence(matrix: EdgeMatrix) -> Float[Tensor, "target column"]:
    """Each edge's share of its target times the influence that the target passes on."""
    _, passed_on = node_influence(matrix)
    sizes = matrix.edges.abs() * matrix.counted
    totals = sizes.sum(1)
    return sizes * torch.where(totals > 0, passed_on / totals, 0.0)[:, None]


def threshold_for(scores: Float[Tensor, "*item"], share: float) -> float:
    """The smallest score (none negative) among the largest that together make up `share` of the sum."""
    ordered = scores[scores > 0].sort(descending=True).values
    if len(ordered) == 0:
        return 0.0
    sums = ordered.double().cumsum(0)
    reached = torch.searchsorted(sums / sums[-1], share)
    return float(ordered[min(int(reached), len(ordered) - 1)])
