"""The features-against-neurons curve beside one forward pass a k, on a random GPT-2-small-sized model.

A hundred prompts of nine tokens, a transcoder of 24,576 features in the place of MLP 10, k = 0 to 99. One
forward a k is what the reference code does: the whole model, the transcoder encoded and decoded densely with
all but the first k features zeroed, logits over the whole vocabulary. Both give the same curve.
"""

from __future__ import annotations

import time

import torch
from attribution import random_lm, random_transcoder

from tclib.evaluation.replace import replace_mlp
from tclib.greater_than.curves import ablation_curve
from tclib.greater_than.task import GreaterThan
from tclib.greater_than.units import dictionary_units, rank_by_variance

LAYER, N_PROMPTS, N_POS, N_ANSWERS, N_K = 10, 100, 9, 100, 100
N_ONE_BY_ONE = 8  # enough to time the slow way


def random_task() -> GreaterThan:
    tokens = torch.randint(2, 50_000, (N_PROMPTS, N_POS))
    numbers = tuple(range(N_PROMPTS))
    greater = torch.arange(N_ANSWERS)[None, :] > torch.arange(N_PROMPTS)[:, None]
    answer_ids = torch.arange(1000, 1000 + N_ANSWERS)
    templates = (0,) * N_PROMPTS
    return GreaterThan(
        "years", tokens, numbers, templates, 6, answer_ids, tuple(range(N_ANSWERS)), greater
    )


def one_forward_a_k(lm, task, dictionary, order, ks) -> list[float]:  # type: ignore[no-untyped-def]
    values = []
    for k in ks:
        with replace_mlp(lm, dictionary, order[:k]):
            probabilities = task.answer_probabilities(lm.logits(task.tokens)[:, -1])
        values.append(float(task.differences(probabilities)[task.is_scored].mean()))
    return values


def main() -> None:
    lm, task = random_lm(N_POS), random_task()
    below = lm.run_below(task.tokens, LAYER)
    dictionary = random_transcoder(LAYER, below.mlp_in[:8].flatten(0, 1))
    ratios = []
    for repeat in range(3):
        began = time.perf_counter()
        below = lm.run_below(task.tokens, LAYER)
        units = dictionary_units(dictionary, below)
        order = rank_by_variance(units, task)
        curve = ablation_curve(lm, task, below, units, order, range(N_K))
        ours = time.perf_counter() - began
        began = time.perf_counter()
        ks = [int(k) for k in torch.linspace(0, N_K - 1, N_ONE_BY_ONE)]
        slow = one_forward_a_k(lm, task, dictionary, order, ks)
        theirs = (time.perf_counter() - began) / N_ONE_BY_ONE * N_K
        ratios.append(theirs / ours)
        worst = max(abs(curve.at(k) - value) for k, value in zip(ks, slow, strict=True))
        print(
            f"run {repeat}: {N_K} k in {ours:.2f} s; one forward a k would take {theirs:.1f} s "
            f"({theirs / ours:.1f} times as long); largest difference {worst:.1e}"
        )
    print(f"median ratio {sorted(ratios)[1]:.1f}")


if __name__ == "__main__":
    main()
