"""Category scores from the letters of a text: hashed character n-grams and ridge regression.

What a sentence vector blurs, such as a formula, a unit or the wording of a kind of task, its
letters still show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from routers.base import RouterError
from routers.encoders.lexical import hash_ngrams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["N_GRAMS", "NgramClassifier", "fit_ngrams"]

BITS = 14
N_GRAMS = 1 << BITS
SHORTEST, LONGEST = 2, 5
# Weight of the penalty; from 0.2 to 1 categories are told apart alike.
PENALTY = 0.5


@dataclass(frozen=True, slots=True)
class NgramClassifier:
    """A linear model of tf-idf weighted n-grams.

    Attributes:
        idf: How telling each n-gram is, shape (N_GRAMS,).
        weights: Shape (N_GRAMS, n_categories).
        shares: Share of each category in training, shape (n_categories,).
    """

    idf: NDArray[np.float32]
    weights: NDArray[np.float32]
    shares: NDArray[np.float64]

    def scores(self, text: str) -> NDArray[np.float64]:
        """About the chance of each category, unbounded, shape (n_categories,)."""
        import numpy as np

        found, counts = count_ngrams(text)
        values = (1.0 + np.log(counts)) * self.idf.take(found)
        values /= max(float(np.sqrt((values * values).sum())), 1e-12)
        # Rows are taken and converted apart, in a third of the time that indexing needs. Not a
        # matrix product: BLAS orders additions by how many threads it uses.
        weights = self.weights.take(found, axis=0).astype(np.float64)
        return np.asarray(np.einsum("g,gc->c", values, weights) + self.shares)


def count_ngrams(text: str) -> tuple[NDArray[np.uint16], NDArray[np.intp]]:
    """Which hashed n-grams a text has, rising, and how often each."""
    import numpy as np

    codes = (hash_ngrams(text, SHORTEST, LONGEST) >> np.uint32(32 - BITS)).astype(np.uint16)
    # Short numbers are sorted by their digits, in half the time of ``np.unique``.
    codes.sort(kind="stable")
    ends = np.append(np.flatnonzero(codes[1:] != codes[:-1]), len(codes) - 1)
    return codes[ends], np.diff(ends, prepend=-1)


def fit_ngrams(
    texts: Sequence[str], labels: NDArray[np.intp], n_categories: int
) -> tuple[NgramClassifier, NDArray[np.float64]]:
    """Fit, and say what each training text would have got had it not been one.

    Kernel ridge regression on indicators of the categories: the inverse of one matrix of
    n_texts x n_texts gives the weights and the leave-one-out scores, which are exact but for the
    document frequencies and shares of categories, those of all texts.

    Args:
        texts: Training texts; 5,000 need 1 GiB and ten seconds.
        labels: Position of each text's category, shape (n_texts,).
        n_categories: How many there are.

    Returns:
        The classifier, and leave-one-out scores of shape (n_texts, n_categories).

    References:
        Rifkin et al., "Regularized Least-Squares Classification" (2003), for both.
    """
    import numpy as np

    try:
        from scipy.sparse import csr_array
        from sklearn.feature_extraction.text import TfidfTransformer
    except ImportError as exc:
        raise RouterError(
            "training this router needs scikit-learn: pip install 'collegium[routers]'"
        ) from exc
    found, numbers = zip(*map(count_ngrams, texts), strict=True)
    ends = np.cumsum([0, *map(len, found)])
    counts = csr_array(
        (np.concatenate(numbers).astype(np.float64), np.concatenate(found), ends),
        shape=(len(texts), N_GRAMS),
    )
    weighting = TfidfTransformer(sublinear_tf=True).fit(counts)
    rows = weighting.transform(counts)
    targets = np.eye(n_categories)[labels]
    shares = targets.mean(axis=0)
    # Rows are not sparse enough for sparse products to be faster.
    dense = rows.toarray().astype(np.float32)
    kernel = (dense @ dense.T).astype(np.float64)
    kernel[np.diag_indices(len(kernel))] += PENALTY
    inverse = np.linalg.inv(kernel)
    dual = inverse @ (targets - shares)
    left_out = targets - dual / np.diag(inverse)[:, None]
    classifier = NgramClassifier(
        weighting.idf_.astype(np.float32), (rows.T @ dual).astype(np.float32), shares
    )
    return classifier, left_out
