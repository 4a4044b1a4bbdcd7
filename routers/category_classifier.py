"""Texts to calibrated category probabilities: a linear model of vectors, and one of n-grams.

``routers.category_learning`` fits it. Knows nothing of models and scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from routers.calibration import best_temperature
from routers.ngrams import NgramClassifier

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CategoryClassifier",
    "Evidence",
    "equal_mass_bins",
    "expected_calibration_error",
    "log_loss",
    "softmax",
]

QUANTILES = 101


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a classifier sees in texts, before calibration.

    Attributes:
        logits: Of the vectors, shape (..., n_categories).
        similarity: Cosine similarity to the nearest centroid, shape (...).
        ngrams: Scores of the n-grams, shape (..., n_categories); none without such a classifier.
    """

    logits: NDArray[np.float64]
    similarity: NDArray[np.float64]
    ngrams: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, each: Sequence[Evidence]) -> Evidence:
        """Of single texts, stacked."""
        import numpy as np

        ngrams = [one.ngrams for one in each if one.ngrams is not None]
        return cls(
            np.array([one.logits for one in each]),
            np.array([one.similarity for one in each]),
            np.array(ngrams) if ngrams else None,
        )

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Evidence:
        """Of some rows."""
        ngrams = None if self.ngrams is None else self.ngrams[rows]
        return Evidence(self.logits[rows], self.similarity[rows], ngrams)

    def cues(self) -> NDArray[np.float64]:
        """How familiar texts look, shape (..., n_cues): each cue is high for familiar ones."""
        import numpy as np

        found = [self.logits.max(axis=-1), self.similarity]
        if self.ngrams is not None:
            found.append(self.ngrams.max(axis=-1))
        return np.stack(found, axis=-1)


