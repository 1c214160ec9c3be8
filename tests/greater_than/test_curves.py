"""Partial runs against whole ones, curves against direct replacement, a planted feature that hurts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import D_VOCAB, GEOMETRIES, freeze, random_rows, random_transcoder, tiny_lm
from tiny_task import in_two_sentences, make_task

from tclib.circuits.sources import sources
from tclib.dictionaries.dictionary import Dictionary
from tclib.evaluation.replace import replace_mlp, set_mlp_out
from tclib.greater_than.components import (
    Component,
    ablate_component,
    ablation_effects,
    all_components,
    component_attributions,
    head_contributions,
    reading_heads,
    strongest_head,
    strongest_mlp,
)
from tclib.greater_than.curves import (
    Curve,
    ablation_curve,
    crossing,
    k_grid,
    leave_one_out,
    metric_of,
    nearest_approach,
    rank_by_attribution,
    steepest_drop,
)
from tclib.greater_than.kinds import FEATURES, prepare
from tclib.greater_than.task import GreaterThan
from tclib.greater_than.units import (
    at_mean,
    dictionary_units,
    neuron_units,
    random_direction_units,
    rank_by_variance,
)
from tclib.models.language_model import LanguageModel
from tclib.support.errors import InputError


def transcoder(layer: int, kind: str = "relu") -> Dictionary:
    return random_transcoder(layer, kind, torch.float32)


def whole_metric(lm: LanguageModel, task: GreaterThan) -> float:
    scored = task.scored()
    table = scored.answer_probabilities(lm.logits(scored.tokens)[:, -1])
    return float(scored.differences(table).mean())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_going_on_from_the_middle_is_running_the_whole(geometry: str, layer: int) -> None:
    lm, task = tiny_lm(geometry), make_task()
    below = lm.run_below(task.tokens, layer)
    original = whole_metric(lm, task)
    assert metric_of(lm, task, below, below.mlp_out) == pytest.approx(original, abs=1e-5)
    neurons = neuron_units(lm, below)
    torch.testing.assert_close(neurons.output(), below.mlp_out, rtol=1e-4, atol=1e-5)
    assert whole_metric(lm, task) == original  # the model is as it was
    with set_mlp_out(lm, layer):
        removed = whole_metric(lm, task)
    zero = torch.zeros_like(below.mlp_out)
    assert metric_of(lm, task, below, zero) == pytest.approx(removed, abs=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", ["relu", "topk", "skip"])
def test_every_point_of_a_curve_is_direct_replacement(geometry: str, kind: str) -> None:
    lm, task, dictionary = tiny_lm(geometry), make_task(), transcoder(1, kind)
    below = lm.run_below(task.tokens, 1)
    units = dictionary_units(dictionary, below)
    order = rank_by_variance(units, task)
    ks = [0, 1, 2, 7, 40]
    kept = ablation_curve(lm, task, below, units, order, ks)
    removed = ablation_curve(lm, task, below, units, order, ks, remove=True)
    for i, k in enumerate(ks):
        with replace_mlp(lm, dictionary, order[:k]):
            assert kept.mean[i] == pytest.approx(whole_metric(lm, task), abs=1e-5)
        with replace_mlp(lm, dictionary, order[k:]):
            assert removed.mean[i] == pytest.approx(whole_metric(lm, task), abs=1e-5)


def test_how_many_k_share_a_forward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = tiny_lm("neox"), make_task()
    below = lm.run_below(task.tokens, 0)
    units = neuron_units(lm, below)
    order = rank_by_variance(units, task)
    together = ablation_curve(lm, task, below, units, order, k_grid(units.n_units, 5, 3))
    monkeypatch.setattr("tclib.greater_than.curves.TOKENS_PER_FORWARD", 1)
    alone = ablation_curve(lm, task, below, units, order, k_grid(units.n_units, 5, 3))
    np.testing.assert_allclose(together.values, alone.values, atol=1e-5)


def test_rankings_by_hand() -> None:
    lm, task = tiny_lm(), make_task(3)
    below = lm.run_below(task.tokens, 2)
    units = dictionary_units(transcoder(2), below)
    acts = torch.zeros_like(units.acts)
    acts[:, -1, 4] = torch.tensor([0.0, 3.0, 0.0])
    acts[:, -1, 9] = torch.tensor([5.0, 5.5, 6.0])
    acts[:, 0, 2] = torch.tensor([0.0, 99.0, 0.0])  # not at the last position
    assert rank_by_variance(replace(units, acts=acts), task)[:2].tolist() == [4, 9]


def test_the_variance_is_over_all_prompts_run_one_by_one() -> None:
    """A prompt of another length counts in the ranking, though it is in no curve."""
    lm, task, dictionary = tiny_lm(), make_task(), transcoder(1)
    odd = random_rows(1, 4, seed=9).long()
    analysed = prepare(lm, replace(task, misfits=(odd,)), dictionary, {}, seed=0)
    site, last = dictionary.config.input_site, []
    for tokens in (*task.tokens.split(1), odd):
        last.append(dictionary.encode(lm.read(tokens, {site})[site])[0, -1])
    expected = torch.stack(last).var(0).argsort(descending=True)[:10].tolist()
    assert analysed.orders[FEATURES, "variance"][:10].tolist() == expected
    assert (
        prepare(lm, task, dictionary, {}, 0).orders[FEATURES, "variance"][:10].tolist() != expected
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_attribution_ranks_by_the_metrics_gradient(layer: int) -> None:
    """The first of the ranking is where a small change of all its activations moves the metric most."""
    lm, task = tiny_lm(), make_task()
    below = lm.run_below(task.tokens, layer)
    units = dictionary_units(transcoder(layer), below)
    order = rank_by_attribution(lm, task, below, units)
    every, epsilon = units.output(), 1e-2
    scored = task.is_scored

    def moved(unit: int) -> float:
        change = epsilon * units.acts[..., [unit]] @ units.W_dec[[unit]]
        ones = []
        for i in scored.nonzero()[:, 0].tolist():
            one = task.subset([i])
            parts = ("base", "resid_mid", "mlp_in", "mlp_out", "neuron_acts")
            single = replace(below, **{part: getattr(below, part)[[i]] for part in parts})
            values = [
                metric_of(lm, one, single, (every + sign * change)[[i]]) for sign in (1.0, -1.0)
            ]
            ones.append(abs(values[0] - values[1]))
        return float(np.mean(ones))

    best, worst = int(order[0]), int(order[-1])
    assert moved(best) > moved(int(order[20])) >= moved(worst) - 1e-6


def test_a_planted_feature_that_hurts_is_found() -> None:
    """Feature 7 writes against the metric, strongly, wherever it is active."""
    lm, task, dictionary = tiny_lm(), make_task(), transcoder(2)
    below = lm.run_below(task.tokens, 2)
    against = -(task.is_greater[5].float() * 2 - 1)
    dictionary.W_dec[7] = 3 * lm.W_U[:, task.answer_ids] @ against
    dictionary.W_enc[:, 7] *= 4
    dictionary.b_enc[7] = 1.0
    units = dictionary_units(dictionary, below)
    order = rank_by_variance(units, task)
    curve = ablation_curve(lm, task, below, units, order, k_grid(units.n_units))
    assert steepest_drop(curve, order) == 7
    table = leave_one_out(lm, task, below, units, range(40))
    assert table.iloc[0]["unit"] == 7 and table.iloc[0]["gain"] > 0.1
    without = units.without(7)
    assert metric_of(lm, task, below, without.output()) == pytest.approx(
        table.iloc[0]["value"], abs=1e-5
    )


def test_crossings_and_grids_by_hand() -> None:
    def curve(*values: float) -> Curve:
        return Curve("u", "r", tuple(range(len(values))), np.array(values)[:, None])

    assert crossing(curve(0.1, 0.5, 0.6, 0.7), curve(0.2, 0.3, 0.5, 0.8)) == 3
    assert crossing(curve(0.1, 0.5), curve(0.2, 0.3)) is None
    # As published: behind from k = 2 on, but nearest at 3; k = 0 does not count, nor k = 4 below 4.
    ahead, behind = curve(0.1, 0.8, 0.6, 0.7, 0.9), curve(0.1, 0.3, 0.9, 0.8, 0.9)
    assert (crossing(ahead, behind), nearest_approach(ahead, behind, 4)) == (2, 3)
    assert nearest_approach(curve(0.1), curve(0.1)) is None
    assert curve(0.1, 0.5).at(1) == 0.5
    with pytest.raises(InputError, match="k 7 is not on the curve"):
        curve(0.1).at(7)
    assert k_grid(3) == [0, 1, 2, 3]
    grid = k_grid(1000, 10, 4)
    assert grid[:11] == list(range(11)) and grid[-1] == 1000 and len(grid) == 15


def test_no_choice_of_a_k_a_unit_a_head_or_an_mlp_hangs_on_rounding() -> None:
    def curve(*values: float) -> Curve:
        return Curve("u", "r", tuple(range(len(values))), np.array(values)[:, None])

    order, bit = torch.arange(5), 1e-8
    for noise in (-bit, bit):
        even, other = curve(0.0, 0.5, 0.4 + noise, 0.3), curve(0.0, 0.4, 0.4, 0.2 + noise)
        assert crossing(even, other) == 2
        assert nearest_approach(curve(0, 0.3, 0.5 + noise), curve(0, 0.1, 0.3)) == 1
        assert steepest_drop(curve(0.9, 0.8 + noise, 0.7, 0.7, 0.8), order, 4) == 0
        mlps = pd.DataFrame({"layer": [0, 1, 2], "head": -1, "mean_drop": [9.0, 0.5, 0.5 + noise]})
        assert strongest_mlp(mlps) == 1
        heads = pd.DataFrame({"layer": [0, 2, 1], "head": 0, "spread": [9.0, 0.5 + noise, 0.5]})
        assert strongest_head(heads) == (1, 0)


def test_the_control_keeps_norms_and_activations() -> None:
    lm, task = tiny_lm(), make_task()
    units = dictionary_units(transcoder(1), lm.run_below(task.tokens, 1))
    control = random_direction_units(units, torch.Generator().manual_seed(0))
    torch.testing.assert_close(control.W_dec.norm(dim=1), units.W_dec.norm(dim=1))
    assert torch.equal(control.acts, units.acts) and not torch.allclose(control.W_dec, units.W_dec)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_neurons_all_at_their_mean_are_the_mean_ablated_mlp(geometry: str) -> None:
    """Sentence by sentence, as the components are ablated; with all units kept nothing has changed."""
    lm, task = tiny_lm(geometry), in_two_sentences(make_task())
    below = lm.run_below(task.tokens, 1)
    units = neuron_units(lm, below)
    by_mean = at_mean(units, task)
    torch.testing.assert_close(by_mean.output(), units.output(), rtol=1e-4, atol=1e-5)
    order = rank_by_variance(units, task)
    curve = ablation_curve(lm, task, below, by_mean, order, [0, 3, units.n_units])
    effects = ablation_effects(lm, task).set_index("component").loc["MLP 1"]
    assert curve.at(0) == pytest.approx(effects["mean_ablated"], abs=1e-5)
    assert curve.at(units.n_units) == pytest.approx(effects["original"], abs=1e-5)


def test_a_unit_at_its_mean_by_hand() -> None:
    """One unit of two sentences' prompts, of which the last does not count."""
    lm, task = tiny_lm(), make_task(4)
    task = replace(task, numbers=(1, 2, 3, 99), template_idx=(0, 0, 1, 1))
    units = dictionary_units(transcoder(2), lm.run_below(task.tokens, 2))
    acts = torch.zeros_like(units.acts)
    acts[:, 5, 7] = torch.tensor([1.0, 3.0, 10.0, 50.0])
    assert task.is_scored.tolist() == [True, True, True, False]
    moved = at_mean(replace(units, acts=acts), task)
    assert moved.acts[:, 5, 7].tolist() == [-1.0, 1.0, 0.0, 40.0]
    mean = torch.tensor([2.0, 2.0, 10.0, 10.0])[:, None] * units.W_dec[7]
    torch.testing.assert_close(moved.rest[:, 5], units.rest[:, 5] + mean)
    torch.testing.assert_close(moved.rest[:, 4], units.rest[:, 4])


