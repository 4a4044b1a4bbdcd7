"""What choices lose against the best possible ones, cost included."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["regret"]


def regret(
    scores: NDArray[np.float64],
    costs: NDArray[np.float64],
    choice: NDArray[np.intp],
    *,
    price: float = 0.0,
) -> NDArray[np.float64]:
    """Utility lost on each prompt; utility is score less price times cost.

    Args:
        scores: Shape (n_prompts, n_models), NaN where a model was not run.
        costs: Same shape; a NaN makes the cell unusable if the price is not 0.
        choice: Position of the chosen model, shape (n_prompts,).
        price: Score that one unit of cost is worth.

    Returns:
        Shape (n_prompts,), none negative; NaN where the chosen model was not run.
    """
    import numpy as np

    utility = scores - price * costs if price else scores
    best = np.where(np.isnan(utility), -np.inf, utility).max(axis=1)
    got = utility[np.arange(len(utility)), choice]
    return np.asarray(np.where(np.isnan(got), np.nan, best - got))
