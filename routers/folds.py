"""Folds for cross-validation within training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["stratified_folds"]


def stratified_folds(labels: NDArray[np.intp], folds: int, random_state: int) -> NDArray[np.intp]:
    """The fold of each row, such that each label is spread evenly, rare ones too.

    Unlike scikit-learn's, it takes labels with fewer rows than folds.

    Args:
        labels: Shape (n_rows,).
        folds: How many.
        random_state: Seed of the order.
    """
    import numpy as np

    rng = np.random.default_rng(random_state)
    fold_of = np.zeros(len(labels), np.intp)
    start = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # Going on where the last label stopped spreads rare ones over the folds.
        fold_of[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return fold_of
