"""The bandit: what it learns, and that it learns nothing from nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest

from orchestrator.learning.bandit import LinUCB, features_of

EXPERTS = ["a", "b", "c"]


def bandit(**settings):
    """A bandit over three experts and four features."""
    defaults = {"forgetting": 0.99, "penalty": 2.0}
    return LinUCB(EXPERTS, 4, **{**defaults, **settings})


def observations(n, seed=0, n_features=4):
    """Random features, experts, rewards and priors."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        features = np.append(rng.normal(size=n_features - 1), 1.0).astype(np.float16)
        yield features, str(rng.choice(EXPERTS)), float(rng.random()), float(rng.random())


def taught(found, n=200, seed=0):
    """The bandit after so many observations."""
    for one in observations(n, seed):
        found.update(*one)
    return found


def exact(observed, forgetting, penalty, n_features=4):
    """Weights and inverse per expert from all observations at once, in double precision."""
    weights, inverses = {}, {}
    for expert in EXPERTS:
        gram, moment = penalty * np.eye(n_features), np.zeros(n_features)
        for age, (features, who, reward, prior) in enumerate(reversed(observed)):
            if who == expert:
                x = features.astype(float)
                gram += forgetting**age * np.outer(x, x)
                moment += forgetting**age * (reward - prior) * x
        inverses[expert] = np.linalg.inv(gram)
        weights[expert] = inverses[expert] @ moment
    return weights, inverses


def test_without_feedback_predictions_stay_bit_for_bit():
    quality = np.random.default_rng(0).random(3).astype(np.float32)
    features = np.ones(4, np.float16)
    found = bandit().adjust(features, quality, EXPERTS)
    assert (found.quality == quality).all()
    assert (found.uncertainty > 0).all()


@pytest.mark.parametrize("forgetting", [1.0, 0.99])
def test_rank_one_updates_equal_the_exact_solution(forgetting):
    observed = list(observations(700))
    found = bandit(forgetting=forgetting)
    for one in observed:
        found.update(*one)
    weights, inverses = exact(observed, forgetting, 2.0)
    x = np.array([0.3, -0.2, 0.5, 1.0])
    got = found.adjust(x, np.full(3, 0.5), EXPERTS)
    # Between factorisations the penalty may have faded by a tenth.
    rtol = 1e-9 if forgetting == 1.0 else 0.06
    for place, expert in enumerate(EXPERTS):
        wanted = np.clip(0.5 + weights[expert] @ x, 0, 1)
        np.testing.assert_allclose(got.quality[place], wanted, rtol=rtol)
        np.testing.assert_allclose(
            got.uncertainty[place], (x @ inverses[expert] @ x) ** 0.5, rtol=rtol
        )


def test_it_learns_who_is_better_on_which_queries():
    found, rng = bandit(forgetting=1.0), np.random.default_rng(1)
    for _ in range(400):
        side = rng.choice([-1.0, 1.0])
        features = np.array([side, 0, 0, 1], np.float16)
        for expert, sign in (("a", 1), ("b", -1)):
            found.update(features, expert, float(rng.random() < 0.5 + 0.3 * sign * side), 0.5)
    for side, best in ((1.0, "a"), (-1.0, "b")):
        features = np.array([side, 0, 0, 1], np.float16)
        quality = found.adjust(features, np.full(2, 0.5), ["a", "b"]).quality
        assert ["a", "b"][quality.argmax()] == best
        assert abs(quality.max() - 0.8) < 0.07


def test_only_the_residual_is_learnt():
    found = bandit(forgetting=1.0)
    features = np.array([0, 0, 0, 1], np.float16)
    for _ in range(100):
        found.update(features, "a", 0.7, 0.7)
    np.testing.assert_allclose(found.adjust(features, np.array([0.4]), ["a"]).quality, 0.4)


def test_an_expert_not_asked_for_long_becomes_uncertain_again():
    found, features = bandit(forgetting=0.99), np.array([0, 0, 0, 1], np.float16)
    for _ in range(100):
        found.update(features, "a", 1.0, 0.5)
    before = found.adjust(features, np.full(3, 0.5), EXPERTS)
    for _ in range(1000):
        found.update(features, "b", 0.5, 0.5)
    after = found.adjust(features, np.full(3, 0.5), EXPERTS)
    assert after.uncertainty[0] > 3 * before.uncertainty[0]
    assert after.uncertainty[1] < before.uncertainty[1]
    # What is forgotten falls back to the prediction.
    assert abs(after.quality[0] - 0.5) < 0.01 < before.quality[0] - 0.9


