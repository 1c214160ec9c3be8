"""How do FVU and recovered CE of one transcoder move with tokens and with width?"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from result import NotHere, Result
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.evaluate import evaluate
from tclib.replication.run import Run, open_run
from tclib.training.train import CACHE, train


def run(small: bool) -> Result:
    """Top-k transcoders of MLP 24 of SmolLM2, after `make smollm2`, whose cached activations are used.

    The preset's schedule is scaled to their length. At the small size: the bundled model's. Each FVU must
    be that of its definition.
    """
    grid = {5_120: (1, 2)} if small else {192_000: (16,), 768_000: (4, 8, 16)}
    layer, n_rows = (2, 8) if small else (24, 32)
    measures, differences = {}, []
    with tempfile.TemporaryDirectory() as folder:
        own = bundled(folder) if small else open_run("smollm2")
        if not small and not (own.preset.folder / CACHE).is_dir():
            raise NotHere("needs the run that `make smollm2` makes")
        rows = own.corpus.evaluation[:n_rows]
        for n_tokens, widths in grid.items():
            made = trained(own, layer, n_tokens, widths, Path(folder))
            table = evaluate(own.lm, made, rows, own.corpus.train).table.set_index("name")
            for name, dictionary in made.items():
                fvu, ce = table.loc[name, ["fvu", "ce_recovered"]].astype(float)
                measures |= {f"FVU, {name}": (fvu, ""), f"CE recovered, {name}": (ce, "")}
                differences.append(abs(fvu_by_definition(own, dictionary, rows) - fvu))
    sizes = {"layer": layer, "n_held_out": rows.numel()}
    return Result(sizes, measures, {"FVU, its definition's": (max(differences), 1e-4)})


def bundled(folder: str) -> Run:
    preset = open_run("demo", runs_dir=folder).preset
    corpus = replace(preset.corpus, n_train_tokens=12_800, n_eval_tokens=2_560)
    return Run(replace(preset, corpus=corpus))


def trained(
    own: Run, layer: int, n_tokens: int, widths: tuple[int, ...], folder: Path
) -> dict[str, Dictionary]:
    config = own.preset.transcoders
    decay = config.training.decay_steps * n_tokens // config.training.n_tokens
    training = replace(config.training, n_tokens=n_tokens, decay_steps=decay)
    specs = [config.at("transcoder", layer, expansion=width) for width in widths]
    cache = own.preset.folder / CACHE
    made = train(own.lm, own.corpus.train, specs, training, folder / f"{n_tokens}", cache)
    return {f"{n_tokens:,} tokens, {w} ×": d for w, d in zip(widths, made, strict=True)}


@torch.no_grad()
def fvu_by_definition(own: Run, dictionary: Dictionary, rows: Tensor) -> float:
    """Σ‖y − ŷ‖² / Σ‖y − ȳ‖² over all tokens at once, in float64, BOS left out."""
    sites = (dictionary.config.input_site, dictionary.config.output_site)
    read = own.lm.read(rows.long(), sites)
    x, y = (read[site][rows != own.lm.bos_id].double() for site in sites)
    missed = y - dictionary.to(x.device, x.dtype)(x).reconstruction
    return float(missed.pow(2).sum() / (y - y.mean(0)).pow(2).sum())
