"""Step 06: the greater-than circuit, its features' two curves, and features against neurons.

components.csv   every MLP and head: mean and zero ablation, direct attribution
reading_heads.csv   which heads carry the year into the chosen MLP's features
feature_curves.csv   Figure 4: direct logit attribution and de-embedding of each feature over YY
curves.csv   Figure 5 left: probability difference against k, mean and interval, every ranking and kind
harmful.csv  Figure 5 right: what leaving single features out changes
summary.json the single figures (original, all features, without the harmful one, crossing)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tclib.circuits.frozen import FrozenPrompts
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.metrics import bootstrap_means, interval
from tclib.evaluation.replace import replace_mlp
from tclib.features.from_weights import (
    Head,
    direct_logit_attribution,
    pullback,
    reading_direction,
)
from tclib.greater_than.components import (
    ablation_effects,
    component_attributions,
    head_contributions,
    reading_heads,
    strongest_head,
    strongest_mlp,
)
from tclib.greater_than.curves import (
    Curve,
    Units,
    ablation_curve,
    crossing,
    dictionary_units,
    k_grid,
    leave_one_out,
    metric_of,
    neuron_units,
    random_direction_units,
    rank_by_attribution,
    rank_by_variance,
    steepest_drop,
)
from tclib.greater_than.task import (
    GreaterThan,
    full_vocabulary_differences,
    mean_probability_difference,
)
from tclib.models.language_model import LanguageModel, LowerRun
from tclib.replication.presets import Preset
from tclib.support.progress import progress
from tclib.support.runs import InputError, Step, new_file
from tclib.support.steps import ensure, weight_hashes, write_csv

STEP = "06_greater_than"
COMPONENTS_STEP = f"{STEP}_components"
SAES_STEP = f"{STEP}_saes"
REPLACEMENTS_STEP = f"{STEP}_replacements"
FEATURES, NEURONS, CONTROL = "transcoder features", "neurons", "random directions"
WITHOUT = "transcoder features, without the one that hurts"
N_CURVE_FEATURES = 10
N_LAYER_0_FEATURES = 10  # over which the authors' de-embedding score is summed
TABLES = ("components", "reading_heads", "feature_curves", "curves", "harmful")


@dataclass(frozen=True)
class GreaterThanResults:
    """What step 06 holds: its tables, and the single figures by name."""

    components: pd.DataFrame
    reading_heads: pd.DataFrame
    feature_curves: pd.DataFrame
    curves: pd.DataFrame
    harmful: pd.DataFrame
    summary: dict[str, Any]
    step: Step


class Analysed(NamedTuple):
    """The MLP under study on the task's prompts, with all kinds of units it can be written in."""

    lm: LanguageModel
    task: GreaterThan
    below: LowerRun
    units: dict[str, Units]
    orders: dict[tuple[str, str], Int[Tensor, "unit"]]

    def curve(self, units: str, ranking: str, dense_to: int, remove: bool = False) -> Curve:
        """One curve; `ranking` is variance or attribution."""
        own = self.units[units]
        order = self.orders[units, ranking]
        name = f"removed, {ranking}" if remove else ranking
        ks = k_grid(own.n_units, dense_to)
        return ablation_curve(self.lm, self.task, self.below, own, order, ks, remove, name)


def task_of(preset: Preset, lm: LanguageModel) -> GreaterThan:
    """The preset's task: all its templates, each with every year."""
    return GreaterThan.of(lm, preset.greater_than.templates)


def make_components(preset: Preset, lm: LanguageModel) -> pd.DataFrame:
    """Every MLP and head ablated, made once (no dictionary needed)."""
    step = preset.step(COMPONENTS_STEP)
    config = preset.greater_than
    parameters = {"templates": list(config.templates), "every": config.components_every}

    def make() -> Mapping[str, Any]:
        task = task_of(preset, lm).scored().every(config.components_every)
        effects = ablation_effects(lm, task)
        write_csv(effects, step, "components")
        return {"n_components": len(effects)}

    ensure(step, parameters, {"model": preset.model}, make)
    return pd.read_csv(step.folder / "components.csv")


