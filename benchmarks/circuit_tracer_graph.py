"""circuit-tracer's graph of the prompt that full_graph.py has written; runs in an environment of its own.

python3.11 -m venv their_env
their_env/bin/pip install -c constraints.txt torch==2.13.0
their_env/bin/pip install circuit-tracer==0.5.0
their_env/bin/python benchmarks/circuit_tracer_graph.py --folder full_graph_run
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import (
    TransformerLensReplacementModel,
)
from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel

N_LAYERS, MAX_FEATURES = 12, 7500
FEATURE_INPUT, FEATURE_OUTPUT = "ln2.hook_normalized", "hook_mlp_out"


class NoTokenizer:
    """Stands in where circuit-tracer names tokens."""

    def decode(self, ids: object) -> str:
        return str(ids)

    all_special_ids = range(1_000_000)  # or it would put a token of its own in front
    vocab_size = 50_257
    padding_side = "right"


def load_model(folder: Path) -> ReplacementModel:
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
    paths = {i: str(folder / f"layer_{i}.safetensors") for i in range(N_LAYERS)}
    transcoders = load_transcoder_set(paths, "random", FEATURE_INPUT, FEATURE_OUTPUT)
    model = TransformerLensReplacementModel(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(source, config), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    model._configure_replacement_model(transcoders)
    model.tokenizer = NoTokenizer()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("full_graph_run"))
    folder = parser.parse_args().folder
    model = load_model(folder)
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    began = time.perf_counter()
    graph = attribute(tokens, model, max_feature_nodes=MAX_FEATURES, verbose=True)
    built = time.perf_counter() - began
    pruned = prune_graph(graph)
    seconds = time.perf_counter() - began
    n_features = len(graph.selected_features)
    places = graph.active_features[graph.selected_features]
    n_roots = len(graph.logit_targets)
    rows = torch.cat(
        [torch.arange(n_features), torch.arange(len(graph.adjacency_matrix))[-n_roots:]]
    )
    edges = graph.adjacency_matrix[rows][:, :-n_roots].contiguous()
    save_file(
        {"features": places.long().contiguous(), "edges": edges}, folder / "theirs.safetensors"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (folder / "theirs.json").write_text(json.dumps({"seconds": seconds, "peak_gib": peak}))
    scores = compute_graph_scores(graph)
    print(f"graph {built:.1f} s, with pruning {seconds:.1f} s; {int(pruned.node_mask.sum())} nodes")
    print(f"replacement {scores[0]:.4f}, completeness {scores[1]:.4f}; peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
