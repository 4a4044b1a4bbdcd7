"""Means and differences with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "UNKNOWN",
    "Estimate",
    "Resamples",
    "bootstrap_mean",
    "macro_mean",
    "paired_difference",
]

RESAMPLES = 2000
CONFIDENCE = 0.95
# With so many values the mean is as good as normal, and resampling them would take minutes.
NORMAL_FROM = 5000
# Of figures that are more than a mean and take longer; fewer where only their spread is needed.
FIGURE_RESAMPLES = 500
SPREAD_RESAMPLES = 100
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


UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"), 0)


class Resamples:
    """Bootstrap samples of prompts for figures that are no mean of one number per prompt.

    All figures of an evaluation share the samples, so what they are made of stays paired. From
    ``NORMAL_FROM`` prompts on intervals are those of the normal distribution, as for means.

    Args:
        n_prompts: How many there are.
        seed: Seed of the samples.
    """

    def __init__(self, n_prompts: int, *, seed: int = 0) -> None:
        import numpy as np

        rng = np.random.default_rng(seed)
        self._normal = n_prompts >= NORMAL_FROM
        resamples = SPREAD_RESAMPLES if self._normal else FIGURE_RESAMPLES
        self.counts = np.array(
            [
                np.bincount(rng.integers(0, n_prompts, n_prompts), minlength=n_prompts)
                for _ in range(resamples)
            ],
            np.uint8,
        )
        """How often each sample has each prompt, shape (resamples, n_prompts)."""

    def totals(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over each sample.

        Args:
            values: Shape (n_prompts, n_columns), without gaps.

        Returns:
            Shape (resamples, n_columns).
        """
        import numpy as np

        step = max(1, CHUNK_CELLS // max(len(values), 1))
        starts = range(0, len(self.counts), step)
        return np.concatenate([self.counts[start : start + step] @ values for start in starts])

    def means(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means over each sample, NaN left out; NaN where a sample has nothing to average.

        Args:
            values: Shape (n_prompts, n_columns).

        Returns:
            Shape (resamples, n_columns).
        """
        import numpy as np

        present = ~np.isnan(values)
        known = self.totals(present.astype(np.float64))
        sums = self.totals(np.where(present, values, 0.0))
        return np.asarray(sums / np.where(known > 0, known, np.nan))

    def estimate(
        self, value: float, draws: Sequence[float] | NDArray[np.float64], n: int
    ) -> Estimate:
        """A figure with the interval of what it is in the samples.

        Args:
            value: The figure of all prompts.
            draws: The figure of each sample; samples without one (NaN) do not count.
            n: Number of prompts it is made of.
        """
        import numpy as np

        known = np.asarray(draws, np.float64)
        known = known[~np.isnan(known)]
        if not len(known) or np.isnan(value):
            return UNKNOWN
        if self._normal:
            return _normal(value, float(known.std()), CONFIDENCE, n)
        return _estimate(value, known, CONFIDENCE, n)


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
        return UNKNOWN
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
        return UNKNOWN
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