def make_replacements(
    preset: Preset, lm: LanguageModel, transcoders: Mapping[str, Dictionary]
) -> pd.DataFrame:
    """The metric with each transcoder in its MLP's place, one at a time, made once.

    Columns: layer, original, replaced, kept (their ratio), over all prompts that count.
    """
    step = preset.step(REPLACEMENTS_STEP)
    parameters = {"templates": list(preset.greater_than.templates)}
    inputs = {"model": preset.model, **weight_hashes(transcoders)}

    def make() -> Mapping[str, Any]:
        task = task_of(preset, lm)
        original = mean_probability_difference(lm, task)
        lines = []
        for one in progress(transcoders.values(), "replacing MLPs", unit="layer"):
            with replace_mlp(lm, one):
                replaced = mean_probability_difference(lm, task)
            line = {"layer": one.config.layer, "original": original, "replaced": replaced}
            lines.append({**line, "kept": replaced / original})
        write_csv(pd.DataFrame(lines), step, "replacements")
        return {"n_layers": len(lines)}

    ensure(step, parameters, inputs, make)
    return pd.read_csv(step.folder / "replacements.csv")


def chosen_layer(preset: Preset, effects: pd.DataFrame) -> int:
    """The preset's MLP, or the one that the ablations find."""
    given = preset.greater_than.layer
    return strongest_mlp(effects) if given is None else given


def make_greater_than(
    preset: Preset,
    lm: LanguageModel,
    effects: pd.DataFrame,
    transcoders: Mapping[str, Dictionary],
    saes: Mapping[str, Dictionary],
) -> GreaterThanResults:
    """The artifacts of step 06, made once; the SAE nearest in L0 is set beside the transcoder.

    Errors: `InputError` if the chosen layer has no transcoder.
    """
    step = preset.step(STEP)
    inputs = {"model": preset.model, **weight_hashes({**transcoders, **saes})}
    parameters = {**asdict(preset.greater_than), "seed": preset.seed}

    def make() -> Mapping[str, Any]:
        tables, summary = analyse(preset, lm, effects, transcoders, saes)
        for name, table in tables.items():
            write_csv(table, step, name)
        with new_file(step.folder / "summary.json") as path:
            path.write_text(json.dumps(summary, indent=2))
        return summary

    ensure(step, parameters, inputs, make)
    summary = json.loads((step.folder / "summary.json").read_text())
    tables = {name: pd.read_csv(step.folder / f"{name}.csv") for name in TABLES}
    return GreaterThanResults(**tables, summary=summary, step=step)


