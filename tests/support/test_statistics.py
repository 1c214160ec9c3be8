"""Intervals and tests of shares against published and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tclib.support.errors import InputError
from tclib.support.statistics import (
    fisher_p,
    n_for_power,
    newcombe_interval,
    ranked,
    ratio_interval,
    settled,
    sign_test_p,
    slope_through_origin,
    spearman,
    student_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("n_hits", "n", "expected"),
    [  # Newcombe (1998), Statistics in Medicine 17, 857, Table I
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilsons_interval_is_the_published_one(
    n_hits: int, n: int, expected: tuple[float, float]
) -> None:
    assert wilson_interval(n_hits, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [  # Newcombe (1998), Statistics in Medicine 17, 873, Table II, method 10
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((10, 10, 0, 20), (0.6791, 1.0)),
        ((0, 25, 0, 25), (-0.1332, 0.1332)),
    ],
)
def test_newcombes_interval_is_the_published_one(
    shares: tuple[int, int, int, int], expected: tuple[float, float]
) -> None:
    assert newcombe_interval(*shares) == pytest.approx(expected, abs=1e-4)


def test_fishers_test_of_tea_and_of_the_papers_table() -> None:
    assert fisher_p(3, 4, 1, 4) == pytest.approx(34 / 70)  # the lady tasting tea
    assert fisher_p(41, 50, 38, 50) == pytest.approx(0.62, abs=0.01)
    assert fisher_p(0, 5, 5, 5) == pytest.approx(2 / 252)
    assert fisher_p(2, 4, 2, 4) == 1.0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [  # By hand: n = (1.1290 + 0.4835)² / 0.06² = 722.2, and with the correction 755.2
        ((0.82, 0.76), 756),
        ((0.12, 0.32), 76),  # (1.1482 + 0.4785)² / 0.2² = 66.2, 75.8
        ((0.10, 0.20), 219),  # 199.0, 218.5
        ((0.20, 0.40), 91),  # 81.2, 90.9
        ((0.10, 0.50), 25),  # 19.4, 24.1
    ],
)
def test_items_needed_are_the_hand_computed_numbers(
    shares: tuple[float, float], expected: int
) -> None:
    assert n_for_power(*shares) == n_for_power(*shares[::-1]) == expected
    assert n_for_power(*shares, power=0.9) > expected > n_for_power(*shares, power=0.5)


def test_fishers_test_has_the_power_asked_for() -> None:
    """By every possible outcome of 25 against 25 at shares of 0.1 and 0.5."""
    n = n_for_power(0.1, 0.5)
    chances = [
        [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)] for p in (0.1, 0.5)
    ]
    found = sum(
        chances[0][one] * chances[1][other]
        for one in range(n + 1)
        for other in range(n + 1)
        if fisher_p(one, n, other, n) <= 0.05
    )
    assert found == pytest.approx(0.8, abs=0.05)


def test_power_that_nothing_has_is_refused() -> None:
    with pytest.raises(InputError, match="shares 0.5 and 0.5: no number of items"):
        n_for_power(0.5, 0.5)
    with pytest.raises(InputError, match="share 1.5: expected 0 to 1"):
        n_for_power(1.5, 0.5)
    with pytest.raises(InputError, match="other -0.1: expected 0 to 1"):
        n_for_power(0.5, -0.1)
    with pytest.raises(InputError, match="power 1: expected more than 0 and less than 1"):
        n_for_power(0.5, 0.4, power=1)


def test_none_of_none_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_ratio_of_means_covers_what_it_was_made_of() -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(1.0, 0.3, 300)
    part = 0.4 * whole + rng.normal(0, 0.1, 300)
    value, low, high = ratio_interval(part, whole, rng)
    assert low < 0.4 < high and high - low < 0.06 and low < value < high
    same = ratio_interval(whole, whole, rng)
    assert same == pytest.approx((1.0, 1.0, 1.0))


def test_students_interval_is_the_one_computed_by_hand() -> None:
    # Mean 2, standard deviation 1, three runs: 2 ± 4.303 / √3.
    assert student_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2.0, -0.4843, 4.4843), abs=1e-4
    )
    with pytest.raises(InputError, match="1 runs: expected two or more"):
        student_interval(np.array([1.0]))


def test_ranks_and_slopes_by_hand() -> None:
    one, other = np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 1.0, 2.0, 3.0])
    assert spearman(one, one) == pytest.approx(1.0)
    assert spearman(one, -one) == pytest.approx(-1.0)
    assert spearman(one, other) == pytest.approx(0.2)
    assert np.isnan(spearman(one, np.ones(4))) and np.isnan(spearman(one[:2], one[:2]))
    assert slope_through_origin(one, 3 * one) == 3.0
    assert slope_through_origin(np.append(one, 0.5), np.append(3 * one, -1e9)) == 3.0  # an outlier
    assert np.isnan(slope_through_origin(np.zeros(3), np.ones(3)))


def test_the_slope_has_the_least_absolute_deviations() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=31), generator.normal(size=31)
    found = np.abs(y - slope_through_origin(x, y) * x).sum()
    assert all(found <= np.abs(y - s * x).sum() + 1e-12 for s in np.linspace(-3, 3, 601))


def test_the_sign_test_is_the_tail_of_fair_coins() -> None:
    assert sign_test_p(10, 10) == sign_test_p(0, 10) == pytest.approx(2 / 1024)
    assert sign_test_p(8, 10) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test_p(5, 10) == sign_test_p(0, 0) == 1.0


def test_values_that_rounding_tells_apart_are_ties_that_go_by_index() -> None:
    values = np.array([1.0, 2.0, 1.0 + 3e-6, 0.0, 2.0 - 3e-6, 1.9, 0.0])
    assert settled(values).tolist() == [1.0 + 3e-6, 2.0, 1.0 + 3e-6, 0.0, 2.0, 1.9, 0.0]
    assert ranked(values).tolist() == [1, 4, 5, 0, 2, 3, 6]
    assert ranked(torch.tensor(values)).tolist() == [1, 4, 5, 0, 2, 3, 6]
    assert ranked(np.array([1e-9, 3e-8, -2e-8]), least=1e-6).tolist() == [0, 1, 2]
    assert ranked(np.array([np.nan, 1.0, np.nan, 2.0])).tolist() == [3, 1, 0, 2]
    assert ranked(np.array([])).tolist() == []


def test_the_noise_of_another_order_of_summation_moves_no_rank() -> None:
    generator = np.random.default_rng(0)
    distinct = np.exp(generator.normal(size=40))
    values = np.concatenate([distinct, distinct[::-1], np.zeros(5)])
    expected = ranked(values)
    for _ in range(50):
        noise = 1 + 1e-6 * generator.uniform(-1, 1, len(values))
        assert ranked(values * noise).tolist() == expected.tolist()
