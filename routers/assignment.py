"""Which expert each category gets under budgets of parameters: a small integer programme."""

from __future__ import annotations

from typing import TYPE_CHECKING

from routers.base import RouterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["assign"]


def assign(
    quality: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    total_params_b: NDArray[np.float64] | None = None,
    max_total_params_b: float | None = None,
    active_params_b: NDArray[np.float64] | None = None,
    max_active_params_b: float | None = None,
) -> NDArray[np.intp]:
    """The assignment of best weighted mean quality within the budgets, exactly.

    Args:
        quality: Mean score of each expert in each category, shape (n_categories, n_experts).
        weights: How often each category occurs, in any unit, shape (n_categories,).
        total_params_b: Parameters of each expert in billions, shape (n_experts,).
        max_total_params_b: What all experts that are kept may have together.
        active_params_b: Parameters that an answer uses, in billions, shape (n_experts,).
        max_active_params_b: What an answer may use on average over the categories' shares.

    Returns:
        Position of each category's expert, shape (n_categories,).

    Raises:
        RouterError: No assignment keeps to the budgets.

    References:
        Composition of Experts (arXiv:2412.01868) states the budget of total parameters; the
        programme and the budget of active ones are ours.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    # Shares that sum to more than 1 would exclude the smallest expert from a budget of its size.
    weights = weights / weights.sum()
    n_categories, n_experts = quality.shape
    cells = n_categories * n_experts
    # Variables: z[k, e] (category k goes to expert e) row by row, then y[e] (expert e is kept).
    gains = np.concatenate([(weights[:, None] * quality).ravel(), np.zeros(n_experts)])
    each = np.zeros((n_categories, cells + n_experts))
    for k in range(n_categories):
        each[k, k * n_experts : (k + 1) * n_experts] = 1
    constraints = [LinearConstraint(each, 1, 1)]
    kept = np.zeros((cells, cells + n_experts))
    kept[np.arange(cells), np.arange(cells)] = 1
    kept[np.arange(cells), cells + np.tile(np.arange(n_experts), n_categories)] = -1
    constraints.append(LinearConstraint(kept, -np.inf, 0))
    if max_total_params_b is not None:
        assert total_params_b is not None
        sizes = np.concatenate([np.zeros(cells), total_params_b])
        constraints.append(LinearConstraint(sizes[None], -np.inf, max_total_params_b))
    if max_active_params_b is not None:
        assert active_params_b is not None
        used = np.concatenate([(weights[:, None] * active_params_b).ravel(), np.zeros(n_experts)])
        constraints.append(LinearConstraint(used[None], -np.inf, max_active_params_b))
    found = milp(
        -gains,
        constraints=constraints,
        integrality=np.ones(cells + n_experts),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RouterError(
            "no assignment of experts to categories keeps to the budgets; the smallest expert has "
            + _smallest(total_params_b, active_params_b)
        )
    return np.asarray(found.x[:cells].reshape(n_categories, n_experts).argmax(axis=1), np.intp)


def _smallest(total: NDArray[np.float64] | None, active: NDArray[np.float64] | None) -> str:
    parts = [
        f"{sizes.min():g} B {what} parameters"
        for sizes, what in ((total, "total"), (active, "active"))
        if sizes is not None
    ]
    return " and ".join(parts)
