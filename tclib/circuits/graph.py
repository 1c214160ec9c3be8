"""The full attribution graph of a prompt: every active feature, error, token and bias, and the roots.

An edge is the direct effect of its source on its target, attention and norms frozen (`edges`).
Rows of the edge matrix are targets (features and roots), columns are nodes, and at every target

    value = constant + Σ edges + left out

to rounding, where the constant is the target's own bias (b_enc or b_U) and "left out" what comes from
sources that the graph does not show (none, unless there were more features than were asked for, or
nodes have been pruned).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field
from torch import Tensor

from tclib.circuits.edges import DirectEffects, Heads, Readers
from tclib.circuits.frozen import FrozenPrompts, SourceKind, Target, node_name, site_of
from tclib.circuits.influence import EdgeMatrix, node_influence
from tclib.circuits.roots import Roots, check_roots, equal_roots, top_logits
from tclib.support.checked import checked
from tclib.support.declared import Count, Positive
from tclib.support.errors import InputError
from tclib.support.progress import progress

NodeKind = Literal[SourceKind, "supernode"]
Counted = Annotated[frozenset[NodeKind], Field(min_length=1)]  # kinds that carry influence
INPUT_KINDS: frozenset[NodeKind] = frozenset({"feature", "error", "mlp", "embedding", "head"})
BIAS_KINDS: frozenset[NodeKind] = frozenset({"position", "attention_bias", "decoder_bias"})
ROUND = 2048  # features that are added between two rankings by influence


@checked
@dataclass(frozen=True)
class AttributionGraph:
    """Nodes, and direct effects between them.

    `nodes` has a line a node: name, kind, layer, head, feature, pos, activation (z of a feature, 1
    of what is always there), value (pre-activation or logit; only of targets), root_weight (of roots,
    which stand last), influence (on the roots). A root that is a logit holds its token in `feature`
    where there is one. `targets` are the nodes that rows of `edges` explain, columns are all nodes.
    """

    model: str
    tokens: tuple[str, ...]
    nodes: pd.DataFrame
    edges: Float[Tensor, "target node"]
    targets: Int[np.ndarray, "target"]
    constant: Float[np.ndarray, "target"]
    left_out: Float[np.ndarray, "target"]

    def closure(self) -> pd.DataFrame:
        """For every target: value, sum of all its sources, and the residual between them.

        The residual is relative to the largest magnitude that was summed.
        """
        edges = self.edges.double()
        total = self.constant + edges.sum(1).numpy() + self.left_out
        targets = self.nodes.iloc[self.targets]
        value = targets["value"].to_numpy()
        largest = edges.abs().amax(1).numpy() if edges.shape[1] else np.zeros(len(total))
        size = np.maximum.reduce([np.abs(value), largest, np.abs(self.left_out)])
        return pd.DataFrame(
            {
                "name": targets["name"].to_numpy(),
                "value": value,
                "sum_of_sources": total,
                "constant": self.constant,
                "left_out": self.left_out,
                "residual": np.divide(total - value, size, where=size > 0, out=np.zeros(len(size))),
            }
        )

    def edge_table(self) -> pd.DataFrame:
        """A line an edge, strongest first: source, target (names), activation, weight, effect.

        effect = activation × weight: the input-dependent and the other factor.
        """
        row, column = (index.numpy() for index in self.edges.nonzero(as_tuple=True))
        effect = self.edges[row, column].double().numpy()
        names = self.nodes["name"].to_numpy()
        activation = self.nodes["activation"].to_numpy()[column]
        weight = np.divide(effect, activation, where=activation != 0, out=np.zeros(len(effect)))
        table = pd.DataFrame(
            {
                "source": names[column],
                "target": names[self.targets[row]],
                "activation": activation,
                "weight": weight,
                "effect": effect,
            }
        )
        return table.sort_values("effect", key=abs, ascending=False, ignore_index=True)

    @property
    def is_root(self) -> Bool[np.ndarray, "node"]:
        return np.asarray(self.nodes["kind"].to_numpy() == "root")

    def edge_matrix(self, counted: Counted = INPUT_KINDS) -> EdgeMatrix:
        """The edges as `influence` takes them, with the kinds of nodes that take part."""
        rows = self.nodes.iloc[self.targets]
        is_root = rows["kind"].to_numpy() == "root"
        kinds = self.nodes["kind"].isin(counted).to_numpy()
        return EdgeMatrix(
            edges=self.edges,
            target_column=torch.tensor(np.where(is_root, -1, self.targets)),
            depth=torch.tensor(rows["layer"].to_numpy()),
            root_weight=torch.tensor(rows["root_weight"].to_numpy()),
            counted=torch.tensor(kinds),
        )


@checked
def attribution_graph(
    frozen: FrozenPrompts,
    roots: Sequence[Target] | None = None,
    prompt: int = 0,
    heads: Heads = "summed",
    max_feature_nodes: Count = 7500,
    keep_bos: bool = True,
    memory_limit_gib: Positive = 8.0,
) -> AttributionGraph:
    """The full graph of one prompt.

    Args:
        frozen: the prompts, with transcoders.
        roots: what is explained, equally weighted; by default the most likely next tokens.
        prompt: which prompt.
        heads: "summed": edges pass through attention; "nodes": heads are nodes that end the graph.
        max_feature_nodes: if more features are active, those with most influence are kept; the
            others' effects are counted as left out.
        keep_bos: if not, features and errors at the first token are left out as well.
        memory_limit_gib: of the edge matrix.

    Errors: `InputError` for roots of another prompt, no nodes asked for, or too large a graph.
    """
    frozen.check_place(-1, prompt)
    chosen = top_logits(frozen, prompt) if roots is None else equal_roots(roots)
    check_roots(chosen.targets, prompt)
    effects = DirectEffects(frozen, prompt, heads)
    columns = effects.table()
    in_reach = _in_reach(columns, chosen.targets, heads)
    if not keep_bos:
        in_reach &= columns["pos"].to_numpy() > 0
    n_features = min(max_feature_nodes, int(in_reach.sum()))
    n_rows = len(chosen.targets) + n_features
    needed = n_rows * effects.n_columns * frozen.lm.dtype.itemsize / 2**30
    if needed > memory_limit_gib:
        raise InputError(
            f"a graph of {n_rows} targets and {effects.n_columns} sources takes {needed:.1f} GiB: lower "
            f"max_feature_nodes, shorten the prompt, or raise memory_limit_gib above {memory_limit_gib:g}"
        )
    edges = torch.zeros(n_rows, effects.n_columns, dtype=frozen.lm.dtype, device=frozen.lm.device)
    row_columns = _fill(effects, columns, chosen, in_reach, edges)
    return _assemble(frozen, columns, chosen, row_columns, edges, prompt, keep_bos)


# ---------------------------------------------------------------------------------------------
# Which features, and their rows


def _fill(
    effects: DirectEffects,
    columns: pd.DataFrame,
    roots: Roots,
    in_reach: Bool[np.ndarray, "column"],
    edges: Float[Tensor, "row column"],
) -> Int[np.ndarray, "row"]:
    """Fill the rows, roots first; return the column of each row's feature (−1 for a root)."""
    n_roots = len(roots.targets)
    row_columns = np.full(len(edges), -1)
    for row, root in zip(edges, roots.targets, strict=False):
        effects.rows(root.pos, [Readers(root.site, root.direction[None])], row[None])
    waiting = in_reach.copy()
    done = n_roots
    with progress(None, "graph", total=len(edges) - n_roots, unit="feature") as bar:
        while done < len(edges):
            room = len(edges) - done
            queue = waiting.nonzero()[0]
            if len(queue) > room:
                influence = _influence_so_far(edges[:done], row_columns[:done], columns, roots)
                ranked = queue[np.argsort(-influence[queue], kind="stable")]
                queue = ranked[: min(room, ROUND)]
            # By token, and from the top layer down within a token.
            places = columns.iloc[queue]
            order = queue[np.lexsort((-places["layer"].to_numpy(), places["pos"].to_numpy()))]
            _feature_rows(effects, columns, order, edges[done : done + len(order)], bar.update)
            row_columns[done : done + len(order)] = order
            waiting[order] = False
            done += len(order)
    return row_columns


