"""Ten dictionaries from one harvest against ten separate runs: the forward pass is paid once."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tclib.models.language_model import LanguageModel
from tclib.text.world import build_tokenizer
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.train import train

LAYER, D_VOCAB, N_CTX = 6, 893, 128
CONFIG = TrainingConfig(
    n_tokens=8_192, batch_size=1024, block_rows=64, checkpoint_every_steps=1000, log_every_steps=8
)
SPECS = [
    DictionarySpec(kind, LAYER, expansion=1, l1_coefficient=l1)  # type: ignore[arg-type]
    for kind in ("transcoder", "sae_mlp_out")
    for l1 in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
]


def seconds(lm: LanguageModel, rows: torch.Tensor, specs: list[DictionarySpec]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        train(lm, rows, specs, CONFIG, Path(folder) / "run")
        return time.perf_counter() - began


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=D_VOCAB, n_positions=N_CTX))
    lm = LanguageModel(model, build_tokenizer(), "random")
    rows = torch.randint(2, D_VOCAB, (128, N_CTX), dtype=torch.int32)
    seconds(lm, rows, SPECS[:1])
    together = seconds(lm, rows, SPECS)
    apart = sum(seconds(lm, rows, [spec]) for spec in SPECS)
    print(f"ten from one harvest   {together:7.1f} s")
    print(f"ten separate runs      {apart:7.1f} s   {apart / together:.2f} × as long")


if __name__ == "__main__":
    main()
