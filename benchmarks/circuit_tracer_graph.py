"""circuit-tracer's graph of the prompt that full_graph.py has written, beside ours; in its own environment.

python benchmarks/full_graph.py FOLDER
python3.11 -m venv their_env
their_env/bin/pip install -c constraints.txt torch==2.13.0
their_env/bin/pip install circuit-tracer==0.5.0
their_env/bin/python benchmarks/circuit_tracer_graph.py FOLDER
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from circuit_tracer import attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from result import peak_gib
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel


class NoTokenizer:
    """Stands in where circuit-tracer names tokens."""

    def decode(self, ids: object) -> str:
        return str(ids)

    all_special_ids = range(1_000_000)  # or it would put a token of its own in front
    vocab_size = 50_257
    padding_side = "right"


def load_model(folder: Path) -> TransformerLensReplacementModel:
    source = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    own = source.config
    config = HookedTransformerConfig(
        n_layers=own.n_layer,
        d_model=own.n_embd,
        n_ctx=own.n_positions,
        d_head=own.n_embd // own.n_head,
        n_heads=own.n_head,
        d_mlp=4 * own.n_embd,
        d_vocab=own.vocab_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=own.layer_norm_epsilon,
        model_name="random-gpt2",
        device="cpu",
        original_architecture="GPT2LMHeadModel",
    )
    model = TransformerLensReplacementModel(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(source, config), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(own.n_layer)}
    hooks = ("ln2.hook_normalized", "hook_mlp_out")
    model._configure_replacement_model(load_transcoder_set(paths, "random", *hooks))
    model.tokenizer = NoTokenizer()
    return model


def node_names(graph: Any, n_layers: int, n_pos: int) -> list[tuple[object, ...]]:
    """Its nodes in its order (features, errors, tokens, logits), with our kinds and places."""
    features = graph.active_features[graph.selected_features].tolist()
    return [
        *(("feature", *place) for place in features),
        *(("error", layer, pos, -1) for layer in range(n_layers) for pos in range(n_pos)),
        *(("embedding", -1, pos, -1) for pos in range(n_pos)),
        *(("root", rank) for rank in range(len(graph.logit_targets))),
    ]


def main(folder: Path) -> None:
    told = json.loads((folder / "ours.json").read_text())
    ours, model = load_file(folder / "ours.safetensors"), load_model(folder)
    names = [tuple(node) for node in told["nodes"]]
    n_roots = sum(kind == "root" for kind, *_ in names)
    names[-n_roots:] = [("root", rank) for rank in range(n_roots)]
    n_features = sum(kind == "feature" for kind, *_ in names)
    began = time.perf_counter()
    graph = attribute(ours["tokens"], model, max_feature_nodes=n_features, verbose=True)
    prune_graph(graph)
    seconds = time.perf_counter() - began
    nodes = node_names(graph, model.cfg.n_layers, len(ours["tokens"]))
    theirs = {name: i for i, name in enumerate(nodes)}
    rows = [(row, theirs[names[i]]) for row, i in enumerate(told["targets"]) if names[i] in theirs]
    columns = [(i, theirs[name]) for i, name in enumerate(names) if name in theirs]
    own_rows, their_rows = torch.tensor(rows).T
    own_columns, their_columns = torch.tensor(columns).T
    expected = graph.adjacency_matrix[their_rows][:, their_columns]
    apart = (ours["edges"][own_rows][:, own_columns] - expected).abs().max()
    print(f"seconds: ours {told['seconds']:.1f}, theirs {seconds:.1f}; peak {peak_gib():.1f} GiB")
    print(f"features chosen by both: {len(rows) - n_roots} of {n_features}")
    print(f"largest difference of an edge {apart:.2e}, largest edge {expected.abs().max():.2e}")
    replacement, completeness = compute_graph_scores(graph)
    print(f"replacement: ours {told['replacement']:.4f}, theirs {replacement:.4f}")
    print(f"completeness: ours {told['completeness']:.4f}, theirs {completeness:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