@dataclass(frozen=True, slots=True)
class CategoryClassifier:
    """A linear classifier of vectors and one of n-grams, weighed against each other.

    Attributes:
        categories: Their names.
        weights: Shape (n_categories, width).
        biases: Shape (n_categories,).
        centroids: Mean vectors scaled to length 1, shape (n_categories, width).
        ngrams: The other classifier, if there is one.
        temperature: Logits are divided by it; above 1 the raw probabilities were too sure.
        ngram_weight: Scores of n-grams are multiplied by it and added.
        least_likely: Probability from which a category belongs to the likely ones.
        cue_means, cue_scales: Of the cues of familiarity on held-out rows.
        strangeness: Quantiles of held-out rows' strangeness, the sum of standardised cues.
    """

    categories: list[str]
    weights: NDArray[np.float64]
    biases: NDArray[np.float64]
    centroids: NDArray[np.float64]
    ngrams: NgramClassifier | None = None
    temperature: float = 1.0
    ngram_weight: float = 0.0
    least_likely: float = 0.0
    cue_means: NDArray[np.float64] | None = None
    cue_scales: NDArray[np.float64] | None = None
    strangeness: NDArray[np.float64] | None = None

    def evidence(self, vector: NDArray[np.float32], text: str) -> Evidence:
        """What is seen in one text."""
        import numpy as np

        # Not a matrix product: BLAS orders additions by how many threads it uses.
        logits = np.einsum("cw,w->c", self.weights, vector) + self.biases
        similarity = np.asarray(np.einsum("cw,w->c", self.centroids, vector).max())
        return Evidence(logits, similarity, self.ngrams.scores(text) if self.ngrams else None)

    def probabilities(self, seen: Evidence) -> NDArray[np.float64]:
        """Calibrated, shape (..., n_categories), sum 1."""
        return softmax(self._combined(seen))

    def _combined(self, seen: Evidence) -> NDArray[np.float64]:
        combined = seen.logits / self.temperature
        if seen.ngrams is not None:
            combined = combined + self.ngram_weight * seen.ngrams
        return combined

    def likely(self, posterior: NDArray[np.float64]) -> NDArray[np.bool_]:
        """The fewest categories that hold the true one with the stated coverage, same shape."""
        best = posterior == posterior.max(axis=-1, keepdims=True)
        chosen: NDArray[np.bool_] = (posterior >= self.least_likely) | best
        return chosen

    def familiarity(self, seen: Evidence) -> NDArray[np.float64]:
        """Share of held-out rows that look at least as strange, shape (...).

        Uniform for texts like the held-out ones, near 0 for others.

        References:
            Bates et al., "Testing for Outliers with Conformal p-values" (arXiv:2104.08279).
        """
        import numpy as np

        assert self.strangeness is not None, "not calibrated"
        shares = _falling_shares(len(self.strangeness))
        return np.asarray(np.interp(self._strange(seen), self.strangeness, shares))

    def _strange(self, seen: Evidence) -> NDArray[np.float64]:
        assert self.cue_means is not None, "not calibrated"
        assert self.cue_scales is not None, "not calibrated"
        strange: NDArray[np.float64] = ((self.cue_means - seen.cues()) / self.cue_scales).sum(-1)
        return strange

    def calibrated(
        self, seen: Evidence, labels: NDArray[np.intp], *, coverage: float
    ) -> CategoryClassifier:
        """The same classifier, calibrated on held-out rows.

        Temperature and weight are those of least log-loss.

        Args:
            seen: Evidence of held-out rows, shape (n_rows, n_categories).
            labels: Their true categories as positions, -1 for one it does not know.
            coverage: How often the likely categories shall hold the true one.

        References:
            Guo et al., "On Calibration of Modern Neural Networks" (arXiv:1706.04599), section 4.2.
            Departs from it in Platt's smoothed targets ("Probabilistic Outputs for Support Vector
            Machines", 1999): without them, held-out rows without any error would make every
            probability 1. Two classifiers are pooled by adding log-probabilities (Genest and Zidek,
            "Combining Probability Distributions", 1986). The likely categories are a conformal set
            as in Sadinle et al., "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels"
            (arXiv:1609.00451).
        """
        import numpy as np

        known = labels >= 0
        fitted = self._tempered(seen.take(known), labels[known])
        cues = seen.cues()
        fitted = replace(
            fitted, cue_means=cues.mean(axis=0), cue_scales=np.maximum(cues.std(axis=0), 1e-12)
        )
        strangeness = np.asarray(
            np.quantile(fitted._strange(seen), np.linspace(0, 1, QUANTILES)), np.float64
        )
        true = fitted.probabilities(seen.take(known))[np.arange(known.sum()), labels[known]]
        # One more than there are: the next text is as likely to fall into any of the gaps.
        below = int((len(true) + 1) * (1 - coverage) + 1e-9)
        limit = float(np.sort(true)[below - 1]) if below else 0.0
        return replace(fitted, strangeness=strangeness, least_likely=limit)

    def _tempered(self, seen: Evidence, labels: NDArray[np.intp]) -> CategoryClassifier:
        import numpy as np

        if not len(labels) or len(self.categories) < 2:
            return self
        temperature = best_temperature(lambda t: log_loss(seen.logits / t, labels))
        best = replace(self, temperature=temperature)
        if seen.ngrams is None:
            return best
        from scipy.optimize import minimize

        def loss(logs: NDArray[np.float64]) -> float:
            tried = replace(self, temperature=np.exp(logs[0]), ngram_weight=np.exp(logs[1]))
            return log_loss(tried._combined(seen), labels)

        found = minimize(
            loss,
            [np.log(best.temperature), 0.0],
            method="Nelder-Mead",
            bounds=[(np.log(0.01), np.log(20.0)), (np.log(1e-3), np.log(100.0))],
            options={"maxiter": 100},
        )
        temperature, weight = np.exp(found.x)
        return replace(self, temperature=float(temperature), ngram_weight=float(weight))


@cache
def _falling_shares(number: int) -> NDArray[np.float64]:
    import numpy as np

    return np.linspace(1, 0, number)


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


def equal_mass_bins(values: NDArray[np.float64], bins: int) -> list[NDArray[np.intp]]:
    """Positions of values in bins of equal mass, in rising order; no bin is empty.

    Equal values belong to the bin of the first of them, so bins do not depend on the order of rows,
    and there are fewer of them where many values are equal.
    """
    import numpy as np

    order = np.argsort(values, kind="stable")
    ordered = values[order]
    parts = np.array_split(np.arange(len(values)), bins)
    starts = np.array([part[0] for part in parts[1:] if len(part)], np.intp)
    starts = np.searchsorted(ordered, ordered[starts - 1], side="right")
    return [part for part in np.split(order, starts) if len(part)]


def expected_calibration_error(
    confidence: NDArray[np.float64],
    correct: NDArray[np.bool_] | NDArray[np.float64],
    *,
    bins: int = 15,
) -> float:
    """Mean gap between confidence and accuracy (or mean score) over bins of equal mass.

    Rows of equal confidence share a bin, see ``equal_mass_bins``.
    """
    gaps = [
        abs(float(confidence[part].mean()) - float(correct[part].mean())) * len(part)
        for part in equal_mass_bins(confidence, bins)
    ]
    return sum(gaps) / max(len(confidence), 1)
