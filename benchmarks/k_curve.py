"""The features-against-neurons curve beside one forward pass a k."""

import torch
from random_models import GPT2_SMALL, SMALL
from result import Result, interleaved

from tclib.evaluation.replace import replace_mlp
from tclib.greater_than.curves import ablation_curve
from tclib.greater_than.task import GreaterThan
from tclib.greater_than.units import dictionary_units, rank_by_variance

N_ONE_BY_ONE = 8  # enough to time the slow way


def run(small: bool) -> Result:
    """The hundred prompts, a transcoder for the last MLP but one, k = 0 to 99. Target: 10 times as fast.

    One forward a k is what the reference code does: the whole model, the transcoder encoded and decoded
    densely with all but the first k features zeroed, logits over the whole vocabulary.
    """
    shape, n_k = (SMALL, 20) if small else (GPT2_SMALL, 100)
    lm, layer = shape.lm(16), shape.n_layers - 2
    task = GreaterThan.of(lm).every(10 if small else 1)
    below = lm.run_below(task.tokens, layer)
    dictionary = shape.transcoder(layer, below.mlp_in[:8].flatten(0, 1))
    order = rank_by_variance(dictionary_units(dictionary, below), task)
    ks = torch.linspace(0, n_k - 1, N_ONE_BY_ONE).int().tolist()

    def at_once() -> torch.Tensor:
        below = lm.run_below(task.tokens, layer)
        units = dictionary_units(dictionary, below)
        ranking = rank_by_variance(units, task)
        curve = ablation_curve(lm, task, below, units, ranking, range(n_k))
        return torch.tensor([curve.at(k) for k in ks])

    def one_by_one() -> torch.Tensor:
        values = []
        for k in ks:
            with replace_mlp(lm, dictionary, order[:k]):
                probabilities = task.answer_probabilities(lm.logits(task.tokens)[:, -1])
            values.append(task.differences(probabilities)[task.is_scored].mean())
        return torch.stack(values)

    seconds, curves = interleaved(at_once, one_by_one, n_repeats=1 if small else 3)
    apart = float((curves[0] - curves[1]).abs().max())
    ratio = seconds[1] / N_ONE_BY_ONE * n_k / seconds[0]
    what = f"one forward a k over the features-against-neurons curve of {n_k} k, in time"
    sizes = {"n_features": shape.n_features, "n_prompts": len(task.tokens), "n_k": n_k}
    return Result(sizes, {what: (ratio, "×")}, {"curve, that of one forward a k": (apart, 1e-6)})
