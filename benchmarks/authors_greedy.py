"""The authors' greedy search on what authors.py has written; runs in their environment, started by authors.py.

<their environment>/bin/python benchmarks/authors_greedy.py FOLDER REPOSITORY
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel


def load_model(folder: Path) -> HookedTransformer:
    """The model in the basis of HookedTransformer.from_pretrained: all of its processing on."""
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
        normalization_type="LNPre",
        eps=own.layer_norm_epsilon,
        model_name="random-gpt2",
        device="cpu",
        original_architecture="GPT2LMHeadModel",
    )
    model = HookedTransformer(config)
    model.load_and_process_state_dict(convert_gpt2_weights(source, config))
    return model


def load_transcoder(folder: Path, layer: int, made_of: Any) -> Any:
    weights = load_file(folder / f"layer_{layer}.safetensors")
    d_in, d_sae = weights["W_enc"].shape
    hook = f"blocks.{layer}.ln2.hook_normalized"
    config = SimpleNamespace(
        d_in=d_in,
        d_out=d_in,
        d_sae=d_sae,
        hook_point=hook,
        hook_point_layer=layer,
        is_transcoder=True,
        is_sparse_connection=False,
        use_ghost_grads=False,
        l1_coefficient=0.0,
        dtype=torch.float32,
        device="cpu",
    )
    one = made_of(config)
    state = {**weights, "b_dec_out": weights["b_dec"], "b_dec": torch.zeros(d_in)}
    one.load_state_dict(state)
    return one.eval()


def as_node(feature: Any, kinds: dict[Any, str]) -> list[object]:
    """kind, layer, head, feature, pos, as tclib names nodes."""
    last = feature.component_path[-1]
    kind, pos = kinds[last.component_type], int(last.token)
    if kind == "feature":
        return [kind, last.layer, -1, int(last.feature_idx), pos]
    if kind == "head":
        return [kind, last.layer, int(last.attn_head), -1, pos]
    return [kind, -1, -1, -1, pos]


def search(task: Any, model: Any, transcoders: Any, analysis: Any, with_embedding: bool) -> Any:
    """Paths of every length for each prompt and root, and the seconds that they took."""
    kinds = {
        analysis.ComponentType.MLP: "feature",
        analysis.ComponentType.ATTN: "head",
        analysis.ComponentType.EMBED: "embedding",
    }
    without = analysis.FeatureFilter(
        component_type=analysis.ComponentType.EMBED,
        component_type_filter_type=analysis.FilterType.NE,
    )
    options = {"num_iters": task["n_iterations"], "num_branches": task["n_branches"]}
    options |= {"do_raw_attribution": True, "filter": None if with_embedding else without}
    found, seconds = [], 0.0
    for row, (layer, feature) in zip(task["rows"], task["roots"], strict=True):
        roots = [logit_root(task, model, analysis)]
        roots.append(analysis.make_sae_feature_vector(transcoders[layer], feature))
        began = time.perf_counter()
        _, cache = model.run_with_cache(torch.tensor([row]))
        each = [
            analysis.greedy_get_top_paths(model, transcoders, cache, root, **options)
            for root in roots
        ]
        seconds += time.perf_counter() - began
        found.append(
            [
                [
                    [([as_node(f, kinds) for f in path[1:]], path[-1].contrib) for path in level]
                    for level in levels
                ]
                for levels in each
            ]
        )
    return {"paths": found, "seconds": seconds}


def logit_root(task: Any, model: Any, analysis: Any) -> Any:
    """As in the authors' greater-than notebook."""
    answer, other = task["logits"]
    last = model.cfg.n_layers - 1
    component = analysis.Component(layer=last, component_type=analysis.ComponentType.MLP, token=-1)
    return analysis.FeatureVector(
        component_path=[component],
        vector=model.W_U[:, answer] - model.W_U[:, other],
        layer=last,
        sublayer="resid_post",
        token=-1,
    )


@torch.no_grad()
def main(folder: Path, repository: str) -> None:
    sys.path.insert(0, repository)
    from sae_training.sparse_autoencoder import SparseAutoencoder
    from transcoder_circuits import circuit_analysis as analysis

    task = json.loads((folder / "task.json").read_text())
    model = load_model(folder)
    layers = range(model.cfg.n_layers)
    transcoders = [load_transcoder(folder, layer, SparseAutoencoder) for layer in layers]
    told = {"as they are": search(task, model, transcoders, analysis, True)}
    for one in transcoders:
        one.W_enc -= one.W_enc.mean(0)
    told["centred"] = search(task, model, transcoders, analysis, False)
    (folder / "theirs.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
