"""Learning to name categories: scikit-learn fits, cross-validation shows what to expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from routers.base import RouterError
from routers.category_classifier import CategoryClassifier, Evidence
from routers.fitted import TrainingRows
from routers.folds import stratified_folds
from routers.ngrams import fit_ngrams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HeldOut", "fit_classifier", "learn_categories"]

FOLDS = 5
# More rows would only make cross-validation slower: a temperature and a threshold need no more.
CALIBRATION_ROWS = 5_000
# The kernel of n-grams has one row and one column for each of them.
NGRAM_ROWS = 5_000
# What a class gets that was absent from the training rows: as good as impossible, but finite.
ABSENT_LOGIT = -30.0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that a classifier has not learnt from.

    Attributes:
        seen: What it, or one like it, sees in them.
        labels: Positions of their categories, -1 for one it does not know.
        scores: Of all models, shape (n_rows, n_models).
        rows: Positions of those that are training rows, shape (n_rows,); none if they are others.
        fold_of: Training rows of the same number were held out together, shape (n_rows,).
    """

    seen: Evidence
    labels: NDArray[np.intp]
    scores: NDArray[np.float64]
    rows: NDArray[np.intp] | None = None
    fold_of: NDArray[np.intp] | None = None


def learn_categories(
    rows: TrainingRows,
    texts: Sequence[str],
    vectors: NDArray[np.float32],
    labels: NDArray[np.intp],
    categories: Sequence[str],
    *,
    C: float,
    ngrams: bool,
    use_validation: bool,
    random_state: int,
) -> tuple[CategoryClassifier, HeldOut]:
    """Fit a classifier, uncalibrated, and gather what to calibrate it on.

    Args:
        rows: The training rows, whose scores belong to the first of ``texts``.
        texts: Those of the rows, then further ones without scores.
        vectors: Of all texts, shape (n_texts, width).
        labels: Position of each text's category.
        categories: Their names.
        C: Inverse strength of the L2 penalty on vectors.
        ngrams: Whether n-grams are learnt from, too.
        use_validation: Whether the table's split ``validation`` is held out; without one, or where
            its categories are others, it is cross-validation over the training rows.
        random_state: Seed of folds and samples.
    """
    import numpy as np

    rng = np.random.default_rng(random_state)
    classifier = fit_classifier(vectors, labels, categories, C=C)
    learnt, left_out = np.arange(0), np.zeros((0, len(categories)))
    if ngrams:
        learnt = _sample(len(labels), NGRAM_ROWS, rng)
        by_ngrams, left_out = fit_ngrams(
            [texts[int(row)] for row in learnt], labels[learnt], len(categories)
        )
        classifier = replace(classifier, ngrams=by_ngrams)
    inside = rows.validation if use_validation else None
    if inside is not None:
        position = {name: number for number, name in enumerate(categories)}
        found = [position.get(name, -1) for name in inside.categories or ()]
        each = zip(inside.vectors, inside.texts, strict=True)
        seen = Evidence.of([classifier.evidence(vector, text) for vector, text in each])
        return classifier, HeldOut(seen, np.array(found, np.intp), inside.scores)
    # Texts without scores come last; they are learnt from, but nothing is decided on them.
    further = len(rows) + _sample(len(labels) - len(rows), CALIBRATION_ROWS, rng)
    chosen = np.append(_sample(len(rows), CALIBRATION_ROWS, rng), further)
    fold_of = stratified_folds(labels[chosen], FOLDS, random_state)
    seen = _out_of_fold(vectors[chosen], labels[chosen], categories, fold_of, C=C)
    scored = chosen < len(rows)
    scores = None
    if classifier.ngrams is not None:
        place = {int(row): number for number, row in enumerate(learnt)}
        scores = np.array(
            [
                left_out[place[int(row)]]
                if int(row) in place
                else classifier.ngrams.scores(texts[int(row)])
                for row in chosen[scored]
            ]
        )
    seen, held_out = replace(seen.take(scored), ngrams=scores), chosen[scored]
    return classifier, HeldOut(
        seen, labels[held_out], rows.scores[held_out], held_out, fold_of[scored]
    )


def fit_classifier(
    vectors: NDArray[np.float32],
    labels: NDArray[np.intp],
    categories: Sequence[str],
    *,
    C: float,
) -> CategoryClassifier:
    """Fit on unit vectors, without n-grams and uncalibrated.

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


def _out_of_fold(
    vectors: NDArray[np.float32],
    labels: NDArray[np.intp],
    categories: Sequence[str],
    fold_of: NDArray[np.intp],
    *,
    C: float,
) -> Evidence:
    """What classifiers of vectors see in rows that they have not learnt from."""
    import numpy as np

    logits = np.zeros((len(labels), len(categories)))
    similarity = np.zeros(len(labels))
    each = tqdm(np.unique(fold_of), desc="cross-validation", unit="fold", delay=2, leave=False)
    for fold in each:
        inside = fold_of == fold
        if inside.all():
            inside = ~inside
        model = fit_classifier(vectors[~inside], labels[~inside], categories, C=C)
        for row in np.flatnonzero(inside):
            seen = model.evidence(vectors[row], "")
            logits[row], similarity[row] = seen.logits, seen.similarity
    return Evidence(logits, similarity)


def _sample(n_rows: int, at_most: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Positions of so many rows, in their order."""
    import numpy as np

    if n_rows <= at_most:
        return np.arange(n_rows)
    return np.sort(rng.choice(n_rows, at_most, replace=False))
