"""Composition of Experts: name the category, then use the category's best expert.

Knows nothing of costs; policies weigh those against the quality predicted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experts.errors import ExpertConfigError
from experts.paths import PACKAGE_PREFIX, resolve_path
from routers.assignment import assign
from routers.base import Explanation, Query, RouterError
from routers.category_classifier import CategoryClassifier, expected_calibration_error
from routers.category_learning import HeldOut, fit_classifier, learn_categories
from routers.clusters import cluster
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows, VectorRouter
from routers.ngrams import N_GRAMS, NgramClassifier
from routers.params import check_bool, check_count, check_number, check_text
from routers.training import (
    clearly_above,
    read_labelled_texts,
    read_texts,
    shrunken_means,
    texts_facts,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CoERouter"]

# Coarse, so that the threshold does not follow single prompts.
THRESHOLDS = tuple(step / 20 for step in range(20))
# Standard errors by which a threshold must be better than none: the best of twenty owes some of its
# lead to luck.
TOLERANCE = 2.0
# The shipped domain classifier; scripts/train_domain_classifier.sh makes it.
DOMAINS = "package:routers/embedded/domains"
# Small enough to say nothing else, large enough to survive single precision.
BELOW_PICK = 1e-4

# Fields of the classifier that are stored under their own names.
CLASSIFIER_ARRAYS = {
    "weights": ("categories", "width"),
    "biases": ("categories",),
    "centroids": ("categories", "width"),
    "cue_means": ("cues",),
    "cue_scales": ("cues",),
    "strangeness": ("quantiles",),
}
CLASSIFIER_NUMBERS = ("temperature", "ngram_weight", "least_likely")


class CoERouter(VectorRouter):
    """Two-step router: a category classifier, then a measured category-to-expert table.

    Predicting each prompt's best expert directly learns little, because those labels jump about;
    prompts do cluster by category. So a logistic regression on sentence vectors and a ridge
    regression on character n-grams name the category together, and the predicted quality is the
    mean of the categories' rows of mean training scores, weighed by their probabilities.

    Robust fallback: where the calibrated probability is below a threshold, or the query looks
    stranger than nearly all held-out prompts, the row of the category ``general`` is used, or that
    of all prompts if there is no such category. The threshold is the one with the least squared
    error of predicted differences between models on held-out prompts, if it is less by more than
    two standard errors; of equally good ones the median, as far from trusting everything as from
    trusting nothing. Not the one whose decisions score best: that is noisier, and says nothing of
    decisions that weigh costs.

    An explanation's ``detail`` holds the probability of each category; ``likely``, the fewest
    categories that hold the true one with the stated coverage; and ``familiarity``, the share of
    held-out prompts that look at least as strange: near 0, the query is like nothing seen.

    Budgets of parameters make the table a plan: an integer programme picks each category's expert
    (``routers.assignment``), and quality predicted for the others is cut to just below the pick's.
    Models that a budget of total parameters leaves without a category are not predicted for at all:
    nobody needs to load them. A policy that weighs costs (cost-quality below 1) may leave the plan
    for cheaper models, and keeps a budget of active parameters if its costs are those.

    Trains in seconds besides encoding (1 ms a short prompt, 10 ms one of 256 tokens). A prediction
    costs one encoding and 0.1 to 0.3 ms. Models without a training score cannot be predicted for.

    Args:
        encoder: An encoder's name (see ``routers.encoders.get_encoder``) or an encoder.
        C: Inverse strength of the classifier's L2 penalty.
        shrinkage: Number of prompts with the model's mean score that each category mean is mixed
            with; keeps small categories from being led by luck.
        soft: Whether to mix the rows of all categories by their probabilities or to take one; none
            mixes unless there is a budget.
        ngrams: Whether n-grams help to name the category.
        fallback: Whether unsure or far queries get the general row; never under a budget, which
            reckons with the categories' picks.
        familiar_share: Share of held-out prompts that count as familiar; 1 turns that rule off.
        coverage: How often the ``likely`` categories shall hold the true one.
        categories: Where categories come from: ``table`` (the column ``category``), ``domains``
            (what the shipped domain classifier names each prompt), ``clusters`` (groups of similar
            training prompts), the path of a CSV file with the columns ``text`` and ``category``,
            whose examples then name the prompts' categories, or a fitted ``coe`` that does: an
            artefact's folder, or ``package:NAME/PATH`` for one inside an installed package.
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

    References:
        Jain et al., "Composition of Experts: A Modular Compound AI System Leveraging Large
        Language Models" (arXiv:2412.01868): two-step routing, and the robust variant's general
        category. Departs from it in the classifier, in mixing rows, and in how uncertainty is
        measured; the paper's statistic is not public.
    """

    method = "coe"
    cue_means_: NDArray[np.float64]
    arrays: ClassVar = {
        **CLASSIFIER_ARRAYS,
        "quality": ("categories", "models"),
        "mean": ("models",),
        "ngram_idf": ("ngrams",),
        "ngram_weights": ("ngrams", "categories"),
        "ngram_shares": ("categories",),
    }
    numbers = (*CLASSIFIER_NUMBERS, "threshold")

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        C: float = 10.0,
        shrinkage: float = 10.0,
        soft: bool | None = None,
        ngrams: bool = True,
        fallback: bool = True,
        familiar_share: float = 0.99,
        coverage: float = 0.9,
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
        self.ngrams = ngrams
        self.fallback = fallback
        self.familiar_share = familiar_share
        self.coverage = coverage
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
        check_number(self, "familiar_share", self.familiar_share, 0, 1, low_open=True)
        check_number(self, "coverage", self.coverage, 0, 1, low_open=True)
        check_count(self, "random_state", self.random_state, 0)
        if self.soft is not None:
            check_bool(self, "soft", self.soft)
        check_bool(self, "ngrams", self.ngrams)
        check_bool(self, "fallback", self.fallback)
        check_text(self, "categories", self.categories)
        check_count(self, "n_clusters", self.n_clusters, 1)
        check_text(self, "general_category", self.general_category)
        if self.general_texts is not None:
            check_text(self, "general_texts", self.general_texts)
        for name in ("max_total_params_b", "max_active_params_b"):
            if getattr(self, name) is not None:
                check_number(self, name, getattr(self, name), 0, low_open=True)
        if self.soft and self._has_budget():
            raise RouterError("budgets need one category per query: leave out soft=true")

    def _inputs(self, queries: Sequence[Query]) -> Sequence[Any]:
        return list(zip(super()._inputs(queries), (q.text for q in queries), strict=True))

    @property
    def _mixes(self) -> bool:
        return not self._has_budget() if self.soft is None else self.soft

    @property
    def _falls_back(self) -> bool:
        return self.fallback and not self._has_budget()

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
        vectors, texts = rows.vectors, [*rows.texts, *extra]
        if extra:
            vectors = np.concatenate([vectors, self._encode_all(extra)])
        kept = np.arange(len(rows.models))
        table = self._scored(rows.scores, labels[: len(rows)], len(categories))
        if self._has_budget():
            table, picks = self._planned(table, labels[: len(rows)], rows)
            if self.max_total_params_b is not None:
                kept = np.unique(picks)
        self.models_ = [rows.models[j] for j in kept]
        self.quality_, self.mean_ = table[:-1, kept], table[-1, kept]
        self.categories_ = categories
        classifier, held_out = learn_categories(
            rows,
            texts,
            vectors,
            labels,
            categories,
            C=self.C,
            ngrams=self.ngrams,
            use_validation=self.categories == "table",
            random_state=self.random_state,
        )
        self._keep(classifier.calibrated(held_out.seen, held_out.labels, coverage=self.coverage))
        self._ready()
        by_category, by_all = self._predicted(held_out, rows.scores, labels[: len(rows)])
        held_out = replace(held_out, scores=held_out.scores[:, kept])
        self.threshold_, self.metrics_ = self._choose_threshold(held_out, by_category, by_all)
        self.metrics_ |= texts_facts(extra)

    def _named(self, rows: TrainingRows) -> tuple[list[str], list[str], list[str]]:
        """The category of each row, and further texts with theirs."""
        if self.categories == "table":
            if rows.categories is None:
                raise RouterError(
                    "the method 'coe' needs a column 'category' in prompts.parquet; add it, name a "
                    "CSV file of examples with categories=FILE, or set categories=domains or "
                    "categories=clusters"
                )
            return rows.categories, [], []
        if self.categories == "clusters":
            _, labels = cluster(rows.vectors, self.n_clusters, self.random_state)
            return [f"cluster {label}" for label in labels], [], []
        reference = DOMAINS if self.categories == "domains" else self.categories
        if reference.startswith(PACKAGE_PREFIX) or Path(reference).is_dir():
            return _named_by(reference, rows.texts), [], []
        import numpy as np

        texts, names = read_labelled_texts(self.categories)
        known = sorted(set(names))
        classifier = fit_classifier(
            self._encode_all(texts),
            np.array([known.index(name) for name in names], np.intp),
            known,
            C=self.C,
        )
        found = [
            known[int(classifier.evidence(vector, "").logits.argmax())] for vector in rows.vectors
        ]
        return found, texts, names

    def _keep(self, classifier: CategoryClassifier) -> None:
        """Take over a calibrated classifier as arrays and numbers."""
        import numpy as np

        for name in (*CLASSIFIER_ARRAYS, *CLASSIFIER_NUMBERS):
            setattr(self, f"{name}_", getattr(classifier, name))
        size = len(classifier.categories)
        ngrams = classifier.ngrams or NgramClassifier(
            np.zeros(0, np.float32), np.zeros((0, size), np.float32), np.zeros(size)
        )
        self.ngram_idf_, self.ngram_weights_ = ngrams.idf, ngrams.weights
        self.ngram_shares_ = ngrams.shares

    def _ready(self) -> None:
        ngrams = None
        sizes = (len(self.ngram_idf_), len(self.cue_means_))
        if sizes != ((N_GRAMS, 3) if self.ngrams else (0, 2)):
            raise RouterError(
                f"artefact of 'coe': 'ngram_idf' and 'cue_means' have {sizes} values, which does "
                f"not go with ngrams={self.ngrams}"
            )
        if self.ngrams:
            ngrams = NgramClassifier(self.ngram_idf_, self.ngram_weights_, self.ngram_shares_)
        parts = {n: getattr(self, f"{n}_") for n in (*CLASSIFIER_ARRAYS, *CLASSIFIER_NUMBERS)}
        self.classifier_ = CategoryClassifier(self.categories_ or [], ngrams=ngrams, **parts)

    def _has_budget(self) -> bool:
        return self.max_total_params_b is not None or self.max_active_params_b is not None

    def _planned(
        self, table: NDArray[np.float64], labels: NDArray[np.intp], rows: TrainingRows
    ) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Quality by category (last: of all prompts), none above the pick's, and the picks."""
        import numpy as np

        shares = np.bincount(labels, minlength=len(table)) / len(labels)
        total, active = self.max_total_params_b, self.max_active_params_b
        planned_for = shares > 0
        picks = np.zeros(len(table), np.intp)
        picks[planned_for] = assign(
            table[planned_for],
            shares[planned_for],
            total_params_b=None if total is None else _sizes(rows, "total_params_b"),
            max_total_params_b=total,
            active_params_b=None if active is None else _sizes(rows, "active_params_b"),
            max_active_params_b=active,
        )
        # Nothing says how often the others come; the best of the experts at hand answers them.
        at_hand = np.unique(picks[planned_for])
        picks[~planned_for] = at_hand[table[~planned_for][:, at_hand].argmax(axis=1)]
        # Never 0: an expert that was always wrong must not tie with those outside the plan.
        best = np.maximum(table[np.arange(len(table)), picks], BELOW_PICK)
        planned = np.minimum(table, best[:, None] - BELOW_PICK)
        planned[np.arange(len(table)), picks] = best
        return planned.clip(0.0), picks

    def _scored(
        self, scores: NDArray[np.float64], labels: NDArray[np.intp], n_categories: int
    ) -> NDArray[np.float64]:
        return shrunken_means(scores, labels, n_categories, float(self.shrinkage))

    def _predicted(
        self, held_out: HeldOut, scores: NDArray[np.float64], labels: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Quality of held-out rows by their categories, and by the general row.

        Both (n_rows, n_models), of tables that have not seen the rows' scores; but a plan, which
        has no general row to weigh it against, is the one that is used.
        """
        import numpy as np

        posterior = self.classifier_.probabilities(held_out.seen)
        whole = np.vstack([self.quality_, self.mean_])
        tables = [(np.full(len(posterior), True), whole)]
        if held_out.rows is not None and held_out.fold_of is not None and not self._has_budget():
            tables = []
            for fold in np.unique(held_out.fold_of):
                inside = held_out.fold_of == fold
                others = np.delete(np.arange(len(scores)), held_out.rows[inside])
                seen = others if len(others) else held_out.rows
                learnt = self._scored(scores[seen], labels[seen], posterior.shape[1])
                tables.append((inside, learnt))
        shape = (len(posterior), whole.shape[1])
        sure, general = np.zeros(shape), np.zeros(shape)
        for inside, table in tables:
            quality, mean = table[:-1], table[-1]
            named = posterior[inside].argmax(axis=1)
            sure[inside] = posterior[inside] @ quality if self._mixes else quality[named]
            general[inside] = self._general(quality, mean)
        return sure, general

    def _choose_threshold(
        self, held_out: HeldOut, sure: NDArray[np.float64], general: NDArray[np.float64]
    ) -> tuple[float, dict[str, Any]]:
        """The threshold that tells models apart best, and what was measured on held-out rows.

        Args:
            held_out: The rows.
            sure: Predicted by their categories, shape (n_rows, n_models).
            general: Predicted by the general row, same shape.
        """
        import numpy as np

        posterior = self.classifier_.probabilities(held_out.seen)
        confidence, category = posterior.max(axis=1), posterior.argmax(axis=1)
        far = self.classifier_.familiarity(held_out.seen) < 1 - self.familiar_share
        scores = held_out.scores
        if_unsure, if_sure = (_errors_of_differences(found, scores) for found in (general, sure))

        def error(unsure: NDArray[np.bool_]) -> NDArray[np.float64]:
            return np.where(unsure, if_unsure, if_sure)

        def got(unsure: NDArray[np.bool_]) -> NDArray[np.float64]:
            choice = np.where(unsure, general.argmax(axis=1), sure.argmax(axis=1))
            return np.asarray(scores[np.arange(len(scores)), choice])

        thresholds = THRESHOLDS if self._falls_back else ()
        sweep = {t: error((confidence < t) | far) for t in thresholds}
        means = {t: _mean(values) for t, values in sweep.items()}
        least = min(means.values(), default=0.0)
        equal = [t for t, mean in means.items() if mean <= least + 1e-12]
        threshold = equal[len(equal) // 2] if equal else 0.0
        if threshold and not clearly_above(sweep[0.0], sweep[threshold], TOLERANCE):
            threshold = 0.0
        known = held_out.labels >= 0
        correct = category[known] == held_out.labels[known]
        likely = self.classifier_.likely(posterior[known])
        covered = likely[np.arange(len(likely)), held_out.labels[known]]
        unsure = ((confidence < threshold) | far) & self._falls_back
        return threshold, {
            "held_out_rows": len(posterior),
            "held_out_accuracy": _mean(correct.astype(float)) if len(correct) else None,
            "held_out_ece": expected_calibration_error(confidence[known], correct),
            "held_out_coverage": _mean(covered.astype(float)),
            "held_out_likely_categories": _mean(likely.sum(axis=1).astype(float)),
            "held_out_score": _mean(got(unsure)),
            "held_out_score_without_fallback": _mean(got(np.zeros(len(far), bool))),
            "held_out_fallback_share": float(unsure.mean()),
            "score_by_threshold": {
                str(t): round(_mean(got((confidence < t) | far)), 6) for t in thresholds
            },
            "error_by_threshold": {str(t): round(mean, 6) for t, mean in means.items()},
        }

    def _general(
        self, quality: NDArray[np.float64], mean: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The general category's row if it was scored, else that of all prompts."""
        row = mean
        if self.categories_ and self.general_category in self.categories_:
            row = quality[self.categories_.index(self.general_category)]
        return row

    def _row(self, posterior: NDArray[np.float64], unsure: bool) -> NDArray[np.float64]:
        """Quality of all fitted models, shape (n_models,)."""
        if unsure:
            return self._general(self.quality_, self.mean_)
        row: NDArray[np.float64]
        if self._mixes:
            row = (self.quality_ * posterior[:, None]).sum(axis=0)
        else:
            row = self.quality_[int(posterior.argmax())]
        return row

    def _predict_one(self, given: Any) -> tuple[NDArray[np.floating], Explanation]:
        vector, text = given
        seen = self.classifier_.evidence(vector, text)
        posterior = self.classifier_.probabilities(seen)
        best = int(posterior.argmax())
        confidence = float(posterior[best])
        familiarity = float(self.classifier_.familiarity(seen))
        far = familiarity < 1 - self.familiar_share
        unsure = self._falls_back and (confidence < self.threshold_ or far)
        names = self.classifier_.categories
        return self._row(posterior, unsure), Explanation(
            category=names[best],
            confidence=confidence,
            fallback=unsure and names[best] != self.general_category,
            detail={
                "probabilities": dict(zip(names, posterior.tolist(), strict=True)),
                "likely": [
                    name
                    for name, chosen in zip(names, self.classifier_.likely(posterior), strict=True)
                    if chosen
                ],
                "familiarity": familiarity,
            },
        )


def _named_by(reference: str, texts: Sequence[str]) -> list[str]:
    """The category that a fitted router of this method names for each text."""
    try:
        namer = CoERouter.load(resolve_path(reference))
    except ExpertConfigError as exc:
        raise RouterError(f"categories: {exc}") from exc
    found = namer.predict([Query(text) for text in texts], namer.models).explanations
    return [str(explanation.category) for explanation in found]


def _errors_of_differences(
    quality: NDArray[np.float64], scores: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean squared error of how far each model is from the mean of all, shape (n_rows,)."""
    import numpy as np

    present = ~np.isnan(scores)
    number = np.maximum(present.sum(axis=1, keepdims=True), 1)
    gaps = np.where(present, quality - scores, 0.0)
    gaps -= np.where(present, gaps.sum(axis=1, keepdims=True) / number, 0.0)
    errors = (gaps**2).sum(axis=1) / number[:, 0]
    return np.where(present.any(axis=1), errors, np.nan)


def _mean(values: NDArray[np.float64]) -> float:
    import numpy as np

    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0


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