def test_it_stays_sound_under_long_forgetting():
    found = bandit(forgetting=0.9)
    for features, expert, reward, prior in observations(3_000):
        # One direction only, for most of the time: the others are forgotten altogether.
        found.update(features * np.array([1, 0, 0, 0], np.float16), expert, reward, prior)
    got = found.adjust(np.ones(4), np.full(3, 0.5), EXPERTS)
    assert np.isfinite(got.quality).all()
    # The penalty bounds what is not known: never less certain than before the first observation.
    assert (got.uncertainty <= (4 / (2.0 * 0.89)) ** 0.5).all()
    assert (got.uncertainty > 0).all()


def test_weights_count_as_observations():
    once, twice = bandit(forgetting=1.0), bandit(forgetting=1.0)
    features = np.array([1, 2, 3, 1], np.float16)
    once.update(features, "a", 1.0, 0.5, weight=2.0)
    for _ in range(2):
        twice.update(features, "a", 1.0, 0.5)
    given = (features, np.full(3, 0.5), EXPERTS)
    np.testing.assert_allclose(once.adjust(*given).quality, twice.adjust(*given).quality)
    assert once.observations == twice.observations == 2


@pytest.mark.parametrize(
    ("reward", "prior", "weight", "shape"),
    [
        (np.nan, 0.5, 1, 4),
        (np.inf, 0.5, 1, 4),
        (0.5, np.nan, 1, 4),
        (0.5, 0.5, 0, 4),
        (0.5, 0.5, np.inf, 4),
        (0.5, 0.5, 1, 3),
        (0.5, 0.5, 1, 1),
        (0.5, 0.5, 1, (1, 4)),
    ],
)
def test_what_is_no_number_is_refused_and_changes_nothing(reward, prior, weight, shape):
    found = bandit()
    given = (np.ones(4), np.full(3, 0.5), EXPERTS)
    before = found.adjust(*given)
    with pytest.raises(ValueError, match="cannot learn"):
        found.update(np.ones(shape, np.float16), "a", reward, prior, weight=weight)
    after = found.adjust(*given)
    assert np.array_equal(after.quality, before.quality)
    assert np.array_equal(after.uncertainty, before.uncertainty)
    assert found.observations == 0


def test_new_experts_begin_with_the_prediction_and_others_keep_what_was_learnt():
    found = taught(bandit(forgetting=1.0))
    given = (np.array([0.3, -0.2, 0.5, 1.0]), np.full(3, 0.5), EXPERTS)
    before = found.adjust(*given)
    found.include(["b", "d"])
    after = found.adjust(*given)
    np.testing.assert_allclose(after.quality, before.quality)
    np.testing.assert_allclose(after.uncertainty, before.uncertainty)
    assert found.observations == 200
    features = np.ones(4, np.float16)
    assert found.adjust(features, np.array([0.4]), ["d"]).quality == [0.4]
    found.update(features, "d", 1.0, 0.4)
    assert found.adjust(features, np.array([0.4]), ["d"]).quality > 0.6


def test_features_keep_distances_and_are_the_same_everywhere():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 384)) / 384**0.5
    features = np.array([features_of(vector, 64) for vector in vectors], float)
    assert features.shape == (50, 65)
    assert (features[:, -1] == 1).all()
    lengths = np.linalg.norm(features[:, :-1], axis=1) / np.linalg.norm(vectors, axis=1)
    assert abs(lengths.mean() - 1) < 0.05
    # Replicas learn from each other's features: the projection may depend on no version and no
    # machine.
    assert features_of(np.eye(8)[1], 3)[:3].tolist() == pytest.approx(
        [x * 3**-0.5 for x in (-1, -1, 1)], abs=1e-3
    )


def test_few_dimensions_are_kept_as_they_are():
    assert features_of(np.array([0.5, 0.25]), 8).tolist() == [0.5, 0.25, 1.0]


def test_a_thousand_updates_of_nine_experts_take_well_under_a_second():
    found = LinUCB([str(n) for n in range(9)], 33, forgetting=0.998, penalty=1.0)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1000, 33)).astype(np.float16)
    started = time.process_time()
    for number, features in enumerate(inputs):
        found.adjust(features, np.full(9, 0.5), found.experts)
        found.update(features, str(number % 9), 0.5, 0.4)
    assert time.process_time() - started < 1.0
