"""Paths from a target back through the model, and the graph that they make (paper Algorithms 1 and 2).

One step back along a path keeps the same form (paper Eqs. 24 and 28). With v the direction at the
stream, so far multiplied through to the root:

    feature i of layer l at t:   v' = (d_i · v) P W_enc[:, i] / σ_mlp(l, t)         read before MLP l
    head h of layer l, source s: v' = A[t, s] P W_V W_O v / σ_attention(l, s)       read before attention l
    skip of layer l at t:        v' = P W_skip v / σ_mlp(l, t)                      read before MLP l

so that a source's contribution to the root is its activation times its vector dotted with v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from tclib.circuits.frozen import (
    KINDS,
    FrozenPrompts,
    ReadSite,
    SourceKind,
    Target,
    node_name,
    site_of,
)
from tclib.circuits.sources import Sources, sources
from tclib.support.checked import checked
from tclib.support.declared import Count, Natural, Whole, declared
from tclib.support.errors import InputError

EXPANDABLE: frozenset[SourceKind] = frozenset({"feature", "head", "skip"})
Signs = Literal["both", "positive"]


@dataclass(frozen=True, order=True)
class Node:
    """A source, or the root (kind `root`). Numbers that do not apply are −1; `pos` is its token."""

    kind: str
    layer: int
    head: int
    feature: int
    pos: int

    def __str__(self) -> str:
        return node_name(self.kind, self.layer, self.head, self.feature, self.pos)


@dataclass(frozen=True)
class Path:
    """Nodes from the root to a source, and the source's contribution to the root along them."""

    nodes: tuple[Node, ...]
    contribution: float

    def __str__(self) -> str:
        return " <- ".join(map(str, self.nodes)) + f": {self.contribution:.2g}"


@declared(frozen=True)
class NodeFilter:
    """Which sources a search may take; None allows all. A negative `pos` counts from the end."""

    kinds: frozenset[SourceKind] | None = None
    layers: frozenset[Natural] | None = None
    positions: frozenset[Whole] | None = None
    components: frozenset[Natural] | None = None  # feature indices, or head indices

    def mask(self, found: Sources, n_pos: int) -> np.ndarray:
        """True for every source that passes. Errors: `InputError` for a position outside the prompt."""
        if beyond := [pos for pos in self.positions or () if not -n_pos <= pos < n_pos]:
            raise InputError(f"positions {beyond}: expected {-n_pos} to {n_pos - 1}")
        positions = None if self.positions is None else {pos % n_pos for pos in self.positions}
        wanted: tuple[tuple[np.ndarray, Any], ...] = (
            (np.array(KINDS)[found.kind], self.kinds),
            (found.layer, self.layers),
            (found.pos, positions),
            (np.where(found.head >= 0, found.head, found.feature), self.components),
        )
        passes = np.ones(len(found.kind), dtype=bool)
        for values, allowed in wanted:
            if allowed is not None:
                passes &= np.isin(values, list(allowed))
        return passes


@dataclass(frozen=True)
class _Open:
    """A path whose last node can be stepped back from, and the target that stepping explains."""

    path: Path
    target: Target


@checked
def greedy_paths(
    frozen: FrozenPrompts,
    root: Target,
    n_iterations: Count = 3,
    n_branches: Count = 15,
    allowed: NodeFilter | None = None,
    signs: Signs = "both",
) -> list[list[Path]]:
    """The paper's greedy search: element i holds the best paths of i + 2 nodes, strongest first.

    In each iteration every open path takes its `n_branches` strongest sources (by magnitude, or the
    largest with signs="positive"), and the `n_branches` strongest of all go on. Sources without a
    step back (embeddings, biases, errors, opaque MLPs) end their path.

    Errors: `InputError` unless both numbers are at least 1.
    """
    allowed = allowed or NodeFilter()
    start = Path((root_node(root),), frozen.value(root))
    beam = [_Open(start, replace(root, constant=0.0))]
    found: list[list[Path]] = []
    for _ in range(n_iterations):
        every = sources(frozen, [parent.target for parent in beam])
        candidates = [
            child
            for parent, its in zip(beam, every, strict=True)
            for child in _children(frozen, parent, its, n_branches, allowed, signs)
        ]
        # With signs="positive" nothing below 0 is among them.
        candidates.sort(key=lambda one: -abs(one[0].contribution))
        best = candidates[:n_branches]
        found.append([path for path, _ in best])
        beam = [_Open(path, step()) for path, step in best if path.nodes[-1].kind in EXPANDABLE]
    return found


@checked
def path_table(levels: Sequence[Sequence[Path]], n_each: Natural = 5) -> pd.DataFrame:
    """The strongest paths of each length: length (nodes), path, contribution."""
    lines = [
        (len(path.nodes), " <- ".join(map(str, path.nodes)), path.contribution)
        for level in levels
        for path in level[:n_each]
    ]
    return pd.DataFrame(lines, columns=["length", "path", "contribution"])


def root_node(root: Target) -> Node:
    """The node that stands for the target of a search."""
    return Node("root", root.site.layer, -1, -1, root.pos)


