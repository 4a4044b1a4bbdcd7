from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.types import ExpertCard
from orchestrator.policies import (
    UtilityPolicy,
    expected_cost_usd,
    order_by_utility,
    relative_costs,
)

QUALITY = [0.5, 0.7, 0.9]
COST = [0.02, 0.2, 1.0]


def test_quality_alone_decides_at_one():
    assert UtilityPolicy(1.0).choose(QUALITY, COST) == [2, 1, 0]


def test_cost_alone_decides_at_zero():
    assert UtilityPolicy(0.0).choose(QUALITY, COST) == [0, 1, 2]


def test_the_middle_weighs_both():
    utilities = UtilityPolicy(0.75).utilities(QUALITY, COST)
    assert utilities == pytest.approx([0.37, 0.475, 0.425])
    assert UtilityPolicy(0.75).choose(QUALITY, COST) == [1, 2, 0]


def test_ties_go_to_the_cheaper_then_to_the_earlier_candidate():
    assert order_by_utility([0.5, 0.5, 0.5], [1.0, 0.2, 0.2]) == [1, 2, 0]


def test_lists_of_different_lengths_are_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        UtilityPolicy().choose([0.5], COST)


def test_expected_cost_counts_prompt_and_answer():
    card = ExpertCard(name="a", input_usd_per_mtok=2, output_usd_per_mtok=8)
    assert expected_cost_usd(card, 1000, 500) == pytest.approx(0.006)


def test_the_dearest_candidate_has_cost_one():
    cards = [ExpertCard(name=name) for name in "ab"]
    assert relative_costs(cards, [0.001, 0.004]) == [0.25, 1.0]


def test_active_parameters_stand_in_for_missing_prices():
    cards = [
        ExpertCard(name="a", total_params_b=8),
        ExpertCard(name="b", total_params_b=30, active_params_b=2),
    ]
    assert relative_costs(cards, [0, 0]) == [1.0, 0.25]


def test_without_prices_and_parameters_all_cost_nothing():
    assert relative_costs([ExpertCard(name="a")], [0.0]) == [0.0]
    assert relative_costs([], []) == []


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_the_order_is_a_permutation_with_falling_utility(pairs, knob):
    quality, cost = zip(*pairs, strict=True)
    policy = UtilityPolicy(knob)
    order, utilities = policy.choose(quality, cost), policy.utilities(quality, cost)
    assert sorted(order) == list(range(len(pairs)))
    assert [utilities[j] for j in order] == sorted(utilities, reverse=True)


@pytest.mark.parametrize("knob", [0.0, 0.3, 0.5, 0.95, 1.0])
def test_many_requests_at_once_are_decided_like_one_by_one(knob):
    rng = np.random.default_rng(0)
    # Few different values, so that there are ties.
    quality = (rng.integers(0, 4, (300, 5)) / 3).astype(np.float32)
    costs = rng.integers(0, 3, (300, 5)) / 2
    policy = UtilityPolicy(knob)
    wanted = [policy.choose(q.tolist(), c.tolist())[0] for q, c in zip(quality, costs, strict=True)]
    assert policy.choose_all(quality, costs).tolist() == wanted
