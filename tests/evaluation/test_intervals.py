"""Intervals: known values, how often they hold the truth, and ends that say nothing false."""

from math import comb

import numpy as np
import pytest

from llama.evaluation.intervals import CONFIDENCE, FEWEST, Interval, Z, bootstrap, wilson


def test_wilson_has_the_values_of_published_tables():
    """Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857, table I, method 3."""
    for (successes, n), (low, high) in {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605),
                                        (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}.items():  # fmt: skip
        found = wilson(successes, n)
        assert found is not None and (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 40])
def test_wilson_is_where_the_score_test_no_longer_refuses_a_proportion(n):
    """Its definition: the p0 with |p - p0| <= z sqrt(p0 (1 - p0) / n), found by trying many."""
    grid = np.linspace(0, 1, 200_001)
    for successes in range(n + 1):
        kept = grid[np.abs(successes / n - grid) <= Z * np.sqrt(grid * (1 - grid) / n) + 1e-12]
        found = wilson(successes, n)
        assert found is not None and (found.low, found.high) == pytest.approx((kept[0], kept[-1]), abs=1e-5)
        assert 0 <= found.low <= successes / n <= found.high <= 1


def test_wilson_holds_the_truth_about_as_often_as_it_says():
    """Over all results of 50 trials, weighted by their probability, averaged over 99 proportions."""
    covered = []
    for p in np.linspace(0.01, 0.99, 99):
        intervals = [wilson(k, 50) for k in range(51)]
        covered.append(sum(comb(50, k) * p**k * (1 - p) ** (50 - k) for k, found in enumerate(intervals)
                           if found and found.low <= p <= found.high))  # fmt: skip
    assert np.mean(covered) == pytest.approx(CONFIDENCE, abs=0.01)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(7).exponential(size=2000)
    found = bootstrap(values.tolist())
    half = Z * values.std() / np.sqrt(2000)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert found == bootstrap(values.tolist()) and "1000 resamples, seed 0" in found.method


def test_bootstrap_of_a_ratio_resamples_whole_examples():
    """Loss per token: an example's loss and its number of tokens are drawn together. Oracle: the delta method."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 60, 3000)
    losses = tokens * rng.normal(2.0, 0.3, 3000)
    ratio = losses.sum() / tokens.sum()
    half = Z * np.sqrt(((losses - ratio * tokens) ** 2).sum()) / tokens.sum()
    found = bootstrap(losses.tolist(), tokens.tolist(), "windows")
    assert found is not None and "over windows" in found.method
    assert (found.low, found.high) == pytest.approx((ratio - half, ratio + half), abs=0.1 * half)


@pytest.mark.slow
def test_bootstrap_of_the_fewest_units_holds_the_truth_in_nine_of_ten_cases_or_more():
    """Of fewer it would hold it in fewer cases, and gives none."""
    rng = np.random.default_rng(11)
    covered = []
    for _ in range(200):
        found = bootstrap(rng.normal(1.0, 1.0, FEWEST).tolist())
        assert found is not None
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.9 <= np.mean(covered) <= 0.99
    assert bootstrap(rng.normal(1.0, 1.0, FEWEST - 1).tolist()) is None


def test_too_few_examples_have_no_interval():
    """One example says nothing of a spread, and none nothing at all."""
    assert wilson(0, 0) is None and bootstrap([]) is None and bootstrap([1.0]) is None
    assert bootstrap([0.0] * 30, [0] * 30) is None
    assert bootstrap([2.0] * 30) is None and bootstrap([2.0, 4.0] * 15, [1, 2] * 15) is None
    assert bootstrap([2.0, 2.0000001] * 15) is None  # the same loss, rounded in batches of different sizes
    assert Interval(0.0, 1e9, "m").exp().high == np.inf
    assert Interval(0.0, 1.0, "m").exp() == Interval(1.0, pytest.approx(np.e), "m")
