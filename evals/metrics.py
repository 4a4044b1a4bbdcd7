"""Numbers with intervals: means, differences, oracles. Pure functions of arrays.

Scores are matrices of shape (n_prompts, n_models) with NaN where a model was not run on a prompt.
A choice is a vector of model positions, one per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Estimate",
    "best_single_choice",
    "bootstrap_mean",
    "chosen",
    "gap_closed",
    "macro_mean",
    "oracle_scores",
    "paired_difference",
    "random_scores",
]

RESAMPLES = 2000
CONFIDENCE = 0.95
# Indices drawn at a time; bounds memory at about 32 MB.
CHUNK_CELLS = 4_000_000


class Estimate(NamedTuple):
    """A mean with its interval.

    Attributes:
        mean: The estimate; NaN if there is nothing to average.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of values averaged.
    """

    mean: float
    low: float
    high: float
    n: int


def bootstrap_mean(
    values: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Mean of the values that are not NaN, with a percentile bootstrap interval.

    Args:
        values: Shape (n_prompts,).
        resamples: Number of bootstrap samples.
        confidence: Share of such intervals that hold the true mean.
        seed: Seed of the samples.

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife" (Annals of Statistics 7, 1979).
    """
    import numpy as np

    present = values[~np.isnan(values)]
    if not len(present):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    means = _resampled_means(present, resamples, np.random.default_rng(seed))
    return _estimate(float(present.mean()), means, confidence, len(present))


def _resampled_means(
    values: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    import numpy as np

    step = max(1, CHUNK_CELLS // len(values))
    parts = []
    for start in range(0, resamples, step):
        size = (min(step, resamples - start), len(values))
        parts.append(values[rng.integers(0, len(values), size)].mean(axis=1))
    return np.concatenate(parts)


def _estimate(mean: float, means: NDArray[np.float64], confidence: float, n: int) -> Estimate:
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), n)


def macro_mean(
    values: NDArray[np.float64],
    categories: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Mean of the category means; prompts are resampled within their category."""
    import numpy as np

    labels = np.array(categories)
    parts = []
    for name in sorted(set(categories)):
        inside = values[labels == name]
        if not np.isnan(inside).all():
            parts.append(inside[~np.isnan(inside)])
    if not parts:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(part, resamples, rng) for part in parts], axis=0)
    mean = float(np.mean([part.mean() for part in parts]))
    return _estimate(mean, means, confidence, sum(map(len, parts)))


def paired_difference(
    values: NDArray[np.float64], reference: NDArray[np.float64], *, seed: int = 0
) -> Estimate:
    """Mean of ``values - reference`` over the prompts that have both."""
    return bootstrap_mean(values - reference, seed=seed)


def chosen(cells: NDArray[np.float64], choice: NDArray[np.intp]) -> NDArray[np.float64]:
    """The cell of each prompt's chosen model, shape (n_prompts,)."""
    import numpy as np

    picked: NDArray[np.float64] = cells[np.arange(len(cells)), choice]
    return picked


def best_single_choice(scores: NDArray[np.float64]) -> int:
    """The model with the best mean over its scores; ties go to the earlier."""
    import numpy as np

    present = ~np.isnan(scores)
    counts = present.sum(axis=0)
    means = np.where(present, scores, 0.0).sum(axis=0) / np.maximum(counts, 1)
    return int(np.where(counts > 0, means, -1.0).argmax())


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
