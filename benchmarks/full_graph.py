"""The full attribution graph of a 32-token prompt, beside circuit-tracer on the same weights.

    python benchmarks/full_graph.py                 ours; writes the weights and the graph into --folder
    <its environment>/bin/python benchmarks/circuit_tracer_graph.py     theirs, on those weights
    python benchmarks/full_graph.py --compare       the two graphs, edge by edge

Random GPT-2-small-sized model, twelve transcoders of 24,576 features, L0 about 100 a token; circuit-tracer's
defaults: at most 7,500 feature nodes, node threshold 0.8, edge threshold 0.98. Features at the first token
are left out, as circuit-tracer does.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from attribution import D_VOCAB, random_lm, random_transcoder
from safetensors.torch import load_file, save_file

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.graph import AttributionGraph, attribution_graph
from tclib.circuits.prune import graph_scores, prune
from tclib.dictionaries.dictionary import Dictionary
from tclib.models.language_model import LanguageModel

N_POS, N_LAYERS, MAX_FEATURES = 32, 12, 7500
LABELS = ["layer", "pos", "feature"]


def setup() -> tuple[LanguageModel, torch.Tensor, list[Dictionary]]:
    lm = random_lm(N_POS)
    tokens = torch.randint(2, D_VOCAB, (1, N_POS))
    cache = lm.cache(tokens)
    return (
        lm,
        tokens,
        [random_transcoder(layer, cache.mlp_in[layer][0]) for layer in range(N_LAYERS)],
    )


def write_weights(
    folder: Path, lm: LanguageModel, tokens: torch.Tensor, transcoders: list[Dictionary]
) -> None:
    """What circuit_tracer_graph.py reads: one transcoder a file, the model, the tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    lm.model.save_pretrained(folder / "model")
    save_file({"tokens": tokens[0]}, folder / "tokens.safetensors")
    for layer, d in enumerate(transcoders):
        weights = {"W_enc": d.W_enc.T, "b_enc": d.b_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(contiguous, folder / f"layer_{layer}.safetensors")


def write_graph(folder: Path, graph: AttributionGraph, seconds: float) -> None:
    """Feature places, and effects on them (and on the logits) from features, errors and tokens."""
    kind = graph.nodes["kind"]
    features = (kind == "feature").to_numpy().nonzero()[0]
    # Errors at the first token are left out here and zero there.
    errors = graph.nodes[kind == "error"]
    by_place = torch.zeros(len(graph.edges), N_LAYERS * N_POS)
    places = torch.tensor((errors["layer"] * N_POS + errors["pos"]).to_numpy())
    by_place[:, places] = graph.edges[:, torch.tensor(errors.index.to_numpy())]
    tokens = graph.edges[:, torch.tensor((kind == "embedding").to_numpy())]
    tensors = {
        "features": torch.tensor(graph.nodes[kind == "feature"][LABELS].to_numpy()).contiguous(),
        "edges": torch.cat([graph.edges[:, torch.tensor(features)], by_place, tokens], dim=1),
    }
    save_file(tensors, folder / "ours.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (folder / "ours.json").write_text(json.dumps({"seconds": seconds, "peak_gib": peak}))


def run(folder: Path) -> None:
    lm, tokens, transcoders = setup()
    write_weights(folder, lm, tokens, transcoders)
    began = time.perf_counter()
    frozen = FrozenPrompts(lm, tokens, transcoders)
    graph = attribution_graph(frozen, max_feature_nodes=MAX_FEATURES, keep_bos=False)
    built = time.perf_counter() - began
    small = prune(graph)
    seconds = time.perf_counter() - began
    scores = graph_scores(graph)
    write_graph(folder, graph, seconds)
    n_active = sum(len(parts.active.acts) for parts in frozen.parts.values())
    worst = graph.closure()["residual"].abs().max()
    print(f"{n_active} active features, {len(graph.targets)} targets, {len(graph.nodes)} nodes")
    print(f"graph {built:.1f} s, with pruning {seconds:.1f} s; {len(small.nodes)} nodes are kept")
    print(f"replacement {scores.replacement:.4f}, completeness {scores.completeness:.4f}")
    print(f"largest relative residual of a node {worst:.1e}")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def compare(folder: Path) -> None:
    tensors = {who: load_file(folder / f"{who}.safetensors") for who in ("ours", "theirs")}
    told = {who: json.loads((folder / f"{who}.json").read_text()) for who in tensors}
    places = {who: list(map(tuple, t["features"].tolist())) for who, t in tensors.items()}
    rows = {who: {place: i for i, place in enumerate(p)} for who, p in places.items()}
    shared = sorted(set(places["ours"]) & set(places["theirs"]))
    picked = {}
    for who, table in rows.items():
        features = torch.tensor([table[place] for place in shared])
        n_own, n_columns = len(places[who]), tensors[who]["edges"].shape[1]
        inputs = torch.arange(n_own, n_columns)
        roots = torch.arange(n_own, len(tensors[who]["edges"]))
        edges = tensors[who]["edges"][torch.cat([features, roots])]
        picked[who] = edges[:, torch.cat([features, inputs])]
    difference = (picked["ours"] - picked["theirs"]).abs().max()
    largest = picked["theirs"].abs().max()
    print(f"features chosen by both: {len(shared)} of {len(places['theirs'])}")
    print(f"largest difference of an edge {difference:.2e}, largest edge {largest:.2e}")
    ratio = told["theirs"]["seconds"] / told["ours"]["seconds"]
    print(f"seconds: ours {told['ours']['seconds']:.1f}, theirs {told['theirs']['seconds']:.1f}")
    print(
        f"theirs / ours {ratio:.1f}; peak GiB {told['ours']['peak_gib']:.1f} / {told['theirs']['peak_gib']:.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("full_graph_run"))
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    compare(arguments.folder) if arguments.compare else run(arguments.folder)