# -- components ---------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_ablating_components_by_hand(geometry: str) -> None:
    """A zeroed head is a zeroed block of W_O; a mean-ablated MLP writes its mean over prompts."""
    lm, task = tiny_lm(geometry), make_task()
    weight = {"gpt2": "c_proj", "neox": "dense", "llama": "o_proj"}[geometry]
    projection = getattr(lm._block(1).attention, weight).weight
    before = projection.clone()
    with ablate_component(lm, Component(1, 2), "zero"):
        ablated = lm.logits(task.tokens)
    block = slice(8, 12)
    rows = (block, slice(None)) if geometry == "gpt2" else (slice(None), block)
    with torch.no_grad():
        projection[rows] = 0.0
        expected = lm.logits(task.tokens)
        projection.copy_(before)
    torch.testing.assert_close(ablated, expected, rtol=1e-4, atol=1e-5)
    means: list[torch.Tensor] = []
    with (
        ablate_component(lm, Component(1, -1), "mean"),
        lm.override_mlp(1, lambda _x, y: means.append(y) or y),
    ):
        lm.logits(task.tokens)
    own = lm.run_below(task.tokens, 1).mlp_out.mean(0, keepdim=True)
    torch.testing.assert_close(means[0], own.expand_as(means[0]), rtol=1e-4, atol=1e-5)