def _children(
    frozen: FrozenPrompts,
    parent: _Open,
    found: Sources,
    n_branches: int,
    allowed: NodeFilter,
    signs: Signs,
) -> Iterable[tuple[Path, Callable[[], Target]]]:
    """The strongest sources of a path's end, each with the (lazy) target one step further back."""
    strength = np.abs(found.contribution) if signs == "both" else found.contribution
    usable = allowed.mask(found, frozen.n_pos) & (strength > 0)
    usable &= np.array(KINDS)[found.kind] != "constant"
    strongest = np.flatnonzero(usable)
    strongest = strongest[np.argsort(-strength[strongest], kind="stable")][:n_branches]
    for i in strongest:
        numbers = (found.layer, found.head, found.feature, found.pos)
        node = Node(KINDS[found.kind[i]], *(int(column[i]) for column in numbers))
        path = Path((*parent.path.nodes, node), float(found.contribution[i]))
        yield path, partial(step_back, frozen, parent.target, node)


@checked
def step_back(frozen: FrozenPrompts, target: Target, node: Node) -> Target:
    """The target whose sources are what `node` contributes to `target` (module equations).

    Errors: `InputError` for a node that ends every path, or is no source of the target.
    """
    if node.kind not in EXPANDABLE:
        raise InputError(
            f"{node} ends every path: only {', '.join(sorted(EXPANDABLE))} go further back"
        )
    if not _can_be_source(frozen, target, node):
        raise InputError(f"{node} is no source of {target.name}: expected one that `sources` lists")
    prompt = target.prompt
    v = target.direction * frozen.scale(target.site, prompt, target.pos)
    if node.kind == "feature":
        dictionary = frozen.transcoders[node.layer]
        through = dictionary.decoder_direction(node.feature) @ v
        direction = through * dictionary.encoder_direction(node.feature)
        site = site_of(dictionary)
    elif node.kind == "skip":
        dictionary = frozen.transcoders[node.layer]
        assert dictionary.W_skip is not None
        direction, site = dictionary.W_skip @ v, site_of(dictionary)
    else:
        weights = frozen.attention[node.layer]
        pattern = frozen.cache.pattern[node.layer][prompt, node.head, target.pos, node.pos]
        direction = pattern * (weights.W_V[node.head] @ (weights.W_O[node.head] @ v))
        site = ReadSite("attention", node.layer)
    centred = frozen.lm.final_norm.centre(direction)
    return Target(str(node), prompt, node.pos, site, centred, 0.0)


def _can_be_source(frozen: FrozenPrompts, target: Target, node: Node) -> bool:
    """Whether such a node writes where the target reads: below it, at its token (heads: up to it)."""
    if node.kind == "head":
        below, heads = frozen.attention_layers(target.site), range(frozen.lm.n_heads)
        return node.layer in below and node.head in heads and node.pos in range(target.pos + 1)
    if node.layer not in range(target.site.layer) or node.layer not in frozen.transcoders:
        return False
    has_skip = frozen.transcoders[node.layer].W_skip is not None
    return node.pos == target.pos and (node.kind == "feature" or has_skip)


# ---------------------------------------------------------------------------------------------
# Paths to graph


@dataclass(frozen=True)
class PathGraph:
    """Nodes with their contribution to the root, edges (source → target) with theirs."""

    nodes: dict[Node, float]
    edges: dict[tuple[Node, Node], float]

    def node_table(self) -> pd.DataFrame:
        """A line a node, strongest first."""
        lines = [{"node": str(node), **vars(node), "value": v} for node, v in self.nodes.items()]
        return _strongest_first(pd.DataFrame(lines), "value")

    def edge_table(self) -> pd.DataFrame:
        """A line an edge, strongest first."""
        lines = [
            (str(source), str(target), value) for (source, target), value in self.edges.items()
        ]
        table = pd.DataFrame(lines, columns=["source", "target", "contribution"])
        return _strongest_first(table, "contribution")


def _strongest_first(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table.sort_values(column, key=abs, ascending=False, ignore_index=True, kind="stable")


@checked
def paths_to_graph(paths: Sequence[Path], every_length: Sequence[Sequence[Path]] = ()) -> PathGraph:
    """Merge paths into a graph (paper Algorithm 2); a prefix that several paths share counts once.

    `every_length` is what `greedy_paths` returned, of which `paths` need not be all: prefixes of
    `paths` take their contribution from it, or from `paths` itself.
    """
    known = {path.nodes: path.contribution for group in (*every_length, paths) for path in group}
    nodes: dict[Node, float] = {}
    edges: dict[tuple[Node, Node], float] = {}
    seen: set[tuple[Node, ...]] = set()
    for path in paths:
        for length in range(2, len(path.nodes) + 1):
            prefix = path.nodes[:length]
            if prefix in seen:
                continue
            if prefix not in known:
                raise InputError(f"no contribution for the prefix {' <- '.join(map(str, prefix))}")
            seen.add(prefix)
            parent, child = prefix[-2:]
            nodes.setdefault(parent, 0.0)
            nodes[child] = nodes.get(child, 0.0) + known[prefix]
            edges[child, parent] = edges.get((child, parent), 0.0) + known[prefix]
    return PathGraph(nodes, edges)
