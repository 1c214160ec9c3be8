"""Tokens a second of a harvest against a bare transformers forward cut off at the same layer.

Random GPT-2-small geometry (12 layers, 768), one site pair at layer 6, 16 rows of 128 tokens a
forward. Target: at least 0.9 of the bare forward. TransformerLens' bridge stands beside it.
"""

from __future__ import annotations

import tempfile

import torch
from timing import interleaved_medians
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from tclib.models.language_model import LanguageModel
from tclib.models.running import Site
from tclib.text.world import build_tokenizer
from tclib.training.activations import Harvest

LAYER, N_ROWS, N_CTX, D_VOCAB = 6, 32, 128, 893
SITES = (Site("mlp_in", LAYER), Site("mlp_out", LAYER))


def bridge_of(model: GPT2LMHeadModel):
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    bridge.enable_compatibility_mode()
    return bridge


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=D_VOCAB, n_positions=N_CTX)).eval()
    bridge = bridge_of(model)
    truncated = GPT2Model(
        GPT2Config(vocab_size=D_VOCAB, n_positions=N_CTX, n_layer=LAYER + 1)
    ).eval()
    truncated.load_state_dict(model.transformer.state_dict(), strict=False)
    truncated.ln_f = torch.nn.Identity()
    rows = torch.randint(2, D_VOCAB, (N_ROWS, N_CTX), dtype=torch.int32)
    rows[:, 0] = 0
    harvest = Harvest(LanguageModel(model, build_tokenizer(), "random"), rows, SITES, N_ROWS, 16)
    names = [f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.hook_mlp_out"]

    @torch.no_grad()
    def bare() -> None:
        for batch in rows.long().split(16):
            truncated(batch, use_cache=False)

    @torch.no_grad()
    def lens() -> None:
        for batch in rows.long().split(16):
            bridge.run_with_cache(batch, names_filter=names, stop_at_layer=LAYER + 1)

    candidates = {"bare forward": bare, "tclib harvest": lambda: harvest.block(0), "bridge": lens}
    medians = interleaved_medians(candidates, n_repeats=7)
    for name, seconds in medians.items():
        speed = N_ROWS * N_CTX / seconds
        print(f"{name:16} {speed:9,.0f} tokens/s   {medians['bare forward'] / seconds:.3f} of bare")


if __name__ == "__main__":
    main()
