"""Vectors to calibrated category probabilities: multinomial logistic regression.

scikit-learn fits it, numpy alone serves it. Knows nothing of models, scores or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from routers.base import RouterError
from routers.calibration import best_temperature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CategoryClassifier", "expected_calibration_error", "fit_classifier", "out_of_fold"]

# What a class gets that was absent from the training rows: as good as impossible, but finite.
ABSENT_LOGIT = -30.0


@dataclass(frozen=True, slots=True)
class CategoryClassifier:
    """A linear classifier with a temperature, and one centroid per category.

    Attributes:
        categories: Their names.
        weights: Shape (n_categories, width).
        biases: Shape (n_categories,).
        centroids: Mean vectors scaled to length 1, shape (n_categories, width).
        temperature: Logits are divided by it; above 1 the raw probabilities were too sure.
    """

    categories: list[str]
    weights: NDArray[np.float64]
    biases: NDArray[np.float64]
    centroids: NDArray[np.float64]
    temperature: float = 1.0

    def logits(self, vector: NDArray[np.float32]) -> NDArray[np.float64]:
        """Before temperature, shape (n_categories,)."""
        # Products summed per row, not a matrix product: BLAS picks its kernel, hence the order of
        # additions, by the shape of the batch.
        products: NDArray[np.float64] = (self.weights * vector).sum(axis=1)
        return products + self.biases

    def probabilities(self, vector: NDArray[np.float32]) -> NDArray[np.float64]:
        """Calibrated, shape (n_categories,), sum 1."""
        return softmax(self.logits(vector) / self.temperature)

    def distance(self, vector: NDArray[np.float32]) -> float:
        """Cosine distance to the nearest centroid, in [0, 2]."""
        return 1.0 - float((self.centroids * vector).sum(axis=1).max())

    def calibrated(
        self, logits: NDArray[np.float64], labels: NDArray[np.intp]
    ) -> CategoryClassifier:
        """The same classifier with the temperature of least log-loss on held-out rows.

        Args:
            logits: Raw logits of held-out rows, shape (n_rows, n_categories).
            labels: Their true categories, as positions.

        References:
            Guo et al., "On Calibration of Modern Neural Networks" (arXiv:1706.04599), section 4.2.
            Departs from it in searching a grid, which gives the same number everywhere, and in
            Platt's smoothed targets ("Probabilistic Outputs for Support Vector Machines", 1999):
            without them, held-out rows without any error would make every probability 1.
        """
        if not len(labels) or len(self.categories) < 2:
            return self
        temperature = best_temperature(lambda t: log_loss(logits / t, labels))
        return replace(self, temperature=temperature)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities along the last axis."""
    import numpy as np

    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def log_loss(logits: NDArray[np.float64], labels: NDArray[np.intp]) -> float:
    """Mean cross-entropy; the true category's target is (n + 1) / (n + 2)."""
    import numpy as np

    logs = np.log(np.maximum(softmax(logits), 1e-12))
    true = logs[np.arange(len(labels)), labels]
    others = (logs.sum(axis=1) - true) / (logits.shape[1] - 1)
    rest = 1 / (len(labels) + 2)
    return float(-((1 - rest) * true + rest * others).mean())


def fit_classifier(
    vectors: NDArray[np.float32],
    labels: NDArray[np.intp],
    categories: Sequence[str],
    *,
    C: float,
) -> CategoryClassifier:
    """Fit on unit vectors.

    Args:
        vectors: Shape (n_rows, width).
        labels: Positions in ``categories``, shape (n_rows,).
        categories: All categories; those without rows get ``ABSENT_LOGIT``.
        C: Inverse strength of the L2 penalty.
    """
    import numpy as np

    width = vectors.shape[1]
    weights = np.zeros((len(categories), width))
    biases = np.full(len(categories), ABSENT_LOGIT)
    centroids = np.zeros((len(categories), width))
    present = np.unique(labels)
    biases[present] = 0.0
    if len(present) > 1:
        model = _sklearn_fit(vectors, labels, C)
        two = len(present) == 2
        # For two classes scikit-learn keeps the second one's logit only.
        weights[present[1:] if two else present] = model.coef_
        biases[present[1:] if two else present] = model.intercept_
    for label in present:
        mean = vectors[labels == label].astype(np.float64).mean(axis=0)
        centroids[label] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return CategoryClassifier(list(categories), weights, biases, centroids)


def _sklearn_fit(vectors: NDArray[np.float32], labels: NDArray[np.intp], C: float) -> Any:
    import numpy as np

    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as exc:
        raise RouterError(
            "training this router needs scikit-learn: pip install 'collegium[routers]'"
        ) from exc
    return LogisticRegression(C=C, max_iter=5000).fit(vectors.astype(np.float64), labels)


def out_of_fold(
    vectors: NDArray[np.float32],
    labels: NDArray[np.intp],
    categories: Sequence[str],
    *,
    C: float,
    folds: int,
    random_state: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits and distances of each row from classifiers that have not seen it.

    Returns:
        Shapes (n_rows, n_categories) and (n_rows,).
    """
    import numpy as np

    logits = np.zeros((len(labels), len(categories)))
    distances = np.zeros(len(labels))
    fold_of = _stratified_folds(labels, folds, random_state)
    for fold in np.unique(fold_of):
        inside = fold_of == fold
        if inside.all():
            inside = ~inside
        model = fit_classifier(vectors[~inside], labels[~inside], categories, C=C)
        for row in np.flatnonzero(inside):
            logits[row] = model.logits(vectors[row])
            distances[row] = model.distance(vectors[row])
    return logits, distances


def _stratified_folds(labels: NDArray[np.intp], folds: int, random_state: int) -> NDArray[np.intp]:
    import numpy as np

    rng = np.random.default_rng(random_state)
    fold_of = np.zeros(len(labels), np.intp)
    start = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # Going on where the last category stopped spreads small categories over the folds.
        fold_of[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return fold_of


def expected_calibration_error(
    confidence: NDArray[np.float64],
    correct: NDArray[np.bool_] | NDArray[np.float64],
    *,
    bins: int = 15,
) -> float:
    """Mean gap between confidence and accuracy (or mean score) over bins of equal mass."""
    import numpy as np

    order = np.argsort(confidence, kind="stable")
    gaps = [
        abs(float(confidence[part].mean()) - float(correct[part].mean())) * len(part)
        for part in np.array_split(order, bins)
        if len(part)
    ]
    return sum(gaps) / max(len(confidence), 1)
