"""A training step against its five equal matrix products, and against dense autograd with Adam.

768 → 6144 features, batch 1024, float32. Targets: relu + L1 at most 1.3 times the five products,
topk (k = 32) at most 0.8 times.
"""

from __future__ import annotations

import torch
from timing import interleaved_medians, print_ratios
from torch import Tensor, nn

from tclib.dictionaries.dictionary import DictionaryConfig, activate, new_dictionary
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.trainer import DictionaryTrainer

D_MODEL, EXPANSION, BATCH, K = 768, 8, 1024, 32
N_FEATURES = D_MODEL * EXPANSION


def five_products(x: Tensor, y: Tensor, W_enc: Tensor, W_dec: Tensor) -> None:
    """Two forward, one back through the decoder, one for each weight's gradient."""
    z = x @ W_enc
    _ = z @ W_dec
    grad_z = y @ W_dec.T
    _ = z.T @ y
    _ = grad_z.T @ x


def tclib_trainer(activation: str) -> DictionaryTrainer:
    k = K if activation == "topk" else None
    spec = DictionarySpec("transcoder", 0, activation, EXPANSION, 0.0 if k else 1e-3, k=k)  # type: ignore[arg-type]
    config = DictionaryConfig("transcoder", 0, D_MODEL, D_MODEL, N_FEATURES, activation, k)  # type: ignore[arg-type]
    dictionary = new_dictionary(config, torch.Generator().manual_seed(0))
    return DictionaryTrainer(spec, dictionary, TrainingConfig(n_tokens=BATCH, batch_size=BATCH))


class AutogradTrainer:
    """What one would write first: dense autograd, foreach Adam, unit-norm rows."""

    def __init__(self, activation: str) -> None:
        self.k = K if activation == "topk" else None
        self.W_enc = nn.Parameter(torch.randn(D_MODEL, N_FEATURES) / D_MODEL**0.5)
        self.b_enc = nn.Parameter(torch.zeros(N_FEATURES))
        self.W_dec = nn.Parameter(torch.randn(N_FEATURES, D_MODEL) / D_MODEL**0.5)
        self.b_dec = nn.Parameter(torch.zeros(D_MODEL))
        self.adam = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec], 1e-4)

    def step(self, x: Tensor, y: Tensor) -> None:
        z = activate(x @ self.W_enc + self.b_enc, self.k)
        loss = (z @ self.W_dec + self.b_dec - y).pow(2).sum(1).mean() + 1e-3 * z.sum(1).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, D_MODEL), torch.randn(BATCH, D_MODEL)
    W_enc = torch.randn(N_FEATURES, D_MODEL).T / D_MODEL**0.5
    W_dec = torch.randn(N_FEATURES, D_MODEL) / D_MODEL**0.5
    candidates = {"five matrix products": lambda: five_products(x, y, W_enc, W_dec)}
    for activation in ("relu", "topk"):
        trainer, autograd = tclib_trainer(activation), AutogradTrainer(activation)
        config = trainer.dictionary.config
        block = {config.input_site: x, config.output_site: y}

        def step(trainer: DictionaryTrainer = trainer, block: dict = block) -> None:
            with torch.no_grad():
                trainer.step(block, slice(0, BATCH), 1e-4)

        candidates[f"tclib {activation}"] = step
        candidates[f"autograd {activation}"] = lambda a=autograd: a.step(x, y)  # type: ignore[misc]
    print_ratios(interleaved_medians(candidates, n_repeats=15), "five matrix products")


if __name__ == "__main__":
    main()
