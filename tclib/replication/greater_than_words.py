"""What notebook 06 says of its figures, from the numbers alone (Markdown)."""

from __future__ import annotations

from tclib.greater_than.feature_curves import THIRDS, highest_third
from tclib.greater_than.kinds import FEATURES
from tclib.greater_than.lags import shift_test
from tclib.greater_than.units import AT_MEAN
from tclib.replication.artifacts import GreaterThanResults
from tclib.replication.greater_than import leads_in_words
from tclib.support.statistics import ranked


def components(results: GreaterThanResults) -> str:
    """Ours, of the ablation figure."""
    table, summary = results.components, results.summary
    head = tuple(summary["head"])
    line = table[(table["layer"] == head[0]) & (table["head"] == head[1])].iloc[0]
    mlp = table[(table["layer"] == summary["layer"]) & (table["head"] < 0)].iloc[0]
    heads = table[table["head"] >= 0]
    first = heads.iloc[ranked(heads["mean_drop"])[0]]["component"]
    return (
        f"*Ours:* MLP {summary['layer']} (mean ablation costs {mlp['mean_drop']:.3f}) and head {head[0]}.{head[1]} "
        f"({line['mean_drop']:.3f}); the head that costs most is {first.removeprefix('head ')}."
    )


def worth(results: GreaterThanResults) -> str:
    """What the MLP adds to the metric, over each thing that can be left of it."""
    summary = results.summary
    layer, original = summary["layer"], summary["original"]
    left = {
        "its output bias alone": "mlp_bias_only",
        "its mean (by sentence and position)": "mlp_mean_ablated",
        "0": "mlp_removed",
    }
    added = [f"{original - summary[key]:.3f} over {what}" for what, key in left.items()]
    return (
        f"MLP {layer} adds to the metric {', '.join(added[:-1])} and {added[-1]}. Shares in this notebook are of "
        "the first of the three."
    )


def feature_curves(results: GreaterThanResults) -> str:
    """Ours, of Figure 4."""
    test, head = shift_test(results.feature_curves), results.summary["head"]
    through = f"*Ours:* of the ten features that vary most, through head {head[0]}.{head[1]}"
    if test is None:
        return f"{through}, no lag can be measured: it needs layer 0's transcoder and years as answers."
    return (
        f"{through}: {test.in_words}; among random pairings of the curves {test.pairs_later:.0%} lie later, as many "
        f"in {test.permutation_p:.1%} of them."
    )


def ablation(results: GreaterThanResults) -> str:
    """Ours, of Figure 5, left."""
    ahead, crossing = results.ahead, results.summary["crossing"]
    behind = "nowhere" if crossing is None else f"first at k = {crossing}"
    return (
        f"*Ours:* of k = 1 to 10 {leads_in_words(ahead, FEATURES)}; others at their mean: "
        f"{leads_in_words(ahead, FEATURES + AT_MEAN)}; behind in the mean {behind}."
    )


def harmful(results: GreaterThanResults) -> str:
    """Ours, of Figure 5, right."""
    summary = results.summary
    feature, answers = summary["harmful_feature"], _answers(results)
    third, means = highest_third(results.feature_curves, feature, "dla")
    by_third = ", ".join(f"{name} {mean:+.2f}" for name, mean in zip(THIRDS, means, strict=True))
    return (
        f"*Ours:* feature {feature} (number {summary['harmful_rank']} by variance), which promotes {third} {answers} "
        f"most ({by_third}): without it {summary['all_features']:.3f} becomes {summary['without_harmful']:.3f}; "
        f"without the worst neuron, {summary['harmful_neuron']}, the MLP gains {summary['harmful_neuron_gain']:+.4f}."
    )


def confirmed(results: GreaterThanResults) -> str:
    """Whether leaving out one feature at a time points at the same one."""
    found, summary = results.harmful[results.harmful["kind"] == FEATURES], results.summary
    best = found.sort_values("gain", ascending=False).iloc[0]
    if int(best["unit"]) == summary["harmful_feature"] and best["gain"] > 0:
        return "Of the first fifty features, left out one at a time, the same one gains most."
    return (
        f"Of the first fifty features, left out one at a time, {int(best['unit'])} gains most "
        f"({best['gain']:+.4f}), not {summary['harmful_feature']}: a step of the curve depends on what is kept."
    )


def controls(results: GreaterThanResults) -> str:
    """How well the shuffled MLP was learned."""
    learned = results.summary["control"]
    if learned is None:
        return "No transcoder of the shuffled MLP: the transcoders are the released ones."
    return (
        f"The transcoder of the shuffled MLP saw {learned['n_tokens']:,} tokens; on its own MLP it reaches FVU "
        f"{learned['fvu']:.3f} at L0 {learned['l0']:.1f}."
    )


def _answers(results: GreaterThanResults) -> str:
    return "years" if results.summary["form"] == "years" else "digits"
