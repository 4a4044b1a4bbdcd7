"""What choices lose against the best possible ones, cost included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.policies import relative_costs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["regret"]


def regret(
    scores: NDArray[np.float64],
    costs: NDArray[np.float64],
    choice: NDArray[np.intp],
    *,
    cost_quality: float = 1.0,
) -> NDArray[np.float64]:
    """Utility lost on each prompt, with true scores and costs in the place of predicted ones.

    Utility is that of the policy ``utility``: the knob times the score, less the rest of it times
    the share of the dearest model's cost. Further charges of a policy, as for a budget, are no loss
    to anybody and do not count.

    Args:
        scores: Shape (n_prompts, n_models), NaN where a model was not run.
        costs: Same shape; a NaN makes the cell unusable if the knob is below 1.
        choice: Position of the chosen model, shape (n_prompts,).
        cost_quality: The knob; 1 counts scores only.

    Returns:
        Shape (n_prompts,), none negative; NaN where nothing is known of the chosen model.
    """
    import numpy as np

    utility = scores
    if cost_quality < 1:
        share = relative_costs(np.nan_to_num(costs)) + 0.0 * costs
        utility = cost_quality * scores - (1 - cost_quality) * share
    best = np.where(np.isnan(utility), -np.inf, utility).max(axis=1)
    got = utility[np.arange(len(utility)), choice]
    return np.asarray(np.where(np.isnan(got), np.nan, best - got))
