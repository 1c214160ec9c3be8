"""Which learning rate each kind of dictionary gets: by a rule, on a seed that no result is reported of.

The paper chose one on transcoders and gave it to the SAEs too (Appendix E). The rule here, for each kind of a
sweep by itself:

    seed     the preset's + 1000, of the text and of the training
    trained  the middle sparsity of the kind's first family, at ¼, ½, 1, 2 and 4 times the preset's rate
    judged   by the mean objective on held-out rows (the loss that is minimised, λ's term included)
    chosen   the smallest rate whose objective is not surely above the best one's (95 %, paired by rows), among
             those that leave fewer than half of the features dead, or among all where none does
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.evaluate import BOOTSTRAP_SEED
from tclib.evaluation.metrics import ReconstructionSums
from tclib.models.language_model import LanguageModel
from tclib.replication.presets import Preset, load_preset
from tclib.replication.run import Run
from tclib.replication.transcoders import train_once
from tclib.support.progress import progress
from tclib.support.statistics import bootstrap_means, interval, to_numpy
from tclib.support.steps import ensure, write_csv
from tclib.training.gradients import token_weights
from tclib.training.spec import DictionarySpec

STEP = "02_sparsity_vs_faithfulness_rates"
SEED_OFFSET = 1_000
MAX_DEAD = 0.5
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
ROWS_PER_FORWARD = 32


def rate_table(preset: str, runs_dir: Any = None) -> pd.DataFrame:
    """What the rule found for each kind of the preset's sweep.

    Columns: kind, sparsity, learning_rate, objective, above_best (with low and high), l0, fvu, dead_share,
    chosen.
    """
    asked = load_preset(preset, None, runs_dir)
    run = Run(load_preset(preset, asked.seed + SEED_OFFSET, runs_dir))
    specs = candidates(run.preset)
    trained = train_once(run, STEP, specs, run.preset.sweep.training)
    step, rows = asked.step(STEP), run.corpus.evaluation

    def make() -> Mapping[str, Any]:
        dictionaries = {spec: trained.dictionaries[spec.name] for spec in specs}
        found = _held_out(run.lm, dictionaries, rows)
        write_csv(chosen_rates(found), step, "rates")
        return {"n_dictionaries": len(found)}

    inputs = {"corpus": run.corpus.content_hash, **trained.hashes}
    ensure(step, {"factors": list(FACTORS)}, inputs, make)
    return pd.read_csv(step.folder / "rates.csv")


def candidates(preset: Preset) -> list[DictionarySpec]:
    """The middle sparsity of each kind's first family, at every rate."""
    sweep = preset.sweep
    found = sweep.full_specs()
    middle = [sweep.middle(found, kind) for kind in dict.fromkeys(spec.kind for spec in found)]
    rates = [factor * sweep.training.learning_rate for factor in FACTORS]
    return [
        replace(spec, learning_rate=rate) for spec in middle if spec is not None for rate in rates
    ]


class Held(NamedTuple):
    """The mean objective of each held-out row, and what else the table says."""

    objective: Float[np.ndarray, "row"]
    l0: float
    fvu: float
    dead_share: float


@torch.no_grad()
def _held_out(
    lm: LanguageModel,
    dictionaries: Mapping[DictionarySpec, Dictionary],
    rows: Int[Tensor, "row pos"],
) -> dict[DictionarySpec, Held]:
    """Dictionaries on held-out rows, BOS left out; the model reads each row once."""
    configs = [dictionary.config for dictionary in dictionaries.values()]
    sites = {site for config in configs for site in (config.input_site, config.output_site)}
    sums = {spec: ReconstructionSums() for spec in dictionaries}
    found: dict[DictionarySpec, list[Tensor]] = {spec: [] for spec in dictionaries}
    for batch in progress(rows.split(ROWS_PER_FORWARD), "held-out objective", unit="batch"):
        acts = lm.read(batch.long(), sites)
        is_text = (batch != lm.bos_id).to(lm.device)
        for spec, dictionary in dictionaries.items():
            config = dictionary.config
            x, y = acts[config.input_site].float(), acts[config.output_site].float()
            found[spec].append(_objective(dictionary, spec, x, y, is_text, sums[spec]))
    return {
        spec: Held(to_numpy(torch.cat(found[spec])), own.l0, own.fvu, own.dead_share)
        for spec, own in sums.items()
    }


def _objective(
    dictionary: Dictionary,
    spec: DictionarySpec,
    x: Float[Tensor, "row pos d_in"],
    y: Float[Tensor, "row pos d_out"],
    is_text: Bool[Tensor, "row pos"],
    sums: ReconstructionSums,
) -> Float[Tensor, "row"]:
    """The mean loss of each row, λ's term included; adds the rows to `sums`."""
    output = dictionary(x)
    sums.add(y[is_text], output.reconstruction[is_text], output.feature_acts[is_text])
    errors = (output.reconstruction - y).pow(2).sum(-1)
    weights = token_weights(y.flatten(0, 1), spec.loss).view(errors.shape)
    price = spec.l1_coefficient * output.feature_acts.sum(-1)
    price += spec.l0_coefficient * (output.feature_acts > 0).sum(-1)
    return ((errors * weights + price) * is_text).sum(1) / is_text.sum(1)


def chosen_rates(found: Mapping[DictionarySpec, Held]) -> pd.DataFrame:
    """The rule, of held-out objectives by row."""
    kinds = dict.fromkeys(spec.kind for spec in found)
    tables = [_of_kind({s: held for s, held in found.items() if s.kind == kind}) for kind in kinds]
    return pd.concat(tables, ignore_index=True)


def _of_kind(found: Mapping[DictionarySpec, Held]) -> pd.DataFrame:
    objectives = np.stack([held.objective for held in found.values()])
    dead = np.array([held.dead_share for held in found.values()])
    is_usable = (dead < MAX_DEAD) | (dead >= MAX_DEAD).all()
    best = int(np.where(is_usable, np.round(objectives.mean(1), 9), np.inf).argmin())
    above = objectives - objectives[best]
    low, high = interval(bootstrap_means(above.T, np.random.default_rng(BOOTSTRAP_SEED)))
    rates = np.array([spec.learning_rate for spec in found], float)
    is_good = is_usable & (low <= 0)
    return pd.DataFrame(
        {
            "kind": [spec.kind for spec in found],
            "sparsity": [spec.sparsity for spec in found],
            "learning_rate": rates,
            "objective": objectives.mean(1),
            "above_best": above.mean(1),
            "low": low,
            "high": high,
            "l0": [held.l0 for held in found.values()],
            "fvu": [held.fvu for held in found.values()],
            "dead_share": dead,
            "chosen": np.arange(len(rates)) == np.where(is_good, rates, np.inf).argmin(),
        }
    )
