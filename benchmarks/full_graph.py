"""The full attribution graph of a prompt, beside one backward pass a node.

python benchmarks/full_graph.py FOLDER [--small]    what circuit_tracer_graph.py reads
"""

import json
import sys
import time
from pathlib import Path

import torch
from random_models import GPT2_SMALL, SMALL
from result import Result, difference, peak_gib
from safetensors.torch import save_file
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import AttributionGraph, attribution_graph
from tclib.circuits.prune import graph_scores, prune

N_CHECKED = 4
LABELS = ["kind", "layer", "pos", "feature"]


def run(small: bool) -> Result:
    """32 tokens, twelve transcoders of 24,576 features, L0 about 100. Target: 30 s.

    circuit-tracer's defaults: 7,500 feature nodes, thresholds 0.8 and 0.98, no features at the first token.
    Edges must be activation × gradient through the frozen model; one backward pass for each node is what
    one would write first.
    """
    frozen, graph, seconds = make(small)
    peak = peak_gib()
    rows = graph.nodes.iloc[graph.targets].reset_index(drop=True)
    features = rows[rows["kind"] == "feature"].sort_values(["layer", "pos"])
    checked = [one_node(frozen, graph, row) for row in features.index[-N_CHECKED:]]
    apart, backward = (torch.tensor(column) for column in zip(*checked, strict=True))
    ratio = float(backward.mean()) * len(rows) / seconds
    residual = float(graph.closure()["residual"].abs().max())
    what = f"full graph of {frozen.n_pos} tokens, {len(features):,} feature nodes, pruned"
    return Result(
        {"n_pos": frozen.n_pos, "n_feature_nodes": len(features), "n_nodes": len(graph.nodes)},
        {
            what: (seconds, "s"),
            "its peak memory": (peak, "GiB"),
            "one backward pass a node over the full graph, in time": (ratio, "×"),
        },
        {
            "edges into a node, autograd's": (float(apart.max()), 1e-4),
            "value of a node, the sum of its edges": (residual, 1e-4),
        },
    )


def make(small: bool) -> tuple[FrozenPrompts, AttributionGraph, float]:
    """The prompt, its graph, and the seconds with encoding and pruning."""
    shape, n_pos, n_nodes = (SMALL, 8, 150) if small else (GPT2_SMALL, 32, 7500)
    lm, tokens = shape.lm(n_pos), shape.rows(1, n_pos).long()
    transcoders = shape.transcoders(lm, tokens)
    began = time.perf_counter()
    frozen = FrozenPrompts(lm, tokens, transcoders)
    graph = attribution_graph(frozen, max_feature_nodes=n_nodes, keep_bos=False)
    prune(graph)
    return frozen, graph, time.perf_counter() - began


def one_node(frozen: FrozenPrompts, graph: AttributionGraph, row: int) -> tuple[float, float]:
    """(Largest difference of an edge into a feature, seconds) of a pass forward and back."""
    _, layer, pos, feature = graph.nodes.iloc[graph.targets[row]][LABELS]
    began = time.perf_counter()
    inputs = frozen.cache.mlp_in[:layer]
    acts = [frozen.transcoders[i].encode(x)[0].requires_grad_() for i, x in enumerate(inputs)]
    value = frozen_mlp_in(frozen, acts)[pos] @ frozen.transcoders[layer].W_enc[:, feature]
    gradients = torch.autograd.grad(value, acts)
    effects = torch.stack([(z * g).detach() for z, g in zip(acts, gradients, strict=True)])
    seconds = time.perf_counter() - began
    nodes = graph.nodes
    sources = nodes[(nodes["kind"] == "feature") & (nodes["layer"] < layer)]
    found = graph.edges[row, sources.index.to_list()]
    expected = effects[tuple(torch.tensor(sources[LABELS[1:]].to_numpy().T))]
    return difference(found, expected), seconds


def frozen_mlp_in(frozen: FrozenPrompts, acts: list[Tensor]) -> Tensor:
    """What the MLP above `acts` reads, patterns and scales frozen, by plain matrices: [pos, d_model]."""
    cache, top = frozen.cache, len(acts)
    stream = cache.token_embedding[0] + cache.position_embedding[0]
    for layer in range(top + 1):
        w = frozen.attention[layer]
        normalised = centred(stream) / cache.attention_scale[layer][0, :, None]
        values = torch.einsum("sd,hdk->hsk", normalised, w.W_V) + w.b_V[:, None]
        mixed = cache.pattern[layer][0] @ values
        stream = stream + torch.einsum("htk,hkd->td", mixed, w.W_O) + w.b_O
        if layer < top:
            d = frozen.transcoders[layer]
            stream = stream + acts[layer] @ d.W_dec + d.b_dec + frozen.parts[layer].error[0]
    return centred(stream) / cache.mlp_scale[top][0, :, None]


def centred(stream: Tensor) -> Tensor:
    return stream - stream.mean(-1, keepdim=True)


def write(folder: Path, small: bool) -> None:
    """One transcoder a file, the model, the tokens, and our graph of them, for circuit-tracer."""
    frozen, graph, seconds = make(small)
    frozen.lm.model.save_pretrained(folder / "model")
    for layer, d in frozen.transcoders.items():
        weights = {**d.parameters(), "W_enc": d.W_enc.T.contiguous()}
        save_file(weights, folder / f"layer_{layer}.safetensors")
    save_file({"tokens": frozen.cache.tokens[0], "edges": graph.edges}, folder / "ours.safetensors")
    told = {
        "seconds": seconds,
        "nodes": graph.nodes[LABELS].to_numpy().tolist(),
        "targets": graph.targets.tolist(),
        **graph_scores(graph)._asdict(),
    }
    (folder / "ours.json").write_text(json.dumps(told))


if __name__ == "__main__":
    write(Path(sys.argv[1]), "--small" in sys.argv)
