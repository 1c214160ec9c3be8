"""Top examples of every feature in one pass, beside one pass a feature, on a random GPT-2-small-sized model.

A transcoder of 24,576 features at layer 8. One pass a feature is what the reference code does: the model up to
the layer, all features encoded, one kept. Both are linear in tokens; the one-pass time for a million tokens is
stated by that. Peak memory is of the whole process, weights included.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from attribution import D_VOCAB, N_FEATURES, random_lm, random_transcoder

from tclib.features.examples import feature_activations, top_examples

LAYER, N_POS = 8, 128


def main() -> None:
    n_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    lm = random_lm(N_POS)
    rows = torch.randint(2, D_VOCAB, (n_rows, N_POS), dtype=torch.int32)
    dictionary = random_transcoder(LAYER, lm.cache(rows[:1].long()).mlp_in[LAYER][0])
    began = time.perf_counter()
    found = top_examples(lm, dictionary, rows, k=20)
    every = time.perf_counter() - began
    began = time.perf_counter()
    one = feature_activations(lm, dictionary, [7], rows)[0]
    single = time.perf_counter() - began
    best = one.flatten().topk(20).values.numpy()
    assert abs(best - found.values[7]).max() < 1e-4
    tokens = rows.numel()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{tokens} tokens: all {N_FEATURES} features {every:.1f} s, one feature {single:.1f} s")
    print(f"one pass a feature would take {single * N_FEATURES / every:.0f} times as long")
    print(f"a million tokens: {every * 1e6 / tokens / 60:.0f} minutes; peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
