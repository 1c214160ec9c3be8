"""Metrics on hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tclib.evaluation import metrics
from tclib.support.statistics import bootstrap_means, interval


def test_l0_counts_active_features_a_token() -> None:
    z = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    assert metrics.l0(z) == 1.5


def test_fvu_is_one_for_the_mean_and_zero_for_a_perfect_reconstruction() -> None:
    y = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    assert metrics.fvu(y, y) == 0.0
    assert metrics.fvu(y, y.mean(0).expand_as(y)) == 1.0
    assert metrics.fvu(y, torch.tensor([[1.0, 6.0], [3.0, 5.0]])) == 0.5


def test_next_token_losses_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5], [1.0, 1.0]]]))
    losses = metrics.next_token_losses(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(losses, torch.tensor([[-math.log(0.75), math.log(2)]]))


def test_kl_is_zero_for_equal_and_known_for_unequal() -> None:
    p = torch.log(torch.tensor([[[0.5, 0.5]]]))
    q = torch.log(torch.tensor([[[0.25, 0.75]]]))
    assert metrics.kl_from(p.log_softmax(-1), p + 3.0).item() == pytest.approx(0.0, abs=1e-7)
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert metrics.kl_from(p.log_softmax(-1), q).item() == pytest.approx(expected)


def test_ce_recovered_is_one_for_the_original_and_zero_for_mean_ablation() -> None:
    assert metrics.ce_recovered(2.0, 2.0, 3.0) == 1.0
    assert metrics.ce_recovered(3.0, 2.0, 3.0) == 0.0
    assert metrics.ce_recovered(2.25, 2.0, 3.0) == 0.75


def test_dead_and_live_by_firing_counts() -> None:
    n_fired = torch.tensor([0, 1, 2, 100])
    assert metrics.is_dead(n_fired).tolist() == [True, False, False, False]
    assert metrics.is_live(n_fired, 10_000).tolist() == [False, False, True, True]
    assert metrics.log10_frequency(n_fired, 10_000)[3].item() == pytest.approx(-2.0)


def test_sums_over_batches_equal_the_metrics_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(100, 5, generator=generator) + 100.0  # a mean that would cancel badly
    reconstruction = y + 0.3 * torch.randn(100, 5, generator=generator)
    z = torch.randn(100, 7, generator=generator).relu()
    sums = metrics.ReconstructionSums()
    for start in range(0, 100, 33):
        part = slice(start, start + 33)
        sums.add(y[part], reconstruction[part], z[part])
    assert sums.l0 == pytest.approx(metrics.l0(z))
    assert sums.fvu == pytest.approx(metrics.fvu(y, reconstruction), rel=1e-9)
    assert sums.n_fired is not None
    assert torch.equal(sums.n_fired, (z > 0).sum(0))


def test_bootstrap_interval_has_the_width_of_the_standard_error() -> None:
    rows = np.random.default_rng(0).normal(1.0, 2.0, 400)
    means = bootstrap_means(rows, np.random.default_rng(1))
    low, high = interval(means)
    assert low < rows.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * rows.std() / 20, rel=0.1)
    again = bootstrap_means(rows, np.random.default_rng(1))
    assert (means == again).all()


def test_bootstrap_resamples_rows_of_a_table_together() -> None:
    rows = np.stack([np.arange(50.0), -np.arange(50.0)], axis=1)
    means = bootstrap_means(rows, np.random.default_rng(0), n_resamples=50)
    assert means.shape == (50, 2)
    np.testing.assert_allclose(means.sum(1), 0.0, atol=1e-9)


def test_one_token_has_no_variance_to_explain() -> None:
    sums = metrics.ReconstructionSums()
    sums.add(torch.ones(1, 4), torch.zeros(1, 4), torch.ones(1, 2))
    assert math.isnan(sums.fvu) and sums.l0 == 2
