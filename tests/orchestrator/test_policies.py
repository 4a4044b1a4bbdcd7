from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from experts.types import ExpertCard
from orchestrator.costs import ExpectedCosts, cost_unit
from orchestrator.policies import (
    BudgetPolicy,
    Policy,
    PolicyConfig,
    ThresholdPolicy,
    TopPPolicy,
    UtilityPolicy,
    order_by_utility,
    relative_costs,
)
from routers.base import Measured

NAMES = ["small", "middle", "large"]
QUALITY = np.array([[0.5, 0.7, 0.9]])
COST = np.array([[0.02, 0.2, 1.0]])

POLICIES: list[Policy] = [
    UtilityPolicy(),
    UtilityPolicy(null_expert="small", null_margin=0.1),
    BudgetPolicy(type="budget", price=0.3),
    ThresholdPolicy(type="threshold", weak="small", strong="large", threshold=-0.1),
    TopPPolicy(type="top_p", confidence=0.8),
]


def _order(policy: Policy, knob: float, quality=QUALITY, costs=COST) -> list[int]:
    utilities = policy.utilities(NAMES, quality, costs, cost_quality=knob)[0]
    return order_by_utility(utilities.tolist(), costs[0].tolist())


def test_quality_alone_decides_at_one():
    assert _order(UtilityPolicy(), 1.0) == [2, 1, 0]


def test_cost_alone_decides_at_zero():
    assert _order(UtilityPolicy(), 0.0) == [0, 1, 2]


def test_the_middle_weighs_both():
    utilities = UtilityPolicy(cost_quality=0.75).utilities(NAMES, QUALITY, COST)
    assert utilities[0] == pytest.approx([0.37, 0.475, 0.425])
    assert _order(UtilityPolicy(), 0.75) == [1, 2, 0]


def test_ties_go_to_the_cheaper_then_to_the_earlier_candidate():
    assert order_by_utility([0.5, 0.5, 0.5], [1.0, 0.2, 0.2]) == [1, 2, 0]


def test_a_price_makes_experts_earn_their_cost():
    # Large is better than middle by 0.2 for 0.8 more, middle than small by 0.2 for 0.18 more.
    assert _order(BudgetPolicy(type="budget", price=0.0), 1.0)[0] == 2
    assert _order(BudgetPolicy(type="budget", price=0.5), 1.0)[0] == 1
    assert _order(BudgetPolicy(type="budget", price=2.0), 1.0)[0] == 0


def test_the_strong_expert_answers_above_the_threshold_only():
    two = ["small", "large"]
    for threshold, wanted in ((0.39, "large"), (0.41, "small")):
        policy = ThresholdPolicy(
            type="threshold", weak="small", strong="large", threshold=threshold
        )
        choice = policy.choices(two, QUALITY[:, [0, 2]], COST[:, [0, 2]])
        assert two[choice[0]] == wanted
    cards = [ExpertCard(name=name) for name in NAMES]
    assert set(policy.excluded(cards, {})) == {"middle"}


def test_the_null_expert_answers_unless_another_is_better_by_the_margin():
    assert _order(UtilityPolicy(null_expert="middle", null_margin=0.19), 1.0)[0] == 2
    assert _order(UtilityPolicy(null_expert="middle", null_margin=0.21), 1.0)[0] == 1


@pytest.mark.parametrize(
    ("quality", "width"),
    [([0.95, 0.5], 1), ([0.7, 0.7, 0.1], 2), ([0.1, 0.1, 0.1, 0.1], 3), ([0.2], 1)],
)
def test_top_p_takes_experts_until_one_of_them_is_surely_right(quality, width):
    assert TopPPolicy(type="top_p", confidence=0.9, max_experts=3).width(quality) == width


def test_experts_beyond_a_ceiling_are_left_out_with_the_reason():
    cards = [ExpertCard(name="a", latency_s=2.0, energy_j=5.0), ExpertCard(name="b", energy_j=50)]
    measured = {"b": Measured(latency_s=0.5)}
    assert UtilityPolicy(max_latency_s=1).excluded(cards, measured) == {
        "a": "an answer typically takes 2 s, more than 1"
    }
    assert set(UtilityPolicy(max_energy_j=20).excluded(cards, {})) == {"b"}
    with pytest.raises(ValueError, match=r"max_latency_s needs 'latency_s' of every expert.*'b'"):
        UtilityPolicy(max_latency_s=1).excluded(cards, {})


def test_a_policy_without_its_number_says_how_to_find_it():
    policy = BudgetPolicy(type="budget", max_mean_cost=1.0)
    assert policy.uncalibrated == "price"
    with pytest.raises(ValueError, match="collegium calibrate"):
        policy.choices(NAMES, QUALITY, COST)


def test_two_experts_must_be_two():
    with pytest.raises(ValidationError, match="name two experts"):
        ThresholdPolicy(type="threshold", weak="a", strong="a")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.type)