def _influence_so_far(
    edges: Tensor, row_columns: np.ndarray, columns: pd.DataFrame, roots: Roots
) -> Float[np.ndarray, "column"]:
    """Influence of all columns by the rows that are there; other features pass nothing on."""
    layers = columns["layer"].to_numpy()[row_columns]
    n_roots = len(roots.targets)
    layers[:n_roots] = [root.site.layer for root in roots.targets]
    weight = np.zeros(len(row_columns))
    weight[:n_roots] = roots.weights
    matrix = EdgeMatrix(
        edges,
        torch.tensor(row_columns).to(edges.device),
        torch.tensor(layers).to(edges.device),
        torch.tensor(weight).to(edges.device),
        torch.tensor(columns["kind"].isin(INPUT_KINDS).to_numpy()).to(edges.device),
    )
    influence, _ = node_influence(matrix)
    return influence.double().cpu().numpy()


def _feature_rows(
    effects: DirectEffects,
    columns: pd.DataFrame,
    order: np.ndarray,
    out: Tensor,
    tick: Callable[[int], object],
) -> None:
    places = columns.iloc[order].reset_index(drop=True)
    for pos in places["pos"].unique().tolist():
        here = places[places["pos"] == pos]
        readers = [
            _readers(effects.frozen, layer, here["feature"][here["layer"] == layer].to_numpy())
            for layer in here["layer"].unique().tolist()  # from the top, as they are ordered
        ]
        effects.rows(pos, readers, out[here.index[0] : here.index[-1] + 1])
        tick(len(here))


