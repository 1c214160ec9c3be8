"""The paper's greedy search, beside the edges of the full attribution graph."""

import torch
from random_models import GPT2_SMALL, SMALL
from result import Result, difference, interleaved, peak_gib

from tclib.circuits.frozen import FrozenPrompts, Target
from tclib.circuits.graph import attribution_graph
from tclib.circuits.paths import Path, greedy_paths


def run(small: bool) -> Result:
    """Twelve transcoders of 24,576 features, L0 about 100: 3 iterations, 15 branches, encoding included.

    Targets: 32 tokens in 0.6 s, a second search on them in 0.05 s, 512 tokens in 15 s and 8 GB.
    """
    shape, short, long = (SMALL, 8, 32) if small else (GPT2_SMALL, 32, 512)
    lm, tokens = shape.lm(long), shape.rows(1, long).long()
    transcoders = shape.transcoders(lm, tokens[:, :short])

    def search(frozen: FrozenPrompts, answer: int) -> tuple[Target, list[list[Path]]]:
        root = frozen.logit_target({answer: 1.0, answer + 1: -1.0}, -1)
        return root, greedy_paths(frozen, root, n_iterations=3, n_branches=15)

    def first(n_pos: int) -> FrozenPrompts:
        frozen = FrozenPrompts(lm, tokens[:, :n_pos], transcoders)
        search(frozen, 40)
        return frozen

    (of_long,), _ = interleaved(lambda: first(long), n_repeats=1)
    peak, n_repeats = peak_gib(), 2 if small else 7
    (of_short,), (frozen,) = interleaved(lambda: first(short), n_repeats=n_repeats)
    (second,), (found,) = interleaved(lambda: search(frozen, 50), n_repeats=n_repeats)
    n_active = sum(len(parts.active.acts) for parts in frozen.parts.values())
    size = f"{short} tokens, 3 iterations, 15 branches, {shape.n_layers} × {shape.n_features:,}"
    return Result(
        {"n_features": shape.n_features, "l0": n_active // shape.n_layers // short},
        {
            f"greedy search, {size} features, encoding included": (of_short, "s"),
            "a second search on the same prompt": (second, "s"),
            f"the same search on {long} tokens": (of_long, "s"),
            "its peak memory": (peak, "GiB"),
        },
        {"paths through features, products of edges": (by_edges(frozen, *found), 1e-4)},
    )


def by_edges(frozen: FrozenPrompts, root: Target, levels: list[list[Path]]) -> float:
    """A path's contribution: its edges, each over the activation that it enters, multiplied."""
    graph = attribution_graph(frozen, [root], heads="nodes")
    column = {name: i for i, name in enumerate(graph.nodes["name"])}
    row = {name: i for i, name in enumerate(graph.nodes["name"].iloc[graph.targets])}
    found, expected = [], []
    for path in (path for level in levels for path in level):
        *between, end = map(str, path.nodes[1:])
        if all(name in row for name in between):  # heads end this graph
            value, into = 1.0, len(graph.targets) - 1
            for name in between:
                edge, activation = graph.edges[into, column[name]], graph.nodes["activation"]
                value, into = value * float(edge) / activation[column[name]], row[name]
            found.append(path.contribution)
            expected.append(value * float(graph.edges[into, column[end]]))
    assert len(found) > len(levels[0]), "no path goes through a feature"
    return difference(torch.tensor(found), torch.tensor(expected))