def analyse(
    preset: Preset,
    lm: LanguageModel,
    effects: pd.DataFrame,
    transcoders: Mapping[str, Dictionary],
    saes: Mapping[str, Dictionary],
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """All tables and the summary of step 06."""
    task = task_of(preset, lm)
    by_layer = {d.config.layer: d for d in transcoders.values()}
    dictionary = _dictionary_at(by_layer, chosen_layer(preset, effects))
    one = _first_template(task).scored()
    frozen = FrozenPrompts(lm, one.tokens, by_layer.values())
    analysed = prepare(lm, task, dictionary, saes, preset.seed)
    order = analysed.orders[FEATURES, "variance"]
    top = order[:N_CURVE_FEATURES].tolist()
    heads = reading_heads(frozen, dictionary, top, task.subject_pos)
    given = preset.greater_than.head
    head = strongest_head(heads) if given is None else Head(*given)
    curves = all_curves(analysed)
    harmful, without = harmful_features(analysed, curves[FEATURES, "variance"])
    worst = int(harmful[harmful["is_steepest"]].iloc[0]["unit"])
    shown = [*top, *([] if worst in top else [worst])]
    tables = {
        "components": effects.merge(component_attributions(frozen, one)),
        "reading_heads": heads,
        "feature_curves": feature_curves(frozen, one, by_layer, dictionary, head, shown),
        "curves": _curve_table([*curves.values(), without]),
        "harmful": harmful,
    }
    return tables, _summary(analysed, curves, harmful, without, dictionary, head)


def _dictionary_at(by_layer: Mapping[int, Dictionary], layer: int) -> Dictionary:
    if layer not in by_layer:
        raise InputError(
            f"the task runs through MLP {layer}, which has no transcoder: there is one at layers "
            f"{sorted(by_layer)}; train one there, or set greater_than.layer in the preset"
        )
    return by_layer[layer]


def _first_template(task: GreaterThan) -> GreaterThan:
    """Only the first sentence, every year of it."""
    return task.subset([i for i, t in enumerate(task.template_idx) if t == task.template_idx[0]])


# ---------------------------------------------------------------------------------------------
# Figure 4


def feature_curves(
    frozen: FrozenPrompts,
    task: GreaterThan,
    by_layer: Mapping[int, Dictionary],
    dictionary: Dictionary,
    head: Head,
    features: list[int],
) -> pd.DataFrame:
    """Two curves over the answers for each feature, and what the head really brings (Figure 4).

    Columns: feature, rank, answer, dla (logits a unit of activation, relative to the vocabulary's
    mean), de_embedding (the authors': Σ over the strongest layer-0 features through the head of
    weight × direct de-embedding; NaN without a transcoder at layer 0), exact (what the head brings to
    the pre-activation from the number's token, by prompt; NaN for the digit form's other digits).
    """
    lm, layer = frozen.lm, dictionary.config.layer
    lines = []
    scale = frozen.cache.mlp_scale[layer][:, -1, None]
    for rank, feature in enumerate(features, start=1):
        dla = direct_logit_attribution(lm, dictionary, feature)[task.answer_ids]
        score = _authors_de_embedding(lm, by_layer, dictionary, feature, head, task)
        direction = lm.final_norm.centre(dictionary.encoder_direction(feature))
        directions = direction.expand(frozen.n_prompts, -1) / scale
        brought = head_contributions(frozen, directions)[:, head.layer, head.head, task.subject_pos]
        exact = _mean_by_answer(brought, task)
        activation = _mean_by_answer(
            dictionary.encode(frozen.cache.mlp_in[layer][:, -1])[:, feature], task
        )
        for i, answer in enumerate(task.answers):
            lines.append(
                {
                    "feature": feature,
                    "rank": rank,
                    "answer": answer,
                    "dla": float(dla[i]),
                    "de_embedding": float(score[i]),
                    "exact": exact.get(answer, np.nan),
                    "activation": activation.get(answer, np.nan),
                }
            )
    return pd.DataFrame(lines)


def _authors_de_embedding(
    lm: LanguageModel,
    by_layer: Mapping[int, Dictionary],
    dictionary: Dictionary,
    feature: int,
    head: Head,
    task: GreaterThan,
) -> Float[Tensor, "answer"]:
    """Σ over the ten layer-0 features with the largest weight through the head: weight × W_E f_enc."""
    if 0 not in by_layer or head.layer == 0:
        return torch.full((len(task.answers),), float("nan"))
    first = by_layer[0]
    weights = pullback(lm, dictionary, feature, first, head)
    strongest = weights.topk(min(N_LAYER_0_FEATURES, len(weights))).indices
    reads = torch.stack([reading_direction(lm, first, int(i)) for i in strongest])
    return lm.W_E[task.answer_ids] @ reads.T @ weights[strongest]


def _mean_by_answer(values: Float[Tensor, "prompt"], task: GreaterThan) -> dict[int, float]:
    """Mean over the prompts whose number (or tens digit) is each answer."""
    asked = [n if task.form == "years" else n // 10 for n in task.numbers]
    frame = pd.DataFrame({"answer": asked, "value": values.double().cpu().numpy()})
    means = frame.groupby("answer")["value"].mean()
    return {int(answer): float(mean) for answer, mean in zip(means.index, means, strict=True)}


# ---------------------------------------------------------------------------------------------
# Figure 5


def prepare(
    lm: LanguageModel,
    task: GreaterThan,
    dictionary: Dictionary,
    saes: Mapping[str, Dictionary],
    seed: int,
) -> Analysed:
    """The lower run, all kinds of units, and their rankings."""
    below = lm.run_below(task.tokens, dictionary.config.layer)
    features = dictionary_units(dictionary, below, FEATURES)
    generator = torch.Generator().manual_seed(seed)
    kinds = [features, neuron_units(lm, below), random_direction_units(features, generator)]
    if saes:
        kinds.append(dictionary_units(_nearest_l0(saes, below, features), below, "SAE features"))
    units = {kind.name: kind for kind in kinds}
    orders = {}
    for kind in kinds:
        orders[kind.name, "variance"] = rank_by_variance(kind, task)
        orders[kind.name, "attribution"] = rank_by_attribution(lm, task, below, kind)
    return Analysed(lm, task, below, units, orders)


def _nearest_l0(saes: Mapping[str, Dictionary], below: LowerRun, features: Units) -> Dictionary:
    """The SAE whose L0 on the prompts is nearest to the transcoder's, as a ratio."""

    def distance(sae: Dictionary) -> float:
        return abs(np.log((_l0(sae.encode(below.mlp_out)) + 1e-9) / _l0(features.acts)))

    return min(saes.values(), key=distance)


def _l0(acts: Float[Tensor, "prompt pos unit"]) -> float:
    """Mean number of active units a token, the first token left out."""
    return float((acts[:, 1:] > 0).sum(-1).double().mean())


def all_curves(analysed: Analysed) -> dict[tuple[str, str], Curve]:
    """Curves by (units, ranking): the paper's two in full, the others on a coarser grid."""
    curves = {}
    for name in analysed.units:
        is_main = name in (FEATURES, NEURONS)
        curves[name, "variance"] = analysed.curve(name, "variance", 100 if is_main else 30)
        if name == CONTROL:
            continue
        curves[name, "attribution"] = analysed.curve(name, "attribution", 30)
        if is_main:
            removed = analysed.curve(name, "attribution", 30, remove=True)
            curves[name, removed.ranking] = removed
    return curves


def _curve_table(curves: list[Curve]) -> pd.DataFrame:
    """Columns: units, ranking, k, value, low, high: mean and 95 % interval over prompts."""
    tables = []
    for curve in curves:
        generator = np.random.default_rng(0)
        low, high = interval(bootstrap_means(curve.values.T, generator))
        tables.append(
            pd.DataFrame(
                {
                    "units": curve.units,
                    "ranking": curve.ranking,
                    "k": curve.ks,
                    "value": curve.mean,
                    "low": low,
                    "high": high,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def harmful_features(analysed: Analysed, curve: Curve) -> tuple[pd.DataFrame, Curve]:
    """Who hurts: the steepest drop of the curve, confirmed by leaving out each of the first fifty.

    Returns the table of `leave_one_out` with rank and is_steepest, and the curve without that feature.
    """
    lm, task, below = analysed.lm, analysed.task, analysed.below
    units, order = analysed.units[FEATURES], analysed.orders[FEATURES, "variance"]
    suspect = steepest_drop(curve, order)
    candidates = order[:50].tolist()
    table = leave_one_out(lm, task, below, units, candidates)
    rank = {feature: i for i, feature in enumerate(candidates, start=1)}
    table = table.assign(rank=table["unit"].map(rank), is_steepest=table["unit"] == suspect)
    rest = order[order != suspect]
    silenced = replace(units.without(suspect), name=WITHOUT)
    ks = k_grid(len(rest))
    return table, ablation_curve(lm, task, below, silenced, rest, ks, ranking="variance")


def _summary(
    analysed: Analysed,
    curves: Mapping[tuple[str, str], Curve],
    harmful: pd.DataFrame,
    without: Curve,
    dictionary: Dictionary,
    head: Head,
) -> dict[str, Any]:
    """The single figures that the paper states, and what was chosen."""
    lm, task, below = analysed.lm, analysed.task, analysed.below
    features, neurons = curves[FEATURES, "variance"], curves[NEURONS, "variance"]
    suspect = harmful[harmful["is_steepest"]].iloc[0]
    scored = task.scored()
    return {
        "form": task.form,
        "layer": dictionary.config.layer,
        "head": list(head),
        "n_prompts": len(scored.numbers),
        "n_left_out": len(task.left_out),
        "original": mean_probability_difference(lm, task),
        "original_full_vocabulary": float(full_vocabulary_differences(lm, scored).mean()),
        "all_features": features.at(features.ks[-1]),
        "without_harmful": without.at(without.ks[-1]),
        "mlp_bias_only": neurons.at(0),
        "mlp_removed": metric_of(lm, task, below, torch.zeros_like(below.mlp_out)),
        "crossing": crossing(features, neurons),
        "features_ahead_1_to_10": [k for k in range(1, 11) if features.at(k) > neurons.at(k)],
        "ahead_without_harmful": [k for k in range(1, 11) if without.at(k) > neurons.at(k)],
        "harmful_feature": int(suspect["unit"]),
        "harmful_rank": int(suspect["rank"]),
        "harmful_gain": float(suspect["gain"]),
        "best_single_gain_feature": int(harmful.iloc[0]["unit"]),
        "l0": {name: _l0(units.acts) for name, units in analysed.units.items()},
        "top_features": analysed.orders[FEATURES, "variance"][:N_CURVE_FEATURES].tolist(),
    }