def _readers(frozen: FrozenPrompts, layer: int, feature: Int[np.ndarray, "feature"]) -> Readers:
    dictionary = frozen.transcoders[layer]
    directions = dictionary.encoder_rows(torch.tensor(feature, device=frozen.lm.device))
    return Readers(site_of(dictionary), frozen.lm.final_norm.centre(directions))


def _in_reach(columns: pd.DataFrame, roots: Sequence[Target], heads: Heads) -> np.ndarray:
    """Features that a root can see: not after its token (or only at it), below its site."""
    pos, layer = columns["pos"].to_numpy(), columns["layer"].to_numpy()
    seen = np.zeros(len(columns), dtype=bool)
    for root in roots:
        at_pos = pos <= root.pos if heads == "summed" else pos == root.pos
        seen |= at_pos & (layer < root.site.layer)
    seen &= columns["kind"].to_numpy() == "feature"
    return seen


# ---------------------------------------------------------------------------------------------
# Rows and columns to a graph


def _assemble(
    frozen: FrozenPrompts,
    columns: pd.DataFrame,
    roots: Roots,
    row_columns: Int[np.ndarray, "row"],
    edges: Float[Tensor, "row column"],
    prompt: int,
    keep_bos: bool,
) -> AttributionGraph:
    """Sort rows as nodes are sorted, and sum what is not shown into `left_out`."""
    n_roots = len(roots.targets)
    order = np.argsort(row_columns[n_roots:], kind="stable") + n_roots
    feature_columns = row_columns[order]
    kind = columns["kind"].to_numpy()
    shown = kind != "feature"
    shown[feature_columns] = True
    if not keep_bos:
        shown &= ~(np.isin(kind, ["feature", "error", "mlp"]) & (columns["pos"].to_numpy() == 0))
    rows = torch.tensor(np.concatenate([order, np.arange(n_roots)])).to(edges.device)
    kept = torch.tensor(shown.nonzero()[0]).to(edges.device)
    hidden = torch.tensor(~shown).to(edges)  # as numbers: a product makes no copy of the edges
    left_out = (edges @ hidden)[rows].double().cpu().numpy()
    visible = torch.zeros(len(edges), len(kept) + n_roots, dtype=edges.dtype)
    visible[:, : len(kept)] = edges.index_select(1, kept)[rows]
    nodes = _node_table(frozen, columns[shown], roots, prompt)
    n_features, n_nodes = len(feature_columns), len(nodes)
    targets = np.concatenate([np.arange(n_features), np.arange(n_nodes - n_roots, n_nodes)])
    graph = AttributionGraph(
        model=frozen.lm.name,
        tokens=tuple(frozen.lm.token_strings(frozen.cache.tokens[prompt].tolist())),
        nodes=nodes,
        edges=visible,
        targets=targets,
        constant=_constants(frozen, nodes.iloc[:n_features], roots),
        left_out=left_out,
    )
    return with_influence(graph)


