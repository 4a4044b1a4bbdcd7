"""Whether predicted probabilities are right on average, and whether they tell two kinds apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evals.metrics.estimates import UNKNOWN, Estimate, Resamples
from routers.category_classifier import equal_mass_bins, expected_calibration_error

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["auroc", "calibration_error", "reliability"]

BINS = 15


def calibration_error(
    quality: NDArray[np.floating], scores: NDArray[np.float64], resamples: Resamples
) -> Estimate:
    """Expected calibration error of each model's predicted quality, averaged over models.

    The samples behind the interval keep the bins of all prompts.

    Args:
        quality: Predicted, shape (n_prompts, n_models).
        scores: Shape (n_prompts, n_models), NaN for missing cells, which are left out.
        resamples: Of the prompts.

    Returns:
        In [0, 1]; unknown without any score.
    """
    import numpy as np

    errors, drawn = [], []
    for predicted, got in zip(quality.T, scores.T, strict=True):
        present = np.flatnonzero(~np.isnan(got))
        if not len(present):
            continue
        probabilities = predicted[present].astype(np.float64)
        errors.append(expected_calibration_error(probabilities, got[present]))
        bins = equal_mass_bins(probabilities, BINS)
        # A column for each bin with its prompts' gaps, and one to count prompts.
        columns = np.zeros((len(got), len(bins) + 1))
        columns[present, -1] = 1.0
        for number, inside in enumerate(bins):
            columns[present[inside], number] = probabilities[inside] - got[present[inside]]
        totals = resamples.totals(columns)
        drawn.append(np.abs(totals[:, :-1]).sum(axis=1) / np.maximum(totals[:, -1], 1.0))
    if not errors:
        return UNKNOWN
    return resamples.estimate(float(np.mean(errors)), np.mean(drawn, axis=0), len(scores))


def reliability(
    quality: NDArray[np.floating], scores: NDArray[np.float64], *, bins: int = BINS
) -> list[tuple[float, float, int]]:
    """Mean predicted quality, mean score and number of cells in bins of equal mass.

    Cells of equal quality share a bin, so there may be fewer.

    Args:
        quality: Predicted, shape (n_prompts, n_models).
        scores: Same shape, NaN for missing cells, which are left out.
        bins: Number of bins over all cells together.
    """
    import numpy as np

    present = ~np.isnan(scores)
    predicted, got = quality[present].astype(np.float64), scores[present]
    return [
        (float(predicted[part].mean()), float(got[part].mean()), len(part))
        for part in equal_mass_bins(predicted, bins)
    ]


def auroc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive has a higher score than a negative; ties count half.

    NaN if there are only positives or only negatives.
    """
    import numpy as np
    from scipy.stats import rankdata

    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    ranks = rankdata(np.asarray(scores, np.float64))
    above = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(above / (n_positive * n_negative))
