"""Attribution along published paths: by hand, beside the exact search, and on the figures as printed."""

from __future__ import annotations

import pytest
from tiny import freeze

from tclib.circuits.paths import Node, greedy_paths
from tclib.replication.authors_paths import (
    PathStep,
    edges,
    feature_start,
    follow,
    logit_start,
    parse_path,
    transcoder_errors,
)
from tclib.replication.paper import paper_table
from tclib.support.errors import InputError


def test_a_path_contributes_what_the_search_found() -> None:
    """The authors' way and ours are one where encoders are centred, to which the norm is blind."""
    frozen = freeze("gpt2", "relu", n_prompts=1)
    for dictionary in frozen.transcoders.values():
        dictionary.W_enc -= dictionary.W_enc.mean(0)
    root, start = frozen.feature_target(2, 3, 6), feature_start(frozen, 2, 3)
    for paths in greedy_paths(frozen, root, n_iterations=3, n_branches=8):
        for path in paths:
            if path.nodes[-1].kind in ("feature", "head"):
                found = follow(frozen, start, path.nodes[1:])[-1].contribution
                assert found == pytest.approx(path.contribution, rel=1e-9)
    token, position = frozen.cache.token_embedding, frozen.cache.position_embedding
    assert position is not None
    (step,) = follow(frozen, start, [Node("embedding", -1, -1, -1, 6)])
    stream = token[0, 6] + position[0, 6]
    assert step.contribution == pytest.approx(float(stream @ start.direction), rel=1e-9)


def test_encoder_directions_are_not_centred() -> None:
    """feature ← feature is z · (W_dec[j] · W_enc[:, i]) / σ, with the mean of both in it."""
    frozen = freeze("gpt2", "relu", n_prompts=1)
    later, middle, earlier = (frozen.transcoders[layer] for layer in (2, 1, 0))
    scales = [float(scale[0, 6]) for scale in frozen.cache.mlp_scale]
    acts = earlier.encode(frozen.cache.mlp_in[0])[0, 6]
    j = int(acts.argmax())
    node = Node("feature", 0, -1, j, 6)
    (step,) = follow(frozen, feature_start(frozen, 2, 3), [node])
    through = follow(frozen, feature_start(frozen, 2, 3), [Node("feature", 1, -1, 5, 6), node])[-1]
    weights = (earlier.W_dec[j] @ middle.W_enc[:, 5]) * (middle.W_dec[5] @ later.W_enc[:, 3])
    expected = float(acts[j] * weights) / scales[2] / scales[1]
    assert through.contribution == pytest.approx(expected, rel=1e-9)
    by_hand = acts[j] * (earlier.W_dec[j] @ later.W_enc[:, 3]) / frozen.cache.mlp_scale[2][0, 6]
    assert step.contribution == pytest.approx(float(by_hand), rel=1e-9)
    centred = acts[j] * (earlier.W_dec[j] @ frozen.lm.final_norm.centre(later.W_enc[:, 3]))
    assert abs(step.contribution - centred / frozen.cache.mlp_scale[2][0, 6]) > 1e-3
    errors = sum(frozen.parts[layer].error[0, 6] @ later.W_enc[:, 3] for layer in (0, 1))
    found = transcoder_errors(frozen, feature_start(frozen, 2, 3), 2)
    assert found == pytest.approx(float(errors / frozen.cache.mlp_scale[2][0, 6]), rel=1e-9)


def test_a_silent_feature_marks_the_paths_through_it() -> None:
    frozen = freeze("gpt2", "relu", n_prompts=1)
    z = frozen.transcoders[0].encode(frozen.cache.mlp_in[0])[0, 4]
    silent = Node("feature", 0, -1, int((z == 0).nonzero()[0]), 4)
    head = Node("head", 1, 2, -1, 4)
    steps = follow(frozen, logit_start(frozen, 7, 9), [head, silent])
    assert [step.is_silent for step in steps] == [False, True]
    assert steps[0].contribution != 0 and steps[1].contribution == 0


def test_edges_add_up_over_distinct_beginnings() -> None:
    paths = ["r: 1.0 <- a: 0.5", "r: 1.0 <- a: 0.5 <- c: 0.2", "r: 1.0 <- b: 0.3 <- c: 0.1"]
    paths.append("r: 1.0 <- b: 0.3 <- a: 0.1 <- c: 0.1")
    values = [(0.5,), (0.5, 0.2), (0.3, 0.1), (0.3, 0.1, 0.05)]
    found = edges(paths, [[PathStep(value, False) for value in own] for own in values])
    by_hand = {("a", "r"): 0.5, ("c", "a"): 0.25, ("b", "r"): 0.3, ("c", "b"): 0.1, ("a", "b"): 0.1}
    assert {edge: step.contribution for edge, step in found.items()} == pytest.approx(by_hand)


def test_the_published_edges_are_those_of_the_published_paths() -> None:
    """Sums of the contributions as printed are the edges as printed, to the digits of the paths."""
    rows = [row for row in paper_table("paths") if row["notebook"] == "walkthrough"]
    paths = [list(row.values())[-1] for row in rows]
    values = [[float(s.rsplit(": ", 1)[1]) for s in p.split(" <- ")[1:]] for p in paths]
    found = edges(paths, [[PathStep(value, False) for value in own] for own in values])
    published_edges = paper_table("edges")
    assert len(published_edges) == len(found) == 33
    for row in published_edges:
        ours = found[row["source_node"], row["target_node"]].contribution
        assert ours == pytest.approx(float(row["contribution"]), abs=0.02)
    closure = {row["quantity"]: float(row["value"]) for row in paper_table("closure")}
    assert closure["node"] - closure["edges"] == pytest.approx(closure["prune_error"])


def test_published_paths_are_parsed() -> None:
    text = "mlp11@-1 <- attn9[1]@6: 6.9 <- mlp0tc[17180]@-3: 4.7e+00 <- embed0@6: -0.31"
    nodes, printed = parse_path(text, n_pos=9)
    assert printed == "-0.31"
    assert nodes == [
        Node("head", 9, 1, -1, 6),
        Node("feature", 0, -1, 17180, 6),
        Node("embedding", -1, -1, -1, 6),
    ]
    with pytest.raises(InputError, match="'mlp3@2: 1.0' is no feature, head or embedding"):
        parse_path("mlp11@-1 <- mlp3@2: 1.0", 9)


def test_every_published_path_can_be_parsed() -> None:
    rows = paper_table("paths")
    text = list(rows[0])[-1]
    lengths = [len(parse_path(row[text], 9)[0]) + 1 for row in rows]
    assert lengths == [int(row["path_length"]) for row in rows] and len(rows) == 135