def with_influence(graph: AttributionGraph, counted: Counted = INPUT_KINDS) -> AttributionGraph:
    """The graph with each node's influence on the roots; a root's is its weight."""
    influence, _ = node_influence(graph.edge_matrix(counted))
    values = np.where(graph.is_root, graph.nodes["root_weight"], influence.double().numpy())
    return replace(graph, nodes=graph.nodes.assign(influence=values))


def total_effects(graph: AttributionGraph) -> Float[np.ndarray, "node"]:
    """What each node adds to the weighted roots over all paths, signs kept, active features held open.

        total(s) = Σ_roots w · edge(s → root) + Σ_features total(f) / z_f · edge(s → f)

    Attention and norms are frozen, as in the edges. A root's total is 0.
    """
    rows = graph.nodes.iloc[graph.targets]
    is_root = (rows["kind"] == "root").to_numpy()
    activation = rows["activation"].to_numpy()
    edges = graph.edges.double().numpy()
    total = np.zeros(len(graph.nodes))
    for layer in sorted(set(rows["layer"]), reverse=True):
        here = (rows["layer"] == layer).to_numpy()
        per_unit = total[graph.targets[here]] / np.where(
            activation[here] > 0, activation[here], np.inf
        )
        weight = np.where(is_root[here], rows["root_weight"].to_numpy()[here], per_unit)
        total += weight @ edges[here]
    return total


def _node_table(
    frozen: FrozenPrompts, sources: pd.DataFrame, roots: Roots, prompt: int
) -> pd.DataFrame:
    n_roots = len(roots.targets)
    root_lines = pd.DataFrame(
        {
            "kind": "root",
            "layer": [root.site.layer for root in roots.targets],
            "head": -1,
            "feature": roots.token_ids,
            "pos": [root.pos for root in roots.targets],
            "activation": np.ones(n_roots),
        }
    )
    nodes = pd.concat([sources, root_lines], ignore_index=True)
    nodes["value"] = np.nan
    features = nodes[nodes["kind"] == "feature"]
    nodes.loc[features.index, "value"] = _pre_acts(frozen, features, prompt)
    nodes.loc[len(sources) :, "value"] = [frozen.value(root) for root in roots.targets]
    nodes["root_weight"] = np.zeros(len(nodes))
    nodes.loc[len(sources) :, "root_weight"] = roots.weights
    named = sources[["kind", "layer", "head", "feature", "pos"]]
    names = [node_name(*line) for line in named.itertuples(index=False)]
    nodes.insert(0, "name", [*names, *(root.name for root in roots.targets)])
    return nodes


def _pre_acts(frozen: FrozenPrompts, features: pd.DataFrame, prompt: int) -> np.ndarray:
    """Pre-activations straight from each transcoder, not from any sum of sources."""
    values = np.zeros(len(features))
    places = features.reset_index(drop=True)
    for layer in places["layer"].unique().tolist():
        here = places[places["layer"] == layer]
        dictionary = frozen.transcoders[layer]
        read = frozen.cache.at(dictionary.config.input_site)
        x = read[prompt, torch.tensor(here["pos"].to_numpy())]
        feature = torch.tensor(here["feature"].to_numpy(), device=x.device)
        pre = (x * dictionary.encoder_rows(feature)).sum(1) + dictionary.b_enc[feature]
        values[here.index] = pre.double().cpu().numpy()
    return values


def _constants(frozen: FrozenPrompts, features: pd.DataFrame, roots: Roots) -> np.ndarray:
    b_enc = [
        frozen.transcoders[layer].b_enc[feature].item()
        for layer, feature in zip(features["layer"], features["feature"], strict=True)
    ]
    return np.array([*b_enc, *(root.constant for root in roots.targets)], dtype=np.float64)


def edge_columns(graph: AttributionGraph) -> dict[str, Shaped[np.ndarray, "edge"]]:
    """Source node, target node and effect of every edge that is not zero."""
    row, column = graph.edges.nonzero(as_tuple=True)
    return {
        "source": column.numpy(),
        "target": graph.targets[row.numpy()],
        "effect": graph.edges[row, column].double().numpy(),
    }


def edges_between(graph: AttributionGraph) -> Iterator[tuple[int, int, float]]:
    """`edge_columns`, edge by edge."""
    yield from zip(*(values.tolist() for values in edge_columns(graph).values()), strict=True)
