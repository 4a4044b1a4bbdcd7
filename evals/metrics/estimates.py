"""Means and differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Estimate", "bootstrap_mean", "macro_mean", "paired_difference"]

RESAMPLES = 2000
CONFIDENCE = 0.95
# With so many values the mean is as good as normal, and resampling them would take minutes.
NORMAL_FROM = 5000
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

    From ``NORMAL_FROM`` values on the interval is that of the normal distribution.

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
    if len(present) >= NORMAL_FROM:
        error = float(present.std(ddof=1)) / len(present) ** 0.5
        return _normal(float(present.mean()), error, confidence, len(present))
    means = _resampled_means(present, resamples, np.random.default_rng(seed))
    return _estimate(float(present.mean()), means, confidence, len(present))


def _normal(mean: float, error: float, confidence: float, n: int) -> Estimate:
    width = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Estimate(mean, mean - width, mean + width, n)


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
    if sum(map(len, parts)) >= NORMAL_FROM:
        errors = [part.var(ddof=1) / len(part) if len(part) > 1 else 0.0 for part in parts]
        error = float(np.sum(errors)) ** 0.5 / len(parts)
        mean = float(np.mean([part.mean() for part in parts]))
        return _normal(mean, error, confidence, sum(map(len, parts)))
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(part, resamples, rng) for part in parts], axis=0)
    mean = float(np.mean([part.mean() for part in parts]))
    return _estimate(mean, means, confidence, sum(map(len, parts)))


def paired_difference(
    values: NDArray[np.float64], reference: NDArray[np.float64], *, seed: int = 0
) -> Estimate:
    """Mean of ``values - reference`` over the prompts that have both."""
    return bootstrap_mean(values - reference, seed=seed)
