"""Attribution graphs on disk: JSON, parquet, and the format of circuit-tracer's viewer.

JSON holds everything of one graph in one file. Parquet has two tables beside each other, nodes and
edges, for graphs of thousands of nodes. Both are read back equal. The viewer's format is written only:
it has no place for biases' sums, so what is left out of a target does not appear there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tclib.circuits.graph import AttributionGraph, edge_columns, edges_between
from tclib.support.checked import checked
from tclib.support.errors import InputError
from tclib.support.files import check_name, new_file
from tclib.support.paths import check_file, read_json

FORMAT = "tclib-attribution-graph-1"
REMEDY = "save the graph again"
MAX_EDGES = 2**31  # 8 GiB in float32, as `attribution_graph` has it
VIEWER_SCHEMA = 1
VIEWER_INDEX = "graph-metadata"
# What the viewer calls each kind; whatever is no feature, token or logit is drawn as an error.
_VIEWER_TYPES = {
    "feature": "cross layer transcoder",
    "embedding": "embedding",
    "root": "logit",
    "supernode": "cross layer transcoder",
}
_VIEWER_ERROR = "mlp reconstruction error"
# The viewer tells nodes of one layer and token apart by this number.
_VIEWER_CODES = {"error": -1, "mlp": -2, "decoder_bias": -3, "attention_bias": -4, "position": -5}


@checked
def save_json(graph: AttributionGraph, path: Path) -> None:
    """One JSON file: model, tokens, nodes, edges as [source, target, effect]."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(_as_dict(graph)), encoding="utf-8")


@checked
def load_json(path: Path) -> AttributionGraph:
    """Read what `save_json` wrote. Errors: `InputError` for a missing, broken or other file."""
    held = read_json(path, REMEDY)
    _check_format(path, held)
    with _damage_named(path):
        edges = pd.DataFrame(held["edges"], columns=["source", "target", "effect"])
        return _rebuilt(held, pd.DataFrame(held["nodes"]).astype(held["types"]), edges)


@checked
def save_parquet(graph: AttributionGraph, folder: Path) -> None:
    """`nodes.parquet` (with constant and left_out of targets) and `edges.parquet`."""
    header = {"format": FORMAT, "model": graph.model, "tokens": list(graph.tokens)}
    header |= {"dtype": _dtype_name(graph)}
    nodes = graph.nodes.assign(is_target=False, constant=np.nan, left_out=np.nan)
    nodes.loc[graph.targets, "is_target"] = True
    nodes.loc[graph.targets, "constant"] = graph.constant
    nodes.loc[graph.targets, "left_out"] = graph.left_out
    edges = pd.DataFrame(edge_columns(graph))
    for name, frame in (("nodes", nodes), ("edges", edges)):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        named = {**(table.schema.metadata or {}), b"tclib": json.dumps(header).encode()}
        with new_file(folder / f"{name}.parquet") as temporary:
            pq.write_table(table.replace_schema_metadata(named), temporary)


@checked
def load_parquet(folder: Path) -> AttributionGraph:
    """Read what `save_parquet` wrote. Errors: `InputError` for missing, broken or other files."""
    found, edges = (_table(folder / f"{name}.parquet") for name in ("nodes", "edges"))
    header = (found.schema.metadata or {}).get(b"tclib")
    held = json.loads(header) if header else {}
    _check_format(folder, held)
    with _damage_named(folder):
        frame = found.to_pandas()
        held["targets"] = targets = frame["is_target"].to_numpy().nonzero()[0]
        held |= {name: frame[name].to_numpy()[targets] for name in ("constant", "left_out")}
        nodes = frame.drop(columns=["is_target", "constant", "left_out"])
        return _rebuilt(held, nodes, edges.to_pandas())


def _as_dict(graph: AttributionGraph) -> dict[str, Any]:
    nodes = graph.nodes.astype(object).where(graph.nodes.notna(), None)
    return {
        "format": FORMAT,
        "model": graph.model,
        "tokens": list(graph.tokens),
        "dtype": _dtype_name(graph),
        "types": {name: str(kind) for name, kind in graph.nodes.dtypes.items()},
        "nodes": nodes.to_dict(orient="records"),
        "targets": graph.targets.tolist(),
        "constant": graph.constant.tolist(),
        "left_out": graph.left_out.tolist(),
        "edges": list(edges_between(graph)),
    }


def _dtype_name(graph: AttributionGraph) -> str:
    return str(graph.edges.dtype).removeprefix("torch.")


def _rebuilt(held: dict[str, Any], nodes: pd.DataFrame, edges: pd.DataFrame) -> AttributionGraph:
    targets = np.asarray(held["targets"], dtype=np.int64)
    if len(set(targets.tolist())) < len(targets) or len(targets) * len(nodes) > MAX_EDGES:
        raise InputError(
            f"a graph of {len(targets)} targets and {len(nodes)} nodes: expected each target once, and "
            f"{MAX_EDGES:,} edges at most"
        )
    row_of = np.full(len(nodes), -1)
    row_of[targets] = np.arange(len(targets))
    matrix = torch.zeros(len(targets), len(nodes), dtype=getattr(torch, held["dtype"]))
    rows = torch.tensor(row_of[edges["target"].to_numpy(dtype=np.int64)])
    columns = torch.tensor(edges["source"].to_numpy(dtype=np.int64))
    matrix[rows, columns] = torch.tensor(edges["effect"].to_numpy(dtype=np.float64)).to(matrix)
    return AttributionGraph(
        held["model"],
        tuple(held["tokens"]),
        nodes,
        matrix,
        targets,
        np.asarray(held["constant"], dtype=np.float64),
        np.asarray(held["left_out"], dtype=np.float64),
    )


