"""From what ranks models to what tells how often they are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["best_temperature", "fit_platt", "sigmoid"]


def sigmoid(logits: NDArray[np.floating]) -> NDArray[np.floating]:
    """Probabilities; large logits of either sign are safe."""
    import numpy as np

    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))


def best_temperature(loss: Callable[[float], float]) -> float:
    """The temperature of least loss on a grid, which gives the same number everywhere."""
    import numpy as np

    grid = np.geomspace(0.01, 20.0, 321)
    return float(grid[int(np.argmin([loss(float(t)) for t in grid]))])


def fit_platt(
    rankings: NDArray[np.floating], scores: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Slope and biases of least log-loss: quality = sigmoid(slope * ranking + bias[model]).

    The slope is common to all models and never negative; a weak penalty keeps both finite where
    the ranking separates all rows.

    Args:
        rankings: What a method ranks models by, shape (n_prompts, n_models).
        scores: In [0, 1], NaN for missing cells, same shape.

    Returns:
        The slope, and biases of shape (n_models,).

    References:
        Platt, "Probabilistic Outputs for Support Vector Machines" (1999).
    """
    import numpy as np
    from scipy.optimize import minimize

    present = ~np.isnan(scores)
    filled = np.where(present, scores, 0.0)
    count = present.sum()

    def objective(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope, biases = values[0], values[1:]
        logits = slope * rankings + biases
        losses = np.logaddexp(0.0, logits) - filled * logits
        excess = (sigmoid(logits) - filled) * present / count
        loss = float(losses[present].sum() / count + 1e-5 * (values**2).sum())
        slopes = np.array([(excess * rankings).sum(), *excess.sum(axis=0)])
        return loss, slopes + 2e-5 * values

    start = np.zeros(1 + scores.shape[1])
    bounds = [(0.0, None)] + [(None, None)] * scores.shape[1]
    found = minimize(objective, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return float(found.x[0]), found.x[1:]
