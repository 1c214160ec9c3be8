"""Top examples of every feature in one pass over the text, beside one pass a feature."""

import torch
from random_models import GPT2_SMALL, SMALL
from result import Result, difference, interleaved, peak_gib

from tclib.features.examples import feature_activations, top_examples

N_POS, COMPARED = 128, range(16)


def run(small: bool) -> Result:
    """A transcoder of 24,576 features at two thirds of the depth, top 20 of each. Target: 1000 ×.

    One pass a feature is what the reference code does: the model up to the layer, all features encoded,
    one kept (sixteen here, to compare). Both are linear in tokens, which gives the minutes for a million.
    """
    shape, n_rows = (SMALL, 8) if small else (GPT2_SMALL, 128)
    lm, rows = shape.lm(N_POS), shape.rows(n_rows, N_POS)
    layer = 2 * shape.n_layers // 3
    dictionary = shape.transcoder(layer, lm.cache(rows[:1].long()).mlp_in[layer][0])
    (every, one), (found, acts) = interleaved(
        lambda: top_examples(lm, dictionary, rows, k=20),
        lambda: feature_activations(lm, dictionary, COMPARED, rows),
        n_repeats=1 if small else 3,
    )
    best = torch.from_numpy(found.values[COMPARED])
    expected = acts.flatten(1).topk(20).values
    n_features, n_tokens = shape.n_features, rows.numel()
    what = f"one pass a feature over top 20 examples of all {n_features:,} in one pass, in time"
    return Result(
        {"n_features": n_features, "n_tokens": n_tokens},
        {
            what: (one * n_features / every, "×"),
            "that one pass, for a million tokens": (every * 1e6 / n_tokens / 60, "minutes"),
            "its peak memory": (peak_gib(), "GiB"),
        },
        {"top examples, those of one pass": (difference(best, expected), 1e-5)},
    )
