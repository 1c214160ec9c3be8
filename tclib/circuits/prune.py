"""What an attribution graph comes down to: pruning by influence, scores, tokens summed, supernodes.

Thresholds and scores are those of circuit-tracer, so that figures can be compared; by default biases and
position embeddings carry no influence, as there. Whatever is taken out of a graph is added to what its
targets have left out, so every target still adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from tclib.circuits.graph import INPUT_KINDS, AttributionGraph, Counted, with_influence
from tclib.circuits.influence import edge_influence, node_influence, threshold_for
from tclib.support.checked import checked
from tclib.support.declared import Count, Name, Share
from tclib.support.errors import InputError

ALWAYS_KEPT = ("embedding", "root")
ERROR_KINDS = ("error", "mlp")


class GraphScores(NamedTuple):
    """How much of a graph is explained by features, both from 0 to 1.

    `replacement`: of the influence that reaches tokens and errors, the share of tokens.
    `completeness`: share of inputs that are not errors, over all targets by their influence.
    """

    replacement: float
    completeness: float


@checked
def graph_scores(graph: AttributionGraph, counted: Counted = INPUT_KINDS) -> GraphScores:
    """Replacement and completeness score; opaque MLPs count as errors."""
    matrix = graph.edge_matrix(counted)
    influence, passed_on = node_influence(matrix)
    kind = graph.nodes["kind"]
    is_error = torch.tensor(kind.isin(ERROR_KINDS).to_numpy())
    tokens = float(influence[torch.tensor((kind == "embedding").to_numpy())].sum())
    errors = float(influence[is_error].sum())
    sizes = matrix.edges.abs() * matrix.counted
    totals = sizes.sum(1)
    error_share = torch.where(totals > 0, sizes[:, is_error].sum(1) / totals, 0.0)
    # Nodes without sources of their own (errors too) have no error among their inputs.
    leaves = float(influence.sum()) - float(passed_on.sum() - matrix.root_weight.sum())
    explained = float(((1 - error_share) * passed_on).sum()) + leaves
    everything = float(passed_on.sum()) + leaves
    return GraphScores(
        replacement=tokens / (tokens + errors) if tokens + errors else 0.0,
        completeness=explained / everything if everything else 0.0,
    )


@checked
def prune(
    graph: AttributionGraph,
    node_threshold: Share = 0.8,
    edge_threshold: Share = 0.98,
    counted: Counted = INPUT_KINDS,
) -> AttributionGraph:
    """Keep the nodes, then the edges, that carry these shares of all influence on the roots.

    Tokens and roots always stay; features that are left without a source or without a target go.
    Errors: `InputError` for a threshold outside 0 to 1.
    """
    matrix = graph.edge_matrix(counted)
    influence, _ = node_influence(matrix)
    always = graph.nodes["kind"].isin(ALWAYS_KEPT).to_numpy()
    nodes = (influence >= threshold_for(influence, node_threshold)).numpy() & matrix.counted.numpy()
    nodes |= always
    kept = _subgraph(with_influence(graph, counted), nodes, graph.edges != 0)
    by_edge = edge_influence(kept.edge_matrix(counted))
    is_strong = by_edge >= threshold_for(by_edge, edge_threshold)
    edges = (is_strong & (by_edge > 0)).numpy()
    return _subgraph(kept, *_without_loose_ends(kept, edges, always[nodes]))


@checked
def prune_to_size(
    graph: AttributionGraph,
    max_nodes: Count,
    node_threshold: Share = 0.8,
    edge_threshold: Share = 0.98,
    counted: Counted = INPUT_KINDS,
) -> AttributionGraph:
    """`prune`, with the node threshold lowered in steps of 0.1 until at most `max_nodes` are left.

    Errors: `InputError` if not even the tokens and roots, which always stay, are so few.
    """
    while True:
        small = prune(graph, max(node_threshold, 0.0), edge_threshold, counted)
        if len(small.nodes) <= max_nodes:
            return small
        if node_threshold <= 0:
            raise InputError(
                f"max_nodes {max_nodes}: {len(small.nodes)} tokens, roots and strongest nodes always stay"
            )
        node_threshold -= 0.1


def _without_loose_ends(
    graph: AttributionGraph,
    edges: Bool[np.ndarray, "target node"],
    always: Bool[np.ndarray, "node"],
) -> tuple[Bool[np.ndarray, "node"], Bool[Tensor, "target node"]]:
    """Take out nodes that lead nowhere and features that nothing leads to, until none is left."""
    nodes = np.ones(len(graph.nodes), dtype=bool)
    row_kind = graph.nodes["kind"].to_numpy()[graph.targets]
    inner = graph.targets[row_kind == "feature"]
    while True:
        edges = edges & np.outer(nodes[graph.targets], nodes)
        fewer = nodes & (edges.any(0) | always)
        is_explained = np.asarray(edges.any(1))
        fewer[inner] &= is_explained[row_kind == "feature"]
        if (fewer == nodes).all():
            return nodes, torch.tensor(edges)
        nodes = fewer


def _subgraph(
    graph: AttributionGraph,
    nodes: Bool[np.ndarray, "node"],
    edges: Bool[Tensor, "target node"],
) -> AttributionGraph:
    """The nodes and edges that are marked; what is taken out of a target goes to `left_out`."""
    rows = nodes[graph.targets]
    shown = graph.edges * (edges & torch.tensor(nodes))
    removed = (graph.edges - shown).sum(1).double().numpy()
    new_index = np.cumsum(nodes) - 1
    return replace(
        graph,
        nodes=graph.nodes[nodes].reset_index(drop=True),
        edges=shown[torch.tensor(rows)][:, torch.tensor(nodes)],
        targets=new_index[graph.targets[rows]],
        constant=graph.constant[rows],
        left_out=(graph.left_out + removed)[rows],
    )


# ---------------------------------------------------------------------------------------------
# Several nodes as one


@checked
def supernodes(
    graph: AttributionGraph, groups: Mapping[Name, Annotated[Sequence[str], Field(min_length=1)]]
) -> AttributionGraph:
    """The graph with each group of nodes as one, under the group's name.

    Values, activations and effects of members are summed. Errors: `InputError` for a name that is not
    in the graph, a node in two groups, a root in a group, or a group called as another node.
    """
    known = set(graph.nodes["name"])
    members = [name for group in groups.values() for name in group]
    missing = [name for name in members if name not in known]
    if missing:
        raise InputError(f"no nodes {missing[:5]} in the graph: see graph.nodes['name']")
    twice = sorted({name for name in members if members.count(name) > 1})
    if twice:
        raise InputError(f"nodes {twice[:5]} are in two groups: expected at most one")
    roots = set(graph.nodes["name"][graph.is_root]) & set(members)
    if roots:
        raise InputError(f"roots {sorted(roots)} cannot be in a group")
    taken = sorted(set(groups) & (known - set(members)))
    if taken:
        raise InputError(f"groups {taken} are called as other nodes: choose other names")
    name_of = {name: group for group, names in groups.items() for name in names}
    return _merged(graph, graph.nodes["name"].map(lambda name: name_of.get(name, name)))


@checked
def sum_over_tokens(graph: AttributionGraph) -> AttributionGraph:
    """The graph with the same feature, error, bias or head at all its tokens as one node.

    `pos` is −1 where those are several.
    """
    names = graph.nodes["name"].str.replace(r"@\d+$", "", regex=True)
    return _merged(graph, names.where(~graph.is_root, graph.nodes["name"]))


def _merged(graph: AttributionGraph, names: pd.Series) -> AttributionGraph:
    """Nodes of one name become one; their columns and rows are summed."""
    group, unique = pd.factorize(names)
    row_group, row_unique = pd.factorize(group[graph.targets])
    columns = _sum_groups(graph.edges.T, group, len(unique)).T
    edges = _sum_groups(columns, row_group, len(row_unique))

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(row_group, weights=values, minlength=len(row_unique))

    return replace(
        graph,
        nodes=_merged_nodes(graph.nodes.assign(name=names), names),
        edges=edges,
        targets=row_unique,
        constant=summed(graph.constant),
        left_out=summed(graph.left_out),
    )


def _sum_groups(matrix: Tensor, group: np.ndarray, n_groups: int) -> Tensor:
    sums = matrix.new_zeros(n_groups, matrix.shape[1])
    return sums.index_add_(0, torch.tensor(group), matrix)


def _merged_nodes(nodes: pd.DataFrame, names: pd.Series) -> pd.DataFrame:
    """Sums of what adds up; identities where members share them, else −1 and `supernode`."""
    grouped = nodes.groupby(names, sort=False)
    merged = grouped.agg(
        layer=("layer", "min"),
        activation=("activation", "sum"),
        root_weight=("root_weight", "sum"),
        influence=("influence", "sum"),
    )
    merged["value"] = grouped["value"].sum(min_count=1)
    merged["kind"] = grouped["kind"].agg(lambda kinds: _shared(kinds, "supernode"))
    for column in ("head", "feature", "pos"):
        merged[column] = grouped[column].agg(lambda indices: _shared(indices, -1))
    merged = merged.rename_axis("name").reset_index()
    return merged[nodes.columns]


def _shared(values: pd.Series, otherwise: Any) -> Any:
    return values.iloc[0] if values.nunique() == 1 else otherwise
