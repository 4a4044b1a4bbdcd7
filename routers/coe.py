"""Composition of Experts: name the category, then use the category's best expert.

Knows nothing of costs; policies weigh those against the quality predicted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from routers.artefact import EncoderId, Manifest, encoder_of, load_artefact, save_artefact
from routers.base import Explanation, Prediction, Query, RouterError
from routers.category_classifier import (
    CategoryClassifier,
    expected_calibration_error,
    fit_classifier,
    out_of_fold,
    softmax,
)
from routers.encoders import DEFAULT_ENCODER, Encoder, get_encoder
from routers.params import (
    candidate_columns,
    check_bool,
    check_known_params,
    check_number,
    check_text,
    not_fitted,
)
from routers.training import read_texts, shrunken_means, texts_facts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = ["CoERouter"]

FOLDS = 5
# Coarse, so that the threshold does not follow single validation prompts.
THRESHOLDS = tuple(step / 20 for step in range(20))


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Rows that the classifier has not learnt from. Label -1 is a category it does not know."""

    logits: NDArray[np.float64]
    distances: NDArray[np.float64]
    labels: NDArray[np.intp]
    scores: NDArray[np.float64]


class CoERouter:
    """Two-step router: a category classifier, then a measured category-to-expert table.

    Predicting each prompt's best expert directly learns little, because those labels jump about;
    prompts do cluster by category. So a logistic regression on sentence vectors names the
    category, and the predicted quality is the category's row of mean training scores.

    Robust fallback: where the calibrated probability is below a threshold, or the query is farther
    from every category's centroid than nearly all held-out prompts, the row of the category
    ``general`` is used, or that of all prompts if there is no such category. The threshold is the
    one whose decisions score best on held-out prompts; of equally good ones the median, as far
    from trusting everything as from trusting nothing.

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
        general_category: Name of the category to fall back to.
        general_texts: A JSON-lines file of objects with ``text``: further texts of that category
            for the classifier to learn from. They need no scores.
        random_state: Seed of the folds, used only where there is no validation split.

    Attributes:
        models_: Names of the columns of ``quality_``.
        classifier_: The fitted classifier.
        quality_: Mean scores, shape (n_categories + 1, n_models); the last row is that of all
            prompts.
        threshold_: Least probability to trust a category.
        distance_limit_: Greatest distance to trust a category.
        metrics_: What was measured on held-out prompts.

    References:
        Jain et al., "Composition of Experts: A Modular Compound AI System Leveraging Large
        Language Models" (arXiv:2412.01868): two-step routing, and the robust variant's general
        category. Departs from it in the classifier (logistic regression on MiniLM), and in how
        uncertainty is measured; the paper's statistic is not public.
    """

    method = "coe"

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        C: float = 10.0,
        shrinkage: float = 10.0,
        soft: bool = False,
        fallback: bool = True,
        distance_quantile: float = 0.99,
        general_category: str = "general",
        general_texts: str | None = None,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.C = C
        self.shrinkage = shrinkage
        self.soft = soft
        self.fallback = fallback
        self.distance_quantile = distance_quantile
        self.general_category = general_category
        self.general_texts = general_texts
        self.random_state = random_state
        self.models_: list[str] | None = None
        self._table_sha256: str | None = None
        self._split: str | None = None

    @property
    def models(self) -> list[str]:
        """Names of the models it was fitted on."""
        if self.models_ is None:
            raise not_fitted(self)
        return list(self.models_)

    @property
    def categories(self) -> list[str]:
        """Names of the categories it knows."""
        if self.models_ is None:
            raise not_fitted(self)
        return list(self.classifier_.categories)

    def _check_params(self) -> None:
        check_number(self, "C", self.C, 0, low_open=True)
        check_number(self, "shrinkage", self.shrinkage, 0)
        check_number(self, "distance_quantile", self.distance_quantile, 0, 1, low_open=True)
        check_number(self, "random_state", self.random_state, 0)
        check_bool(self, "soft", self.soft)
        check_bool(self, "fallback", self.fallback)
        check_text(self, "general_category", self.general_category)
        if not isinstance(self.encoder, Encoder):
            check_text(self, "encoder", self.encoder)
        if self.general_texts is not None:
            check_text(self, "general_texts", self.general_texts)

    def _encoder(self) -> Encoder:
        return get_encoder(self.encoder) if isinstance(self.encoder, str) else self.encoder

    def fit(self, table: OutcomeTable, *, split: str = "train") -> Self:
        """Learn from one split; calibrate on the split ``validation``, else by cross-validation.

        Raises:
            RouterError: A hyper-parameter is wrong, or the table has no categories.
        """
        import numpy as np

        self._check_params()
        self.models_ = None
        prompts = table.with_prompts_of(split)
        if prompts.categories is None:
            raise RouterError(
                "the method 'coe' needs a column 'category' in prompts.parquet; add it, or train a "
                "method that needs none"
            )
        extra = read_texts(self.general_texts) if self.general_texts else []
        names = [*prompts.categories, *[self.general_category] * len(extra)]
        categories = sorted(set(names))
        labels = np.array([categories.index(name) for name in names], np.intp)
        vectors = self._encoder().encode([*prompts.texts, *extra])
        scores = table.scores(split)
        classifier = fit_classifier(vectors, labels, categories, C=self.C)
        quality, kept = shrunken_means(scores, labels, len(categories), float(self.shrinkage))
        held_out = self._held_out(table, split, classifier, vectors, labels, scores)
        known = held_out.labels >= 0
        self.classifier_ = classifier.calibrated(held_out.logits[known], held_out.labels[known])
        self.quality_ = quality[:, kept]
        self.models_ = [name for name, keep in zip(table.models, kept, strict=True) if keep]
        self.distance_limit_ = (
            float(np.quantile(held_out.distances, self.distance_quantile))
            if self.distance_quantile < 1
            else 2.0
        )
        self.threshold_, self.metrics_ = self._choose_threshold(held_out, kept)
        self.metrics_ |= texts_facts(self.general_texts, extra)
        self._table_sha256, self._split = table.sha256, split
        return self

    def _held_out(
        self,
        table: OutcomeTable,
        split: str,
        classifier: CategoryClassifier,
        vectors: NDArray[np.float32],
        labels: NDArray[np.intp],
        scores: NDArray[np.float64],
    ) -> _HeldOut:
        import numpy as np

        categories = classifier.categories
        n_prompts = len(scores)
        if split != "validation" and table.has_split("validation"):
            prompts = table.with_prompts_of("validation")
            inside = self._encoder().encode(prompts.texts)
            position = {name: number for number, name in enumerate(categories)}
            found = [position.get(name, -1) for name in prompts.categories or ()]
            return _HeldOut(
                np.array([classifier.logits(vector) for vector in inside]),
                np.array([classifier.distance(vector) for vector in inside]),
                np.array(found, np.intp),
                table.scores("validation"),
            )
        logits, distances = out_of_fold(
            vectors, labels, categories, C=self.C, folds=FOLDS, random_state=self.random_state
        )
        # The texts without scores come last.
        part = slice(n_prompts)
        return _HeldOut(logits[part], distances[part], labels[part], scores)

    def _choose_threshold(
        self, held_out: _HeldOut, kept: NDArray[np.bool_]
    ) -> tuple[float, dict[str, Any]]:
        """The threshold of the best decisions on held-out rows, and what was measured there."""
        import numpy as np

        posterior = softmax(held_out.logits / self.classifier_.temperature)
        confidence, category = posterior.max(axis=1), posterior.argmax(axis=1)
        far = held_out.distances > self.distance_limit_
        scores = held_out.scores[:, kept]

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

    def _general_row(self) -> int:
        """The general category's row if it was scored, else the row of all prompts."""
        categories = self.classifier_.categories
        if self.general_category in categories:
            return categories.index(self.general_category)
        return len(categories)

    def _row(self, posterior: NDArray[np.float64], unsure: bool) -> NDArray[np.float64]:
        """Quality of all fitted models, shape (n_models,)."""
        row: NDArray[np.float64]
        if unsure:
            row = self.quality_[self._general_row()]
        elif self.soft:
            row = (self.quality_[:-1] * posterior[:, None]).sum(axis=0)
        else:
            row = self.quality_[int(posterior.argmax())]
        return row

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        """Predict for the named candidates, in their order.

        Raises:
            RouterError: It is not fitted, or a candidate is unknown to it.
        """
        import numpy as np

        columns = candidate_columns(self.models, candidates)
        quality = np.empty((len(queries), len(columns)), np.float32)
        explanations = []
        vectors = self._encoder().encode([query.text for query in queries])
        for number, vector in enumerate(vectors):
            posterior = self.classifier_.probabilities(vector)
            best = int(posterior.argmax())
            confidence = float(posterior[best])
            unsure = self.fallback and (
                confidence < self.threshold_
                or self.classifier_.distance(vector) > self.distance_limit_
            )
            quality[number] = self._row(posterior, unsure)[columns]
            names = self.classifier_.categories
            explanations.append(
                Explanation(
                    category=names[best],
                    confidence=confidence,
                    fallback=unsure and names[best] != self.general_category,
                    detail=dict(zip(names, posterior.tolist(), strict=True)),
                )
            )
        return Prediction(quality.clip(0.0, 1.0), explanations)

    def save(self, path: Path) -> None:
        """Write the fitted router as an artefact folder."""
        models = self.models
        encoder, classifier = self._encoder(), self.classifier_
        params = {
            name: getattr(self, name)
            for name in ("C", "shrinkage", "soft", "fallback", "distance_quantile")
        }
        params |= {
            "encoder": encoder.name,
            "general_category": self.general_category,
            "general_texts": self.general_texts,
            "random_state": self.random_state,
        }
        manifest = Manifest(
            method=self.method,
            encoder=EncoderId(name=encoder.name, revision=encoder.revision),
            models=models,
            categories=classifier.categories,
            table_sha256=self._table_sha256,
            split=self._split,
            params=params,
            state={
                "temperature": classifier.temperature,
                "threshold": self.threshold_,
                "distance_limit": self.distance_limit_,
            },
            metrics=self.metrics_,
        )
        arrays = {
            "weights": classifier.weights,
            "biases": classifier.biases,
            "centroids": classifier.centroids,
            "quality": self.quality_,
        }
        save_artefact(path, manifest, arrays)

    @classmethod
    def load(cls, path: Path, *, encoder: Encoder | None = None) -> Self:
        """Read an artefact folder that this class wrote.

        Args:
            path: The folder.
            encoder: The encoder to use; by default the one the artefact names.

        Raises:
            RouterError: The artefact is damaged, or bound to another encoder.
        """
        artefact = load_artefact(path, method=cls.method)
        manifest = artefact.manifest
        found = encoder_of(artefact, encoder)
        check_known_params(cls, manifest.params)
        router = cls(**{**manifest.params, "encoder": found})
        router._check_params()
        categories, width = manifest.categories or [], found.width
        rows = len(categories)
        router.classifier_ = CategoryClassifier(
            categories,
            artefact.array("weights", (rows, width)),
            artefact.array("biases", (rows,)),
            artefact.array("centroids", (rows, width)),
            artefact.state("temperature"),
        )
        router.quality_ = artefact.array("quality", (rows + 1, len(manifest.models)))
        router.threshold_ = artefact.state("threshold")
        router.distance_limit_ = artefact.state("distance_limit")
        router.metrics_ = dict(manifest.metrics)
        router.models_ = list(manifest.models)
        router._table_sha256, router._split = manifest.table_sha256, manifest.split
        return router
