from __future__ import annotations

import math

import numpy as np
import pytest

from evals.metrics import (
    best_single_choice,
    bootstrap_mean,
    chosen,
    gap_closed,
    macro_mean,
    oracle_scores,
    paired_difference,
    random_scores,
)
from routers.baselines import BestSingleRouter, category_table_choice
from routers.outcomes import OutcomeTable, Prompts
from routers.training import overall_means

NAN = math.nan
SCORES = np.array([[1.0, 0.0, 0.5], [0.0, NAN, 1.0], [0.5, 0.5, NAN], [NAN, NAN, NAN]])


def test_scores_of_choices_and_bounds_by_hand():
    assert np.array_equal(
        chosen(SCORES, np.array([2, 0, 1, 0])), [0.5, 0.0, 0.5, NAN], equal_nan=True
    )
    assert np.array_equal(oracle_scores(SCORES), [1.0, 1.0, 0.5, NAN], equal_nan=True)
    assert np.array_equal(random_scores(SCORES), [0.5, 0.5, 0.5, NAN], equal_nan=True)


def test_best_single_averages_the_scores_that_exist():
    assert best_single_choice(SCORES) == 2
    assert best_single_choice(np.array([[0.5, 0.5]])) == 0
    assert best_single_choice(np.array([[NAN, 0.0]])) == 1


def eliminated():
    """A generalist, and a specialist that was asked little where it is bad."""
    rng = np.random.default_rng(0)
    scores = (rng.random((120, 2)) < 0.7).astype(float)
    scores[:60, 1], scores[60:, 1] = 0.9, 0.0
    scores[70:, 1] = NAN
    return scores, ["special"] * 60 + ["other"] * 60


def test_a_specialist_is_not_the_best_single_for_cells_it_lacks():
    scores, categories = eliminated()
    assert best_single_choice(scores) == 1, "the cells that exist flatter it"
    assert best_single_choice(scores, categories) == 0
    assert overall_means(scores, categories)[1] == pytest.approx((0.9 + 0.0) / 2)


def test_overall_means_are_plain_ones_where_nothing_is_missing():
    scores = np.random.default_rng(0).random((50, 3))
    categories = [f"c{number % 7}" for number in range(50)]
    assert np.array_equal(overall_means(scores, categories), scores.mean(axis=0))
    scores[:, 1] = NAN
    assert np.array_equal(
        overall_means(scores, categories), [scores[:, 0].mean(), 0.0, scores[:, 2].mean()]
    )


def test_who_was_not_asked_in_a_category_gets_its_lowest_mean():
    scores = np.array([[1.0, 0.5, 0.8], [0.5, 0.2, NAN], [0.5, 0.4, NAN], [NAN, NAN, NAN]])
    means = overall_means(scores, ["x", "y", "y", "z"])
    assert means == pytest.approx([(1 + 2 * 0.5) / 3, (0.5 + 2 * 0.3) / 3, (0.8 + 2 * 0.3) / 3])
    assert overall_means(scores, None) == pytest.approx([2 / 3, 1.1 / 3, 0.8])


def test_the_router_of_the_best_single_model_weighs_categories():
    scores, categories = eliminated()
    ids = [str(number) for number in range(len(scores))]
    table = OutcomeTable(
        Prompts(ids, ids, categories),
        models=["generalist", "specialist"],
        numbers={"score": scores},
    )
    quality = BestSingleRouter().fit(table, split="all").quality_
    assert quality.argmax() == 0
    assert quality == pytest.approx(overall_means(scores, categories))


def test_category_table_takes_each_categorys_best_training_model():
    train = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    choice = category_table_choice(train, ["x", "x", "y"], ["y", "x", "unseen"])
    assert choice.tolist() == [1, 0, 0]


def test_mean_and_its_interval():
    estimate = bootstrap_mean(np.array([0.0, 1.0, NAN, 1.0, 0.0]))
    assert estimate.mean == 0.5
    assert estimate.n == 4
    assert 0 <= estimate.low < 0.5 < estimate.high <= 1
    assert bootstrap_mean(np.array([0.0, 1.0])) == bootstrap_mean(np.array([0.0, 1.0]))


def test_nothing_to_average_is_nan():
    assert bootstrap_mean(np.array([NAN])).n == 0
    assert math.isnan(bootstrap_mean(np.array([])).mean)
    assert macro_mean(np.array([NAN]), ["x"]).n == 0


def test_macro_mean_weighs_categories_equally():
    values = np.array([1.0, 1.0, 1.0, 0.0, NAN])
    estimate = macro_mean(values, ["x", "x", "x", "y", "z"])
    assert estimate.mean == 0.5
    assert (estimate.low, estimate.high, estimate.n) == (0.5, 0.5, 4)


def test_paired_difference_uses_prompts_with_both():
    estimate = paired_difference(np.array([1.0, 1.0, NAN]), np.array([0.5, NAN, 0.0]))
    assert estimate.mean == 0.5
    assert estimate.n == 1


def test_gap_closed_by_hand():
    assert gap_closed(0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert gap_closed(0.4, 0.5, 0.7) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(0.5, 0.5, 0.5))


def test_intervals_cover_the_truth_about_as_often_as_promised():
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        estimate = bootstrap_mean((rng.random(200) < 0.3).astype(float), seed=trial)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.91 <= hits / 300 <= 0.98


def test_large_tables_are_resampled_in_parts():
    values = np.random.default_rng(0).random(100_000)
    estimate = bootstrap_mean(values, resamples=100)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.2887 / 316, rel=0.3)
