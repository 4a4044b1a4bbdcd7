"""The test of two arms holds its error however often one looks, and finds differences."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.learning.sequential import Arm, compare, mean_interval, verdict_on


def arm(outcomes):
    """An arm that has seen these outcomes."""
    found = Arm()
    for outcome in outcomes:
        found.add(float(outcome))
    return found


def first_verdict(mean_a, mean_b, *, seed, most, share_b=0.5, step=10):
    """Which arm is named first, and after how many outcomes, by one who looks again and again."""
    rng = np.random.default_rng(seed)
    a, b = Arm(), Arm()
    for number in range(1, most + 1):
        is_b = rng.random() < share_b
        (b if is_b else a).add(float(rng.random() < (mean_b if is_b else mean_a)))
        if number % step == 0 and (found := verdict_on(a, b)) != "undecided":
            return found, number
    return "undecided", most


@pytest.mark.parametrize(("mean", "share_b"), [(0.5, 0.5), (0.9, 0.2)])
def test_equal_arms_are_told_apart_in_at_most_five_percent_of_peeked_runs(mean, share_b):
    runs = [
        first_verdict(mean, mean, seed=[1, seed], most=200, share_b=share_b)[0]
        for seed in range(100)
    ]
    assert sum(found != "undecided" for found in runs) <= 5


def test_a_naive_test_would_not_hold_under_the_same_peeking():
    wrong = 0
    for seed in range(100):
        rng = np.random.default_rng([2, seed])
        both = rng.random((2, 200)) < 0.5
        counts = np.arange(10, 201, 10)
        means = both.cumsum(axis=1)[:, counts - 1] / counts
        z = np.abs(means[1] - means[0]) / np.sqrt(0.5 / counts)
        wrong += bool((z > 1.96).any())
    assert wrong > 10


def test_a_clear_difference_is_found_in_a_few_hundred_outcomes():
    runs = [first_verdict(0.4, 0.7, seed=[3, seed], most=600, step=20) for seed in range(20)]
    assert sum(verdict == "b" for verdict, _ in runs) >= 18
    assert not any(verdict == "a" for verdict, _ in runs)
    assert np.median([after for _, after in runs]) < 300


def test_steady_ratings_are_told_apart_sooner_than_scattered_ones():
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.1, 0.1, size=(2, 100))
    steady = compare(arm(0.5 + noise[0]), arm(0.65 + noise[1]))
    scattered = compare(arm(rng.random(100) < 0.5), arm(rng.random(100) < 0.65))
    assert steady.verdict == "b"
    assert steady.high - steady.low < 0.5 * (scattered.high - scattered.low)


def test_the_interval_covers_the_difference_and_mirrors_when_arms_swap():
    rng = np.random.default_rng(1)
    a, b = arm(rng.random(400) < 0.5), arm(rng.random(200) < 0.6)
    there, back = compare(a, b), compare(b, a)
    assert there.low < 0.1 < there.high
    assert there.difference is not None
    assert there.low < there.difference < there.high
    np.testing.assert_allclose([there.low, there.high], [-back.high, -back.low], atol=1e-6)


@pytest.mark.parametrize("better", [0, 1, 2, 3])
def test_the_verdict_falls_where_the_interval_leaves_0_out(better):
    rng = np.random.default_rng([4, better])
    a, b = arm(rng.random(200) < 0.5), arm(rng.random(200) < 0.5 + 0.1 * better)
    found = compare(a, b)
    assert found.verdict == ("b" if found.low > 0 else "a" if found.high < 0 else "undecided")


def test_more_outcomes_narrow_the_interval():
    rng = np.random.default_rng(2)
    outcomes = rng.random((2, 10_000)) < 0.5
    widths = []
    for n in (10, 100, 1000, 10_000):
        found = compare(arm(outcomes[0, :n]), arm(outcomes[1, :n]))
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.08


def test_without_outcomes_nothing_is_known():
    assert compare(Arm(), arm([1.0])) == (None, -1.0, 1.0, "undecided")
    assert mean_interval(Arm()) == (0.0, 1.0)


def test_replicas_add_up():
    rng = np.random.default_rng(3)
    outcomes = rng.random(400) < 0.8
    parts = [arm(outcomes[:200]), arm(outcomes[200:])]
    both = Arm(
        sum(part.n for part in parts),
        sum(part.total for part in parts),
        sum(part.squares for part in parts),
    )
    low, high = mean_interval(both)
    assert low < 0.8 < high
    assert (low, high) == pytest.approx(mean_interval(arm(outcomes)), abs=0.01)


@pytest.mark.parametrize("outcome", [-0.1, 1.1, float("nan")])
def test_outcomes_out_of_range_are_refused(outcome):
    with pytest.raises(ValueError, match="outcome"):
        Arm().add(outcome)
