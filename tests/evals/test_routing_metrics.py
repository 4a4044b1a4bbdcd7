"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals.metrics import (
    UNKNOWN,
    Point,
    Resamples,
    aiq,
    apgr,
    auroc,
    bootstrap_mean,
    calibration_error,
    convex_hull,
    cost_save,
    cpt,
    macro_mean,
    pareto_distance,
    pareto_frontier,
    perf_gain,
    pgr,
    recall_at,
    regret,
    reliability,
    strong_weak_curve,
)

NAN = math.nan


def test_regret_counts_cost_as_the_knob_does():
    scores = np.array([[1.0, 0.5], [0.0, 1.0], [NAN, 1.0], [1.0, 0.0]])
    costs = np.array([[4.0, 1.0], [4.0, 1.0], [4.0, 1.0], [4.0, NAN]])
    choice = np.array([1, 0, 0, 1])
    assert regret(scores, costs, choice)[[0, 1, 3]].tolist() == [0.5, 1.0, 1.0]
    assert np.isnan(regret(scores, costs, choice)[2])
    # Utilities at the knob 0.5: [0, 0.125] and [-0.5, 0.375].
    assert regret(scores, costs, choice, cost_quality=0.5)[:2].tolist() == [0.0, 0.875]
    assert np.isnan(regret(scores, costs, choice, cost_quality=0.5)[2:]).all()


def test_nobody_regrets_the_cheapest_where_only_cost_counts():
    scores, costs = np.array([[1.0, 0.0]]), np.array([[2.0, 1.0]])
    assert regret(scores, costs, np.array([1]), cost_quality=0.0).tolist() == [0.0]
    assert regret(scores, costs, np.array([0]), cost_quality=0.0).tolist() == [0.5]


def test_recall_looks_at_the_first_k_of_solvable_prompts():
    scores = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [NAN, 0.0, 1.0]])
    quality = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.9, 0.8, 0.1]])
    assert recall_at(1, quality, scores).tolist()[:2] == [0.0, 1.0]
    assert np.isnan(recall_at(1, quality, scores)[2])
    assert np.isnan(recall_at(2, quality, scores)[3]), "who was not run may be right"
    assert recall_at(3, quality, scores).tolist()[3] == 1.0
    rare = recall_at(1, quality, scores, at_most_winners=1)
    assert np.isnan(rare).tolist() == [False, True, True, True]


def test_calibration_error_is_averaged_over_models():
    quality = np.array([[0.5, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 1.0]])
    scores = np.array([[1.0, 0.5], [0.0, NAN], [1.0, 0.5], [0.0, 0.5]])
    # One bin per model, with gaps of 0.0 and 0.5.
    error = calibration_error(quality, scores, Resamples(4))
    assert error.mean == pytest.approx(0.25)
    # A sample of four has a gap of up to 0.5 for the first model, and always one for the second.
    assert error.low == pytest.approx(0.25)
    assert error.high == pytest.approx(0.5)
    assert calibration_error(quality, np.full((4, 2), NAN), Resamples(4)) == UNKNOWN


def test_samples_are_those_of_the_bootstrap():
    values = np.random.default_rng(1).random((300, 2))
    values[::3, 1] = NAN
    means = Resamples(300).means(values)
    for column in (0, 1):
        expected = bootstrap_mean(values[:, column])
        found = Resamples(300).estimate(expected.mean, means[:, column], expected.n)
        assert found.low == pytest.approx(expected.low, abs=0.005)
        assert found.high == pytest.approx(expected.high, abs=0.005)
    # So many that the interval is that of the normal distribution.
    many = np.random.default_rng(2).random((6000, 1))
    expected = bootstrap_mean(many[:, 0])
    found = Resamples(6000).estimate(expected.mean, Resamples(6000).means(many)[:, 0], 6000)
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.25)


def test_repeated_prompts_count_as_often():
    win_rate, strong, weak = np.array([3.0, 2.0, 1.0]), np.array([1.0, 0, 1]), np.array([0.0, 0, 1])
    counts = np.array([2, 0, 1])
    twice = strong_weak_curve(win_rate[[0, 0, 2]], strong[[0, 0, 2]], weak[[0, 0, 2]])
    found = strong_weak_curve(win_rate, strong, weak, counts)
    assert apgr(found) == pytest.approx(apgr(twice))
    assert cpt(found, 0.8) == pytest.approx(cpt(twice, 0.8))


def test_reliability_keeps_equal_qualities_together():
    quality = np.array([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75], [0.25, 0.75]])
    scores = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, NAN], [0.0, 0.0]])
    assert reliability(quality, scores) == [
        (0.25, 0.25, 4),
        (0.75, pytest.approx(2 / 3), 3),
    ]


