"""What choices score, and the choices that every router is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from routers.training import overall_means

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["best_single_choice", "chosen", "gap_closed", "oracle_scores", "random_scores"]


def chosen(cells: NDArray[np.float64], choice: NDArray[np.intp]) -> NDArray[np.float64]:
    """The cell of each prompt's chosen model, shape (n_prompts,)."""
    import numpy as np

    picked: NDArray[np.float64] = cells[np.arange(len(cells)), choice]
    return picked


def best_single_choice(scores: NDArray[np.float64], categories: Sequence[str] | None = None) -> int:
    """The model with the best mean over its scores; ties go to the earlier.

    Args:
        scores: Shape (n_prompts, n_models), NaN for missing cells.
        categories: True category of each prompt. Where cells are missing, means are over
            categories (``routers.training.overall_means``); without, over the cells that exist.
    """
    import numpy as np

    scored = ~np.isnan(scores).all(axis=0)
    return int(np.where(scored, overall_means(scores, categories), -1.0).argmax())


def random_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a uniformly random choice scores on each prompt in expectation; NaN without scores."""
    import numpy as np

    present = ~np.isnan(scores)
    counts = present.sum(axis=1)
    means = np.where(present, scores, 0.0).sum(axis=1) / np.maximum(counts, 1)
    return np.where(counts > 0, means, np.nan)


def oracle_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best score on each prompt: what no router can exceed; NaN without scores."""
    import numpy as np

    best = np.where(np.isnan(scores), -1.0, scores).max(axis=1)
    return np.where(best < 0, np.nan, best)


def gap_closed(score: float, low: float, high: float) -> float:
    """Share of the way from ``low`` to ``high``; NaN where there is no gap to close.

    Examples:
        >>> gap_closed(0.75, 0.5, 1.0)
        0.5
    """
    return (score - low) / (high - low) if high > low else float("nan")
