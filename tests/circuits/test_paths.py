"""The greedy search against exhaustive enumeration, steps back that add up, graphs that do not double."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import GEOMETRIES, freeze

from tclib.circuits.frozen import KINDS, FrozenPrompts, Target
from tclib.circuits.paths import (
    EXPANDABLE,
    Node,
    NodeFilter,
    Path,
    greedy_paths,
    path_table,
    paths_to_graph,
    root_node,
    step_back,
)
from tclib.circuits.sources import sources
from tclib.support.errors import InputError


def nodes_of(frozen: FrozenPrompts, target: Target) -> list[tuple[Node, float]]:
    (found,) = sources(frozen, [target])
    columns = (found.kind, found.layer, found.head, found.feature, found.pos, found.contribution)
    lines = zip(*(column.tolist() for column in columns), strict=True)
    listed = [(Node(KINDS[k], *rest[:4]), rest[4]) for k, *rest in lines]
    return [(node, value) for node, value in listed if node.kind != "constant" and value != 0]


def enumerate_paths(frozen: FrozenPrompts, root: Target, n_iterations: int) -> list[list[Path]]:
    """Every path there is, without a beam."""
    root = replace(root, constant=0.0)
    frontier = [(Path((root_node(root),), 0.0), root)]
    levels = []
    for _ in range(n_iterations):
        level = [
            (Path((*path.nodes, node), value), target, node)
            for path, target in frontier
            for node, value in nodes_of(frozen, target)
        ]
        levels.append([path for path, _, _ in level])
        frontier = [
            (path, step_back(frozen, target, node))
            for path, target, node in level
            if node.kind in EXPANDABLE
        ]
    return levels


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("signs", ["both", "positive"])
def test_a_wide_beam_finds_exactly_the_best_of_all_paths(geometry: str, signs: str) -> None:
    frozen = freeze(geometry, "topk", n_prompts=1, n_pos=2)
    root = frozen.feature_target(2, 3, -1)
    every = enumerate_paths(frozen, root, 2)
    n_branches = max(map(len, every))
    assert 100 < n_branches < 100_000
    found = greedy_paths(frozen, root, 2, n_branches, signs=signs)  # type: ignore[arg-type]
    if signs == "both":
        for all_paths, best in zip(every, found, strict=True):
            assert {p.nodes for p in best} == {p.nodes for p in all_paths}
            strengths = [abs(p.contribution) for p in best]
            assert strengths == sorted(strengths, reverse=True)
    else:
        positive = {p.nodes for p in every[0] if p.contribution > 0}
        assert {p.nodes for p in found[0]} == positive
        assert all(p.contribution > 0 for level in found for p in level)


def test_a_narrow_beam_keeps_the_strongest_of_each_length() -> None:
    frozen = freeze("gpt2", n_prompts=1, n_pos=4)
    root = frozen.logit_target({5: 1.0, 9: -1.0}, -1)
    every = enumerate_paths(frozen, root, 1)[0]
    found = greedy_paths(frozen, root, 3, 4)
    strongest = sorted(every, key=lambda path: -abs(path.contribution))[:4]
    assert [p.nodes for p in found[0]] == [p.nodes for p in strongest]
    assert [len(level) <= 4 for level in found] == [True] * 3
    assert {len(p.nodes) for p in found[2]} == {4}


@pytest.mark.parametrize(
    ("geometry", "kind"), list(itertools.product(GEOMETRIES, ("relu", "topk", "skip")))
)
def test_what_flows_into_a_step_back_is_what_flowed_out_of_it(geometry: str, kind: str) -> None:
    """Σ of a stepped-back node's sources = its contribution, less its constant's share."""
    frozen = freeze(geometry, kind, n_prompts=2, n_pos=5)
    target = frozen.logit_target({5: 1.0, 9: -1.0}, -1, prompt=1)
    kinds = set()
    for node, contribution in nodes_of(frozen, target):
        if node.kind not in EXPANDABLE:
            continue
        (further,) = sources(frozen, [step_back(frozen, target, node)])
        assert abs(further.residual) < 1e-9
        expected = contribution
        if node.kind == "feature":
            dictionary = frozen.transcoders[node.layer]
            scale = frozen.scale(target.site, 1, target.pos)
            through = scale * float(dictionary.decoder_direction(node.feature) @ target.direction)
            expected -= through * float(dictionary.b_enc[node.feature])
        assert further.total == pytest.approx(expected, rel=1e-7, abs=1e-10)
        kinds.add(node.kind)
    assert kinds >= {"feature", "head"}


def test_filters_choose_by_kind_layer_token_and_component() -> None:
    frozen = freeze("gpt2", n_prompts=1, n_pos=6)
    root = frozen.logit_target({5: 1.0}, -1)

    def nodes(**allowed: frozenset) -> list[Node]:
        found = greedy_paths(frozen, root, 2, 30, NodeFilter(**allowed))
        return [node for level in found for path in level for node in path.nodes[1:]]

    assert {n.kind for n in nodes(kinds=frozenset({"feature"}))} == {"feature"}
    assert {n.layer for n in nodes(layers=frozenset({1}))} == {1}
    assert {n.pos for n in nodes(positions=frozenset({-1}))} == {5}
    heads = nodes(kinds=frozenset({"head"}), components=frozenset({2}))
    assert heads
    assert {n.head for n in heads} == {2}


def test_a_graph_counts_shared_prefixes_once() -> None:
    root, a, b, c = (Node(kind, 0, -1, i, 0) for i, kind in enumerate(("root", *["feature"] * 3)))
    one, two = Path((root, a), 5.0), Path((root, b), -2.0)
    deep, deep_too = Path((root, a, c), 1.5), Path((root, b, c), 0.5)
    graph = paths_to_graph([deep, deep_too, one], [[one, two], [deep, deep_too]])
    assert graph.nodes == {root: 0.0, a: 5.0, b: -2.0, c: 2.0}
    assert graph.edges == {(a, root): 5.0, (c, a): 1.5, (b, root): -2.0, (c, b): 0.5}
    assert graph.edge_table()["contribution"].tolist() == [5.0, -2.0, 1.5, 0.5]
    assert [abs(value) for value in graph.node_table()["value"]] == [5.0, 2.0, 2.0, 0.0]
    with pytest.raises(InputError, match="no contribution for the prefix"):
        paths_to_graph([deep])


def test_paths_print_as_in_the_paper() -> None:
    nodes = (
        Node("root", 12, -1, -1, 8),
        Node("feature", 10, -1, 21238, 8),
        Node("head", 9, 1, -1, 6),
    )
    assert str(Path(nodes, 3.14)) == "root12@8 <- L10.21238@8 <- attn9[1]@6: 3.1"


def test_bad_input_is_named() -> None:
    frozen = freeze("gpt2", n_prompts=1, n_pos=3)
    root = frozen.logit_target({5: 1.0}, -1)
    with pytest.raises(InputError, match="n_iterations 0"):
        greedy_paths(frozen, root, 0)
    with pytest.raises(InputError, match="embedding@2 ends every path"):
        step_back(frozen, root, Node("embedding", -1, -1, -1, 2))


def test_the_search_agrees_with_autograd_two_steps_back() -> None:
    """Root ← feature ← feature of the same token: the product of direct derivatives."""
    frozen = freeze("gpt2", n_prompts=1, n_pos=3)
    root = frozen.feature_target(2, 3, -1)
    found = greedy_paths(frozen, root, 2, 2000, NodeFilter(kinds=frozenset({"feature"})))[1]
    assert found
    W = {layer: d.W_dec for layer, d in frozen.transcoders.items()}
    centre = frozen.lm.final_norm.centre
    for path in found[:20]:
        _, middle, last = path.nodes
        scales = [1 / float(frozen.cache.mlp_scale[layer][0, 2]) for layer in (2, middle.layer)]
        encoder = frozen.transcoders[middle.layer].W_enc
        first = centre(W[middle.layer])[middle.feature] @ frozen.transcoders[2].W_enc[:, 3]
        second = centre(W[last.layer])[last.feature] @ encoder[:, middle.feature]
        z = frozen.transcoders[last.layer].encode(frozen.cache.mlp_in[last.layer])
        expected = first * second * np.prod(scales) * z[0, 2, last.feature]
        assert path.contribution == pytest.approx(float(expected), rel=1e-8)
    assert torch.get_default_dtype() == torch.float32


def test_the_path_table_has_the_strongest_paths_of_each_length() -> None:
    frozen = freeze("gpt2", n_prompts=1)
    levels = greedy_paths(frozen, frozen.logit_target({5: 1.0}, -1), n_iterations=2, n_branches=4)
    table = path_table(levels, n_each=2)
    assert table["length"].tolist() == [2, 2, 3, 3]
    assert table["contribution"].tolist() == [p.contribution for level in levels for p in level[:2]]
    assert str(levels[1][0]).startswith(table["path"][2])