def test_auroc_counts_ties_half():
    scores = np.array([0.1, 0.4, 0.4, 0.9])
    positive = np.array([False, True, False, True])
    # Pairs: (.4, .1) right, (.4, .4) half, (.9, .1) right, (.9, .4) right.
    assert auroc(scores, positive) == pytest.approx(3.5 / 4)
    assert math.isnan(auroc(scores, np.ones(4, bool)))


def test_auroc_equals_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 200) / 9, rng.random(200) < 0.3
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


STRONG = np.array([1.0, 1.0, 1.0, 0.0])
WEAK = np.array([0.0, 1.0, 0.0, 1.0])


def test_strong_calls_go_where_the_win_rate_is_highest():
    curve = strong_weak_curve(np.array([0.9, 0.2, 0.8, 0.1]), STRONG, WEAK)
    assert curve.shares.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve.scores.tolist() == [0.5, 0.75, 1.0, 1.0, 0.75]
    assert pgr(0.625, curve.weak, curve.strong) == pytest.approx(0.5)
    # Trapezoids: 0.15625 + 0.21875 + 0.25 + 0.21875.
    assert apgr(curve) == pytest.approx((0.84375 - 0.5) / 0.25)
    # Half the gap is recovered half way to the first call, all of it at the first call.
    assert cpt(curve, 0.5) == pytest.approx(0.125)
    assert cpt(curve, 1.0) == pytest.approx(0.25)


def test_equal_win_rates_move_together():
    curve = strong_weak_curve(np.full(4, 0.5), STRONG, WEAK)
    assert curve.shares.tolist() == [0.0, 1.0]
    assert apgr(curve) == pytest.approx(0.5)


def test_without_a_gap_there_is_nothing_to_recover():
    curve = strong_weak_curve(np.arange(4.0), WEAK, WEAK)
    assert math.isnan(apgr(curve))
    assert math.isnan(cpt(curve, 0.5))


def test_large_samples_get_the_normal_interval():
    values = np.random.default_rng(0).random(6000)
    found, resampled = bootstrap_mean(values), bootstrap_mean(values[:4999])
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 6000**0.5, rel=1e-3)
    assert found.high - found.low == pytest.approx(resampled.high - resampled.low, rel=0.2)
    categories = ["a", "b"] * 3000
    macro = macro_mean(values, categories)
    assert macro.mean == pytest.approx((values[::2].mean() + values[1::2].mean()) / 2)
    assert macro.high - macro.low == pytest.approx(found.high - found.low, rel=0.05)


POINTS = [Point(1.0, 0.4), Point(2.0, 0.7), Point(3.0, 0.6), Point(4.0, 0.8)]


def test_frontier_leaves_out_what_is_beaten():
    assert pareto_frontier(POINTS) == [POINTS[0], POINTS[1], POINTS[3]]
    assert pareto_frontier([Point(1.0, 0.5), Point(1.0, 0.6)]) == [Point(1.0, 0.6)]


def test_gain_and_saving_against_the_best_single_model():
    best = Point(4.0, 0.7)
    assert perf_gain(POINTS, best) == pytest.approx(0.1 / 0.7)
    assert cost_save(POINTS, best) == pytest.approx(0.5)
    assert math.isnan(cost_save(POINTS, Point(4.0, 0.9)))


def test_aiq_is_the_mean_height_of_the_hull():
    # Hull: (1, .4), (2, .7), (4, .8); areas .55 and 1.5 over a width of 3.
    assert aiq(POINTS) == pytest.approx((0.55 + 1.5) / 3)
    assert math.isnan(aiq([Point(1.0, 0.5)]))


def test_distance_to_the_frontier_of_all():
    assert pareto_distance([POINTS[0], POINTS[3]], POINTS) == 0.0
    # Scaled, (3, .6) is (2/3, 1/2); the nearest segment runs from (1/3, 3/4) to (1, 1).
    direction = np.array([2 / 3, 1 / 4])
    offset = np.array([1 / 3, -1 / 4])
    away = abs(offset[0] * direction[1] - offset[1] * direction[0]) / np.hypot(*direction)
    assert pareto_distance([POINTS[2]], POINTS) == pytest.approx(away)


def test_the_hull_keeps_what_no_mixture_beats():
    # (2, 0.5) lies below the line from (1, 0.4) to (4, 0.8), and (5, 0.7) costs more for less.
    corners = [Point(1.0, 0.4), Point(4.0, 0.8)]
    assert convex_hull([Point(2.0, 0.5), Point(5.0, 0.7), *corners]) == corners