def test_a_policy_survives_its_own_dump(policy):
    adapter = TypeAdapter(PolicyConfig)
    assert adapter.validate_python(policy.model_dump()) == policy


def test_expected_cost_counts_prompt_and_answer():
    cards = [ExpertCard(name="a", input_usd_per_mtok=2, output_usd_per_mtok=8)]
    assert ExpectedCosts.of(cards).usd([1000], token_limit=100)[0, 0] == pytest.approx(0.0028)
    measured = {"a": Measured(output_tokens=50)}
    assert ExpectedCosts.of(cards, measured).usd([1000])[0, 0] == pytest.approx(0.0024)
    unpriced = [ExpertCard(name="b")]
    assert ExpectedCosts.of(unpriced, {"b": Measured(cost_usd=0.5)}).usd([1000])[0, 0] == 0.5


def test_the_dearest_candidate_has_cost_one():
    assert relative_costs(np.array([[0.001, 0.004], [0.0, 0.0]])).tolist() == [[0.25, 1], [0, 0]]


def test_active_parameters_then_latency_stand_in_for_missing_prices():
    cards = [
        ExpertCard(name="a", total_params_b=8),
        ExpertCard(name="b", total_params_b=30, active_params_b=2, latency_s=3),
    ]
    nothing = np.zeros((1, 2))
    assert cost_unit(None, cards, {}) == "active_params_b"
    assert ExpectedCosts.of(cards, {}, "active_params_b").in_unit(nothing)[0].tolist() == [8.0, 2.0]
    assert cost_unit("latency_s", cards, {}) == "latency_s"
    assert ExpectedCosts.of(cards, {}, "latency_s").in_unit(nothing)[0].tolist() == [0.0, 3.0]
    assert cost_unit(None, cards, {"a": Measured(cost_usd=0.1)}) == "usd"
    assert ExpectedCosts.of(cards, {}, "usd").in_unit(nothing + 1)[0].tolist() == [1.0, 1.0]
    unknown, measured = [ExpertCard(name="c"), ExpertCard(name="d")], {"d": Measured(latency_s=2)}
    assert cost_unit(None, unknown, measured) == "latency_s"
    assert ExpectedCosts.of(unknown, measured, "latency_s").in_unit(nothing)[0].tolist() == [
        0.0,
        2.0,
    ]


def test_a_budget_refuses_experts_of_unknown_cost():
    cards = [ExpertCard(name="a", active_params_b=8), ExpertCard(name="b")]
    policy = BudgetPolicy(type="budget", cost="active_params_b", price=0.1)
    with pytest.raises(ValueError, match="nobody knows it of 'b'"):
        policy.excluded(cards, {})
    assert policy.excluded(cards[:1], {}) == {}


def test_a_null_expert_beside_the_two_is_refused():
    with pytest.raises(ValidationError, match="chooses between those two"):
        ThresholdPolicy(type="threshold", weak="a", strong="b", null_expert="c")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.type)
@given(
    qualities=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    costs=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    knobs=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_a_higher_knob_never_takes_a_cheaper_expert(policy, qualities, costs, knobs):
    names = ["small", "large"] if isinstance(policy, ThresholdPolicy) else NAMES
    quality = np.array([qualities[: len(names)]])
    cost = np.array([sorted(costs)[: len(names)]])
    low, high = sorted(knobs)
    cheaper, dearer = (
        policy.choices(names, quality, cost, cost_quality=knob)[0] for knob in (low, high)
    )
    assert cost[0, cheaper] <= cost[0, dearer] + 1e-9


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.type)
@pytest.mark.parametrize("knob", [0.0, 0.3, 0.95, 1.0])
def test_many_requests_at_once_are_decided_like_one_by_one(policy, knob):
    rng = np.random.default_rng(0)
    # Few different values, so that there are ties.
    quality = (rng.integers(0, 4, (300, 3)) / 3).astype(np.float32)
    costs = rng.integers(0, 3, (300, 3)) / 2
    together = policy.choices(NAMES, quality, costs, cost_quality=knob)
    for row, choice in enumerate(together):
        q, c = quality[row : row + 1], costs[row : row + 1]
        assert policy.choices(NAMES, q, c, cost_quality=knob)[0] == choice
        utilities = policy.utilities(NAMES, q, c, cost_quality=knob)[0]
        assert order_by_utility(utilities.tolist(), c[0].tolist())[0] == choice


def test_of_equally_cheap_experts_the_better_one_is_taken():
    quality = np.array([[0.1, 0.9, 0.95]])
    for costs in ([[0.0, 0.0, 0.0]], [[2.0, 2.0, 2.0]]):
        choice = UtilityPolicy().choices(NAMES, quality, np.array(costs), cost_quality=0.0)
        assert choice.tolist() == [2]
    choice = UtilityPolicy().choices(NAMES, quality, np.array([[2.0, 2.0, 3.0]]), cost_quality=0.0)
    assert choice.tolist() == [1]
