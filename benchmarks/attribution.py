"""The paper's greedy search on a random GPT-2-small-sized model with twelve transcoders of 24,576 features.

L0 is about 100 a token. Targets: a 32-token prompt, 3 iterations, 15 branches, encoding included, in
at most 0.6 s; a second search on the same prompt in at most 0.05 s; 512 tokens in at most 15 s and 8 GB.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tclib.circuits.frozen import FrozenPrompts
from tclib.circuits.paths import greedy_paths
from tclib.dictionaries.dictionary import Dictionary, DictionaryConfig
from tclib.models.language_model import LanguageModel
from tclib.text.world import build_tokenizer

D_MODEL, N_FEATURES, L0, D_VOCAB = 768, 24_576, 100, 50_257


def random_lm(n_ctx: int) -> LanguageModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=D_VOCAB, n_positions=n_ctx))
    return LanguageModel(model, build_tokenizer(), "random")


def random_transcoder(layer: int, mlp_in: torch.Tensor) -> Dictionary:
    """Random directions, with the bias at the quantile that leaves `L0` features active a token."""
    config = DictionaryConfig("transcoder", layer, D_MODEL, D_MODEL, N_FEATURES)
    W_enc = torch.randn(N_FEATURES, D_MODEL).T / D_MODEL**0.5
    W_dec = torch.nn.functional.normalize(torch.randn(N_FEATURES, D_MODEL), dim=1)
    threshold = torch.quantile((mlp_in[:64] @ W_enc).flatten()[:1_000_000], 1 - L0 / N_FEATURES)
    return Dictionary(
        config, W_enc, -threshold.expand(N_FEATURES).clone(), W_dec, torch.zeros(D_MODEL)
    )


def main() -> None:
    lengths = [int(n) for n in sys.argv[1:]] or [32, 512]
    lm = random_lm(max(lengths))
    tokens = torch.randint(2, D_VOCAB, (1, max(lengths)))
    cache = lm.cache(tokens[:, :32])
    transcoders = [random_transcoder(layer, cache.mlp_in[layer][0]) for layer in range(12)]
    for n_pos in lengths:
        first, second = [], []
        for _ in range(5 if n_pos <= 64 else 1):
            began = time.perf_counter()
            frozen = FrozenPrompts(lm, tokens[:, :n_pos], transcoders)
            root = frozen.logit_target({40: 1.0, 41: -1.0}, -1)
            greedy_paths(frozen, root, 3, 15)
            first.append(time.perf_counter() - began)
            began = time.perf_counter()
            greedy_paths(frozen, frozen.logit_target({50: 1.0, 51: -1.0}, -1), 3, 15)
            second.append(time.perf_counter() - began)
        n_active = sum(len(parts.active.acts) for parts in frozen.parts.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{n_pos:4} tokens   L0 {n_active / 12 / n_pos:5.0f}   first {statistics.median(first):6.3f} s   "
            f"second {statistics.median(second):6.3f} s   peak {peak:4.1f} GiB"
        )


if __name__ == "__main__":
    main()