def test_effects_name_every_component() -> None:
    lm, task = tiny_lm(), make_task()
    effects = ablation_effects(lm, task)
    assert len(effects) == len(all_components(lm)) == 3 + 12
    assert effects["original"].iloc[0] == pytest.approx(whole_metric(lm, task), abs=1e-6)
    with ablate_component(lm, Component(2, -1), "zero"):
        expected = whole_metric(lm, task)
    line = effects.set_index("component").loc["MLP 2"]
    assert line["zero_ablated"] == pytest.approx(expected, abs=1e-6)
    assert line["zero_drop"] == pytest.approx(line["original"] - expected, abs=1e-6)
    assert strongest_mlp(effects) in (1, 2)
    with pytest.raises(InputError, match="head 4: tiny-gpt2 has heads 0 to 3"):
        ablate_component(lm, Component(0, 4), "zero")
    with pytest.raises(InputError, match="layer 3"):
        ablate_component(lm, Component(3, -1), "zero")


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_head_and_component_attributions_are_those_of_the_sources(geometry: str) -> None:
    frozen = freeze(geometry, n_prompts=3, n_pos=6)
    task = make_task(3)
    task = replace(task, tokens=frozen.cache.tokens)
    table = component_attributions(frozen, task)
    expected = np.zeros(len(table))
    for prompt, number in enumerate(task.numbers):
        root = frozen.logit_target(task.root_weights(number), -1, prompt)
        found = sources(frozen, [root])[0].table
        kinds = ("feature", "error", "decoder_bias", "skip")
        for i, line in table.iterrows():
            is_mlp = line["head"] < 0
            own = found[found["layer"] == line["layer"]]
            own = (
                own[own["kind"].isin(kinds)]
                if is_mlp
                else own[(own["kind"] == "head") & (own["head"] == line["head"])]
            )
            expected[i] += own["contribution"].sum() / 3
    is_mlp = (table["head"] < 0).to_numpy()
    np.testing.assert_allclose(table["attribution"][is_mlp], expected[is_mlp], rtol=1e-6)
    weights = frozen.attention[1]
    direction = torch.randn(3, 16, dtype=torch.float64)
    by_source = head_contributions(frozen, direction)
    biases = torch.einsum("hd,pd->ph", weights.value_bias, direction)
    patterns = frozen.cache.pattern[1][:, :, -1]
    values = frozen.values[1]
    plain = torch.einsum("phs,phsk,hkd,pd->ph", patterns, values, weights.W_O, direction)
    torch.testing.assert_close(by_source[:, 1].sum(-1), plain + biases * patterns.sum(-1))


