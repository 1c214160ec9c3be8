"""Graphs come back equal from disk; the viewer's file has unique ids and only known ends."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import freeze

from tclib.circuits.files import (
    load_json,
    load_parquet,
    save_for_viewer,
    save_json,
    save_parquet,
)
from tclib.circuits.graph import AttributionGraph, attribution_graph
from tclib.circuits.prune import prune, sum_over_tokens
from tclib.support.errors import InputError


def small_graph(dtype: torch.dtype = torch.float64) -> AttributionGraph:
    frozen = freeze("gpt2", "relu", dtype, n_prompts=1, layers=(0, 2))
    return prune(attribution_graph(frozen, heads="summed"), 0.9, 0.99)


def assert_same(one: AttributionGraph, other: AttributionGraph) -> None:
    pd.testing.assert_frame_equal(one.nodes, other.nodes)
    assert torch.equal(one.edges, other.edges) and one.edges.dtype == other.edges.dtype
    assert one.targets.tolist() == other.targets.tolist()
    assert one.constant.tolist() == other.constant.tolist()
    assert one.left_out.tolist() == other.left_out.tolist()
    assert (one.model, one.tokens) == (other.model, other.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_graph_comes_back_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    graph = small_graph(dtype)
    save_json(graph, tmp_path / "graph.json")
    assert_same(graph, load_json(tmp_path / "graph.json"))
    save_parquet(graph, tmp_path / "tables")
    assert_same(graph, load_parquet(tmp_path / "tables"))
    summed = sum_over_tokens(graph)
    save_json(summed, tmp_path / "graph.json")
    assert_same(summed, load_json(tmp_path / "graph.json"))


def test_the_viewers_file_is_consistent(tmp_path: Path) -> None:
    graph = small_graph()
    for slug in ("one", "two", "one"):
        save_for_viewer(graph, tmp_path, slug)
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [entry["slug"] for entry in listed] == ["two", "one"]
    held = json.loads((tmp_path / "one.json").read_text())
    ids = [node["node_id"] for node in held["nodes"]]
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    assert {link[end] for link in held["links"] for end in ("source", "target")} <= set(ids)
    assert len(held["links"]) == int((graph.edges != 0).sum())
    types = {node["feature_type"] for node in held["nodes"]}
    assert types == {
        "cross layer transcoder",
        "mlp reconstruction error",
        "embedding",
        "logit",
    }
    feature = next(n for n in held["nodes"] if n["feature_type"] == "cross layer transcoder")
    layer, index, _ = map(int, feature["node_id"].split("_"))
    assert feature["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    # What the viewer tells nodes apart by, as it makes it itself:
    keys = {f"{n['layer']}_{n['feature']}_{n['ctx_idx']}" for n in held["nodes"]}
    assert len(keys) == len(ids)
    assert sum(node["is_target_logit"] for node in held["nodes"]) == 1


def test_bad_files_and_names_are_refused(tmp_path: Path) -> None:
    graph = small_graph()
    with pytest.raises(InputError, match="does not exist"):
        load_json(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="does not exist"):
        load_parquet(tmp_path)
    (tmp_path / "broken.json").write_text('{"format": ')
    with pytest.raises(InputError, match="truncated or corrupted"):
        load_json(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"format": "something"}')
    with pytest.raises(InputError, match="does not hold an attribution graph"):
        load_json(tmp_path / "other.json")
    save_parquet(graph, tmp_path)
    (tmp_path / "nodes.parquet").write_bytes((tmp_path / "nodes.parquet").read_bytes()[:100])
    with pytest.raises(InputError, match=r"nodes.parquet cannot be read"):
        load_parquet(tmp_path)
    with pytest.raises(InputError, match="slug 'a/b'"):
        save_for_viewer(graph, tmp_path, "a/b")
    for slug in ("", "../evil", "/evil", "..", "a b", "x" * 101):
        with pytest.raises(InputError, match=f"slug '{slug}': expected letters"):
            save_for_viewer(graph, tmp_path / "viewer", slug)
    for slug in ("graph-metadata", "Graph-Metadata"):
        with pytest.raises(InputError, match="the viewer's index is called so"):
            save_for_viewer(graph, tmp_path / "viewer", slug)
    assert not (tmp_path / "viewer").exists()
    for text in ("{", "[]", '{"graphs": [1]}'):
        (tmp_path / "graph-metadata.json").write_text(text)
        with pytest.raises(
            InputError, match="graph-metadata.json is (no index|truncated or corrupted)"
        ):
            save_for_viewer(graph, tmp_path, "one")
        assert not (tmp_path / "one.json").exists()
    with pytest.raises(InputError, match="before tokens are summed"):
        save_for_viewer(sum_over_tokens(graph), tmp_path, "summed")


def test_a_file_that_asks_for_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    save_json(small_graph(), tmp_path / "graph.json")
    held = json.loads((tmp_path / "graph.json").read_text())
    for what in ("targets", "constant", "left_out"):
        held[what] = held[what][:1] * 25_000
    (tmp_path / "graph.json").write_text(json.dumps(held))
    with pytest.raises(InputError, match="expected each target once"):
        load_json(tmp_path / "graph.json")
