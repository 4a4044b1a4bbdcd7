"""Composition of Experts: name the category, then use the category's best expert.

Knows nothing of costs; policies weigh those against the quality predicted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from routers.assignment import assign
from routers.base import Explanation, RouterError
from routers.category_classifier import (
    CategoryClassifier,
    expected_calibration_error,
    fit_classifier,
    out_of_fold,
    softmax,
)
from routers.clusters import cluster
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows, VectorRouter
from routers.params import check_bool, check_number, check_text
from routers.training import read_labelled_texts, read_texts, shrunken_means, texts_facts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CoERouter"]

FOLDS = 5
# More rows would only make cross-validation slower: a temperature and a threshold need no more.
CALIBRATION_ROWS = 20_000
# Coarse, so that the threshold does not follow single validation prompts.
THRESHOLDS = tuple(step / 20 for step in range(20))


# Small enough to say nothing else, large enough to survive single precision.
BELOW_PICK = 1e-4


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Rows that the classifier has not learnt from. Label -1 is a category it does not know."""

    logits: NDArray[np.float64]
    distances: NDArray[np.float64]
    labels: NDArray[np.intp]
    scores: NDArray[np.float64]


class CoERouter(VectorRouter):
    """Two-step router: a category classifier, then a measured category-to-expert table.

    Predicting each prompt's best expert directly learns little, because those labels jump about;
    prompts do cluster by category. So a logistic regression on sentence vectors names the
    category, and the predicted quality is the category's row of mean training scores.

    Robust fallback: where the calibrated probability is below a threshold, or the query is farther
    from every category's centroid than nearly all held-out prompts, the row of the category
    ``general`` is used, or that of all prompts if there is no such category. The threshold is the
    one whose decisions score best on held-out prompts; of equally good ones the median, as far
    from trusting everything as from trusting nothing.

    Budgets of parameters make the table a plan: an integer programme picks each category's expert
    (``routers.assignment``), and quality predicted for the others is cut to just below the pick's.

    Trains in seconds besides encoding (1 ms a short prompt, 10 ms one of 256 tokens). A prediction
    costs one encoding and about 0.05 ms. Models without a training score cannot be predicted for.

    Args:
        encoder: An encoder's name (see ``routers.encoders.get_encoder``) or an encoder.
        C: Inverse strength of the classifier's L2 penalty.
        shrinkage: Number of prompts with the model's mean score that each category mean is mixed
            with; keeps small categories from being led by luck.
        soft: Mix the rows of all categories by their probabilities instead of taking one.
        fallback: Whether unsure or far queries get the general row.
        distance_quantile: Share of held-out prompts that count as near enough; 1 turns the
            distance rule off.
        categories: Where categories come from: ``table`` (the column ``category``), ``clusters``
            (groups of similar training prompts), or the path of a CSV file with the columns
            ``text`` and ``category``, whose examples then name the prompts' categories.
        n_clusters: How many clusters.
        general_category: Name of the category to fall back to.
        general_texts: A JSON-lines file of objects with ``text``: further texts of that category
            for the classifier to learn from. They need no scores.
        max_total_params_b: Budget of parameters that all experts in use may have together, in
            billions; needs ``total_params_b`` of every model in ``models.json``.
        max_active_params_b: Budget of active parameters of an average answer, in billions.
        random_state: Seed of the folds, used only where there is no validation split.

    Attributes:
        classifier_: The fitted classifier.
        quality_: Mean scores, shape (n_categories, n_models).
        mean_: Mean scores of all prompts, shape (n_models,).
        threshold_: Least probability to trust a category.
        distance_limit_: Greatest distance to trust a category.

    References:
        Jain et al., "Composition of Experts: A Modular Compound AI System Leveraging Large
        Language Models" (arXiv:2412.01868): two-step routing, and the robust variant's general
        category. Departs from it in the classifier (logistic regression on MiniLM), and in how
        uncertainty is measured; the paper's statistic is not public.
    """

    method = "coe"
    arrays: ClassVar = {
        "weights": ("categories", "width"),
        "biases": ("categories",),
        "centroids": ("categories", "width"),
        "quality": ("categories", "models"),
        "mean": ("models",),
    }
    numbers = ("temperature", "threshold", "distance_limit")

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        C: float = 10.0,
        shrinkage: float = 10.0,
        soft: bool = False,
        fallback: bool = True,
        distance_quantile: float = 0.99,
        categories: str = "table",
        n_clusters: int = 16,
        general_category: str = "general",
        general_texts: str | None = None,
        max_total_params_b: float | None = None,
        max_active_params_b: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.C = C
        self.shrinkage = shrinkage
        self.soft = soft
        self.fallback = fallback
        self.distance_quantile = distance_quantile
        self.categories = categories
        self.n_clusters = n_clusters
        self.general_category = general_category
        self.general_texts = general_texts
        self.max_total_params_b = max_total_params_b
        self.max_active_params_b = max_active_params_b
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_number(self, "C", self.C, 0, low_open=True)
        check_number(self, "shrinkage", self.shrinkage, 0)
        check_number(self, "distance_quantile", self.distance_quantile, 0, 1, low_open=True)
        check_number(self, "random_state", self.random_state, 0)
        check_bool(self, "soft", self.soft)
        check_bool(self, "fallback", self.fallback)
        check_text(self, "categories", self.categories)
        check_number(self, "n_clusters", self.n_clusters, 1)
        check_text(self, "general_category", self.general_category)
        if self.general_texts is not None:
            check_text(self, "general_texts", self.general_texts)
        for name in ("max_total_params_b", "max_active_params_b"):
            if getattr(self, name) is not None:
                check_number(self, name, getattr(self, name), 0, low_open=True)
        if self.soft and self._has_budget():
            raise RouterError("budgets need one category per query: leave out soft=true")

    def _learn(self, rows: TrainingRows) -> None:
        """Learn from one split; calibrate on the split ``validation``, else by cross-validation."""
        import numpy as np

        named, extra, extra_names = self._named(rows)
        if self.general_texts:
            general = read_texts(self.general_texts)
            extra += general
            extra_names += [self.general_category] * len(general)
        names = [*named, *extra_names]
        categories = sorted(set(names))
        labels = np.array([categories.index(name) for name in names], np.intp)
        vectors = rows.vectors
        if extra:
            vectors = np.concatenate([vectors, self._encode_all(extra)])
        classifier = fit_classifier(vectors, labels, categories, C=self.C)
        table = shrunken_means(rows.scores, labels, len(categories), float(self.shrinkage))
        if self._has_budget():
            table = self._planned(table, labels[: len(rows)], rows)
        self.quality_, self.mean_ = table[:-1], table[-1]
        self.categories_ = categories
        held_out = self._held_out(rows, classifier, vectors, labels)
        known = held_out.labels >= 0
        self.classifier_ = classifier.calibrated(held_out.logits[known], held_out.labels[known])
        self.weights_, self.biases_ = classifier.weights, classifier.biases
        self.centroids_, self.temperature_ = classifier.centroids, self.classifier_.temperature
        self.distance_limit_ = (
            float(np.quantile(held_out.distances, self.distance_quantile))
            if self.distance_quantile < 1
            else 2.0
        )
        self.threshold_, self.metrics_ = self._choose_threshold(held_out)
        self.metrics_ |= texts_facts(extra)

    def _named(self, rows: TrainingRows) -> tuple[list[str], list[str], list[str]]:
        """The category of each row, and further texts with theirs."""
        if self.categories == "table":
            if rows.categories is None:
                raise RouterError(
                    "the method 'coe' needs a column 'category' in prompts.parquet; add it, name a "
                    "CSV file of examples with categories=FILE, or set categories=clusters"
                )
            return rows.categories, [], []
        if self.categories == "clusters":
            _, labels = cluster(rows.vectors, self.n_clusters, self.random_state)
            return [f"cluster {label}" for label in labels], [], []
        import numpy as np

        texts, names = read_labelled_texts(self.categories)
        known = sorted(set(names))
        classifier = fit_classifier(
            self._encode_all(texts),
            np.array([known.index(name) for name in names], np.intp),
            known,
            C=self.C,
        )
        found = [known[int(classifier.logits(vector).argmax())] for vector in rows.vectors]
        return found, texts, names

    def _ready(self) -> None:
        self.classifier_ = CategoryClassifier(
            self.categories_ or [], self.weights_, self.biases_, self.centroids_, self.temperature_
        )

    def _has_budget(self) -> bool:
        return self.max_total_params_b is not None or self.max_active_params_b is not None

    def _planned(
        self, table: NDArray[np.float64], labels: NDArray[np.intp], rows: TrainingRows
    ) -> NDArray[np.float64]:
        """Quality by category (last: of all prompts), none above that of the category's pick."""
        import numpy as np

        # The row of all prompts is used for queries of no known category: few, but some.
        weights = np.append(np.bincount(labels, minlength=len(table) - 1) / len(labels), 1e-6)
        total, active = self.max_total_params_b, self.max_active_params_b
        picks = assign(
            table,
            weights,
            total_params_b=None if total is None else _sizes(rows, "total_params_b"),
            max_total_params_b=total,
            active_params_b=None if active is None else _sizes(rows, "active_params_b"),
            max_active_params_b=active,
        )
        best = table[np.arange(len(table)), picks]
        planned = np.minimum(table, best[:, None] - BELOW_PICK)
        planned[np.arange(len(table)), picks] = best
        return np.asarray(planned.clip(0.0))

    def _held_out(
        self,
        rows: TrainingRows,
        classifier: CategoryClassifier,
        vectors: NDArray[np.float32],
        labels: NDArray[np.intp],
    ) -> _HeldOut:
        import numpy as np

        categories = classifier.categories
        inside = rows.validation if self.categories == "table" else None
        if inside is not None:
            position = {name: number for number, name in enumerate(categories)}
            found = [position.get(name, -1) for name in inside.categories or ()]
            return _HeldOut(
                np.array([classifier.logits(vector) for vector in inside.vectors]),
                np.array([classifier.distance(vector) for vector in inside.vectors]),
                np.array(found, np.intp),
                inside.scores,
            )
        chosen = np.arange(len(labels))
        if len(labels) > CALIBRATION_ROWS:
            rng = np.random.default_rng(self.random_state)
            chosen = np.sort(rng.choice(len(labels), CALIBRATION_ROWS, replace=False))
        logits, distances = out_of_fold(
            vectors[chosen],
            labels[chosen],
            categories,
            C=self.C,
            folds=FOLDS,
            random_state=self.random_state,
        )
        # Texts without scores come last; they are learnt from, but nothing is decided on them.
        scored = chosen < len(rows)
        return _HeldOut(
            logits[scored],
            distances[scored],
            labels[chosen[scored]],
            rows.scores[chosen[scored]],
        )

    def _choose_threshold(self, held_out: _HeldOut) -> tuple[float, dict[str, Any]]:
        """The threshold of the best decisions on held-out rows, and what was measured there."""
        import numpy as np

        posterior = softmax(held_out.logits / self.classifier_.temperature)
        confidence, category = posterior.max(axis=1), posterior.argmax(axis=1)
        far = held_out.distances > self.distance_limit_
        scores = held_out.scores

        def decided(unsure: NDArray[np.bool_]) -> float:
            rows = np.array([self._row(p, bool(u)) for p, u in zip(posterior, unsure, strict=True)])
            got = scores[np.arange(len(rows)), rows.argmax(axis=1)]
            return float(np.nanmean(got)) if not np.isnan(got).all() else 0.0

        sweep = {t: decided((confidence < t) | far) for t in THRESHOLDS} if self.fallback else {}
        best = max(sweep.values(), default=0.0)
        equal = [t for t, mean in sweep.items() if mean >= best - 1e-12]
        threshold = equal[len(equal) // 2] if equal else 0.0
        known = held_out.labels >= 0
        correct = category[known] == held_out.labels[known]
        return threshold, {
            "held_out_rows": len(posterior),
            "held_out_accuracy": float(correct.mean()) if len(correct) else None,
            "held_out_ece": expected_calibration_error(confidence[known], correct),
            "held_out_score": decided(((confidence < threshold) | far) & self.fallback),
            "held_out_score_without_fallback": decided(np.zeros(len(far), bool)),
            "held_out_fallback_share": float(
                (((confidence < threshold) | far) & self.fallback).mean()
            ),
            "score_by_threshold": {str(t): round(mean, 6) for t, mean in sweep.items()},
        }

    def _general_row(self) -> NDArray[np.float64]:
        """The general category's row if it was scored, else that of all prompts."""
        row: NDArray[np.float64] = self.mean_
        if self.categories_ and self.general_category in self.categories_:
            row = self.quality_[self.categories_.index(self.general_category)]
        return row

    def _row(self, posterior: NDArray[np.float64], unsure: bool) -> NDArray[np.float64]:
        """Quality of all fitted models, shape (n_models,)."""
        if unsure:
            return self._general_row()
        row: NDArray[np.float64]
        if self.soft:
            row = (self.quality_ * posterior[:, None]).sum(axis=0)
        else:
            row = self.quality_[int(posterior.argmax())]
        return row

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[np.floating], Explanation]:
        posterior = self.classifier_.probabilities(given)
        best = int(posterior.argmax())
        confidence = float(posterior[best])
        far = self.classifier_.distance(given) > self.distance_limit_
        unsure = self.fallback and (confidence < self.threshold_ or far)
        names = self.classifier_.categories
        return self._row(posterior, unsure), Explanation(
            category=names[best],
            confidence=confidence,
            fallback=unsure and names[best] != self.general_category,
            detail=dict(zip(names, posterior.tolist(), strict=True)),
        )


def _sizes(rows: TrainingRows, name: str) -> NDArray[np.float64]:
    """Total or active parameters of each model in billions; all are active where unsaid."""
    import numpy as np

    found = [card.get(name) or card.get("total_params_b") for card in rows.cards]
    if lacking := [m for m, size in zip(rows.models, found, strict=True) if not size]:
        raise RouterError(
            f"a budget needs {name!r} of every model in models.json; missing for "
            + ", ".join(map(repr, lacking))
        )
    return np.array(found, np.float64)