def test_the_head_that_carries_the_number_is_found() -> None:
    frozen = freeze("gpt2", n_prompts=4, n_pos=6)
    dictionary = frozen.transcoders[2]
    table = reading_heads(frozen, dictionary, [3, 5], subject_pos=2)
    assert len(table) == 12 and table["spread"].is_monotonic_decreasing
    head = strongest_head(table)
    assert head.layer > 0
    line = table[(table["layer"] == 1) & (table["head"] == 0)].iloc[0]
    sizes = []
    for prompt in range(4):
        for feature in (3, 5):
            target = frozen.feature_target(2, feature, -1, prompt)
            own = sources(frozen, [target])[0].table.query(
                "kind == 'head' and layer == 1 and pos == 2"
            )
            bias = frozen.attention[1].value_bias[0] @ target.direction
            pattern = frozen.cache.pattern[1][prompt, 0, -1, 2]
            scale = frozen.scale(target.site, prompt, target.pos)
            sizes.append(
                abs(float(own[own["head"] == 0]["contribution"].iloc[0] + scale * pattern * bias))
            )
    assert line["contribution"] == pytest.approx(np.mean(sizes), rel=1e-6)
    parallel = freeze("neox", n_prompts=2, n_pos=6)
    assert reading_heads(parallel, parallel.transcoders[2], [3], 2)["layer"].max() == 1


def test_bad_input_is_named() -> None:
    lm, task = tiny_lm(), make_task()
    below = lm.run_below(task.tokens, 1)
    with pytest.raises(InputError, match="a dictionary of layer 2 for MLP 1"):
        dictionary_units(transcoder(2), below)
    sae = transcoder(1)
    sae.config = replace(sae.config, kind="sae_mlp_in")
    with pytest.raises(InputError, match="an sae_mlp_in does not write"):
        dictionary_units(sae, below)
    units = dictionary_units(transcoder(1), below)
    order = rank_by_variance(units, task)
    for ks in ([41], [-1], [3, 2], []):
        with pytest.raises(InputError, match="expected increasing numbers from 0 to 40"):
            ablation_curve(lm, task, below, units, order, ks)
    coarse = ablation_curve(lm, task, below, units, order, [0, 5, 40])
    with pytest.raises(InputError, match="needs every k from 0 to 40"):
        steepest_drop(coarse, order)
    with pytest.raises(InputError, match="layer 3"):
        lm.run_below(task.tokens, 3)
    assert D_VOCAB == 100
