"""The integer programme against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from routers.assignment import assign
from routers.base import RouterError


def _brute_force(quality, weights, total, max_total, active, max_active):
    best = -1.0
    for choice in product(range(quality.shape[1]), repeat=len(quality)):
        columns = list(choice)
        if max_total is not None and total[sorted(set(columns))].sum() > max_total + 1e-9:
            continue
        if max_active is not None and weights @ active[columns] > max_active + 1e-9:
            continue
        best = max(best, float(weights @ quality[np.arange(len(quality)), columns]))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budgets", [(None, None), (40.0, None), (None, 9.0), (50.0, 12.0)])
def test_optimum_equals_brute_force(seed, budgets):
    rng = np.random.default_rng(seed)
    quality, weights = rng.random((4, 5)), rng.dirichlet(np.ones(4))
    total = rng.choice([4.0, 7.0, 13.0, 34.0, 70.0], 5)
    total[0] = 4.0  # so that some assignment is possible
    active = total * rng.choice([0.25, 1.0], 5)
    max_total, max_active = budgets
    found = assign(
        quality,
        weights,
        total_params_b=total,
        max_total_params_b=max_total,
        active_params_b=active,
        max_active_params_b=max_active,
    )
    reached = float(weights @ quality[np.arange(4), found])
    wanted = _brute_force(quality, weights, total, max_total, active, max_active)
    assert reached == pytest.approx(wanted, abs=1e-9)
    if max_total is not None:
        assert total[np.unique(found)].sum() <= max_total + 1e-6
    if max_active is not None:
        assert weights @ active[found] <= max_active + 1e-6


def test_impossible_budgets_are_refused_with_the_least_possible():
    with pytest.raises(RouterError, match="smallest expert has 7 B total parameters"):
        assign(
            np.ones((2, 2)),
            np.array([0.5, 0.5]),
            total_params_b=np.array([7.0, 13.0]),
            max_total_params_b=3.0,
        )


def test_a_budget_of_the_smallest_experts_size_can_be_kept_to():
    found = assign(
        np.array([[0.5, 0.9], [0.5, 0.9]]),
        np.array([1.0, 1e-6]),
        active_params_b=np.array([3.8, 7.0]),
        max_active_params_b=3.8,
    )
    assert found.tolist() == [0, 0]
