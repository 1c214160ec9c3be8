"""How do FVU and recovered CE of one SmolLM2 transcoder move with tokens and with width?

    python benchmarks/scaling.py [LAYER]       after `make smollm2`: its text and cached activations are used

All dictionaries are top-k transcoders with the smollm2 preset's schedule, scaled to their length; they are
evaluated on the first held-out rows. Writes scaling.csv beside the run and prints it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from tclib.evaluation.evaluate import evaluate
from tclib.replication.run import open_run
from tclib.training.train import CACHE, train

WIDTHS = ((192_000, (16,)), (768_000, (4, 8, 16)))  # tokens, expansions
N_ROWS = 32
COLUMNS = ["n_tokens", "expansion", "l0", "fvu", "ce_recovered", "dead_share", "minutes"]


def main(layer: int) -> None:
    run = open_run("smollm2")
    preset, lm, corpus = run.preset, run.lm, run.corpus
    config = preset.transcoders
    out = preset.folder / "scaling"
    parts = []
    for n_tokens, expansions in WIDTHS:
        share = n_tokens / config.training.n_tokens
        training = replace(
            config.training,
            n_tokens=n_tokens,
            decay_steps=int(config.training.decay_steps * share),
        )
        specs = [config.at("transcoder", layer, expansion=one) for one in expansions]
        began = time.perf_counter()
        folder: Path = out / f"L{layer}-{n_tokens}"
        made = train(lm, corpus.train, specs, training, folder, preset.folder / CACHE)
        minutes = (time.perf_counter() - began) / 60
        named = {spec.name: one for spec, one in zip(specs, made, strict=True)}
        table = evaluate(lm, named, corpus.evaluation[:N_ROWS], corpus.train).table
        parts.append(table.assign(n_tokens=n_tokens, expansion=expansions, minutes=minutes))
    found = pd.concat(parts, ignore_index=True)[COLUMNS]
    found.to_csv(out / f"scaling_L{layer}.csv", index=False)
    print(found.round(3).to_string(index=False))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