def _table(path: Path) -> pa.Table:
    check_file(path, REMEDY)
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({error}): {REMEDY}") from error


def _check_format(path: Path, held: object) -> None:
    found = held.get("format") if isinstance(held, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} does not hold an attribution graph (format {found!r}): {FORMAT}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What was written by a graph's name, but is none: `InputError` in the place of whatever that gives."""
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {reason}): {REMEDY}"
        ) from error


# ---------------------------------------------------------------------------------------------
# circuit-tracer's viewer


@checked
def save_for_viewer(graph: AttributionGraph, folder: Path, slug: str, scan: str = "tclib") -> None:
    """Write `<slug>.json` and enter it in `graph-metadata.json`, as circuit-tracer's server expects.

    `circuit-tracer start-server --graph_file_dir folder` then shows it. Node ids are unique: errors
    do not share their ids with features of layer 0. Prune first: the viewer is made for some
    hundreds of nodes. Errors: `InputError` for a slug that is no file name, or a graph whose tokens
    have been summed: the viewer draws every node at its token.
    """
    if (graph.nodes["pos"] < 0).any():
        raise InputError("nodes without a token: export the graph before tokens are summed")
    check_name("slug", slug, "-_")
    if slug.casefold() == VIEWER_INDEX:
        raise InputError(f"slug {slug!r}: the viewer's index is called so; choose another name")
    index = folder / f"{VIEWER_INDEX}.json"
    listed = [one for one in _listed(index) if one["slug"] != slug]
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": "".join(graph.tokens),
        "node_threshold": 1.0,
        "schema_version": VIEWER_SCHEMA,
    }
    lines = list(_with_reached(graph.nodes).itertuples())
    ids = [_viewer_id(line) for line in lines]
    document = {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_viewer_node(line, id_, graph) for line, id_ in zip(lines, ids, strict=True)],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in edges_between(graph)
        ],
    }
    with new_file(folder / f"{slug}.json") as temporary:
        temporary.write_text(json.dumps(document), encoding="utf-8")
    with new_file(index) as temporary:
        temporary.write_text(json.dumps({"graphs": [*listed, metadata]}), encoding="utf-8")


def _with_reached(nodes: pd.DataFrame) -> pd.DataFrame:
    """Adds the share of all influence that a node and all stronger ones have: the viewer's slider."""
    inner = nodes["influence"].where(nodes["kind"] != "root", 0.0)
    ordered = inner.sort_values(ascending=False, kind="stable")
    return nodes.assign(reached=ordered.cumsum() / max(ordered.sum(), 1e-30))


def _viewer_id(line: Any) -> str:
    if line.kind == "feature":
        return f"{line.layer}_{line.feature}_{line.pos}"
    if line.kind == "embedding":
        return f"E_{line.Index}_{line.pos}"
    return f"{line.kind}-{line.layer}_{line.Index}_{line.pos}"


def _viewer_node(line: Any, node_id: str, graph: AttributionGraph) -> dict[str, Any]:
    is_root = line.kind == "root"
    share = float(line.root_weight)
    names = {
        "root": f'Output "{line.name}" (p={share:.3f})',
        "embedding": graph.tokens[line.pos],
        "feature": "",
    }
    return {
        "node_id": node_id,
        "feature": _viewer_number(line),
        "layer": "E" if line.layer < 0 else str(line.layer + is_root),
        "ctx_idx": line.pos,
        "feature_type": _VIEWER_TYPES.get(line.kind, _VIEWER_ERROR),
        "token_prob": share,
        "is_target_logit": bool(is_root and share == graph.nodes["root_weight"].max()),
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{node_id}-0",
        "clerp": names.get(line.kind, line.name),
        "influence": float(line.reached),
        "activation": float(line.activation) if line.kind == "feature" else None,
    }


def _viewer_number(line: Any) -> int:
    if line.kind == "feature":  # Cantor's pairing, by which the viewer finds a feature of a layer
        both = line.layer + line.feature
        return int(both * (both + 1) // 2 + line.feature)
    if line.kind == "root":
        return int(line.feature if line.feature >= 0 else -100 - line.Index)
    if line.kind == "embedding":
        return int(line.pos)
    return int(_VIEWER_CODES.get(line.kind, -10 - max(line.head, 0)))


def _listed(index: Path) -> list[dict[str, Any]]:
    """The graphs that the viewer's index holds. Errors: `InputError` for a file that is none."""
    if not index.is_file():
        return []
    held = read_json(index, "move it away, or choose another folder")
    graphs = held.get("graphs") if isinstance(held, dict) else None
    if not isinstance(graphs, list) or not all(isinstance(g, dict) and "slug" in g for g in graphs):
        raise InputError(
            f"{index} is no index of the viewer: move it away, or choose another folder"
        )
    return graphs
