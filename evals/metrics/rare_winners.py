"""Whether a router finds the few models that can answer a hard prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["recall_at"]

# From this score on an answer counts as right.
RIGHT = 0.5


def recall_at(
    k: int,
    quality: NDArray[np.floating],
    scores: NDArray[np.float64],
    *,
    at_most_winners: int | None = None,
) -> NDArray[np.float64]:
    """Whether one of the k models predicted best is right, on prompts that some model gets right.

    Args:
        k: How many models may try.
        quality: Predicted, shape (n_prompts, n_models).
        scores: Shape (n_prompts, n_models), NaN where a model was not run.
        at_most_winners: Leave out prompts that more models get right; 3 asks for rare winners.

    Returns:
        1 or 0 for each prompt, NaN for those left out, also where none of the k is right but one
        was not run; shape (n_prompts,).
    """
    import numpy as np

    right = np.nan_to_num(scores, nan=-1.0) >= RIGHT
    winners = right.sum(axis=1)
    top = np.argsort(-quality, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(right, top, axis=1).any(axis=1)
    not_run = np.take_along_axis(np.isnan(scores), top, axis=1).any(axis=1)
    counted = (winners > 0) & (found | ~not_run)
    if at_most_winners is not None:
        counted &= winners <= at_most_winners
    return np.asarray(np.where(counted, found.astype(np.float64), np.nan))
