"""Ten dictionaries from one harvest beside ten separate runs: the forward pass is paid once."""

import tempfile
from dataclasses import replace
from pathlib import Path

from random_models import GPT2_SMALL, SMALL
from result import Result, interleaved

from tclib.dictionaries.dictionary import Dictionary
from tclib.training.spec import DictionarySpec, TrainingConfig
from tclib.training.train import train

N_CTX = 128


def run(small: bool) -> Result:
    """Five transcoders and five SAEs of one layer, as wide as the model: the same weights.

    Target: apart at least 5 times as long.
    """
    shape = replace(SMALL if small else GPT2_SMALL, d_vocab=SMALL.d_vocab)
    n_tokens, batch_size = (512, 128) if small else (4_096, 1_024)
    lm, rows = shape.lm(N_CTX), shape.rows(n_tokens // 64, N_CTX)
    specs = [
        DictionarySpec(kind, shape.n_layers // 2, expansion=1, l1_coefficient=l1)
        for kind in ("transcoder", "sae_mlp_out")
        for l1 in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)
    ]
    config = TrainingConfig(n_tokens, batch_size, block_rows=n_tokens // N_CTX, log_every_steps=8)

    def trained(together: list[DictionarySpec]) -> list[Dictionary]:
        with tempfile.TemporaryDirectory() as folder:
            return train(lm, rows, together, config, Path(folder) / "run")

    trained(specs[:1])  # as a warm-up
    seconds, made = interleaved(
        lambda: trained(specs),
        lambda: [one for spec in specs for one in trained([spec])],
        n_repeats=1 if small else 3,
    )
    apart = max(
        float((one.parameters()[name] - weights).abs().max())
        for one, other in zip(*made, strict=True)
        for name, weights in other.parameters().items()
    )
    what = "ten separate runs over ten dictionaries from one harvest, in time"
    return Result(
        {"n_dictionaries": len(specs), "d_model": shape.d_model, "n_tokens": n_tokens},
        {what: (seconds[1] / seconds[0], "×")},
        {"weights, those of separate runs": (apart, 0.0)},
    )
