"""What every router must beat: chance, the best single model, the best model per true category.

The first two are routers like any other. The category table needs the true category, which no
request carries, so it is a function for evaluations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from routers.artefact import Manifest, load_artefact, save_artefact
from routers.base import Explanation, Prediction, Query
from routers.params import candidate_columns, check_known_params, check_number, not_fitted
from routers.training import shrunken_means

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = ["BestSingleRouter", "RandomRouter", "category_table_choice"]


class BestSingleRouter:
    """Predicts each model's mean training score, so one model is always the best.

    Trains in milliseconds, predicts in microseconds. Models without a training score cannot be
    predicted for.

    Attributes:
        models_: Names of the columns of ``quality_``.
        quality_: Mean scores, shape (n_models,).
    """

    method = "best_single"

    def __init__(self) -> None:
        self.models_: list[str] | None = None
        self._table_sha256: str | None = None
        self._split: str | None = None

    @property
    def models(self) -> list[str]:
        """Names of the models it was fitted on."""
        if self.models_ is None:
            raise not_fitted(self)
        return list(self.models_)

    def fit(self, table: OutcomeTable, *, split: str = "train") -> Self:
        """Average the scores of one split."""
        import numpy as np

        scores = table.scores(split)
        means, kept = shrunken_means(scores, np.zeros(len(scores), np.intp), 0, 0.0)
        self.quality_ = means[-1, kept]
        self.models_ = [name for name, keep in zip(table.models, kept, strict=True) if keep]
        self._table_sha256, self._split = table.sha256, split
        return self

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        """Predict the same for every query."""
        import numpy as np

        columns = candidate_columns(self.models, candidates)
        row = self.quality_[columns].astype(np.float32)
        return Prediction(np.tile(row, (len(queries), 1)), [Explanation() for _ in queries])

    def save(self, path: Path) -> None:
        """Write the fitted router as an artefact folder."""
        manifest = Manifest(
            method=self.method,
            models=self.models,
            table_sha256=self._table_sha256,
            split=self._split,
        )
        save_artefact(path, manifest, {"quality": self.quality_})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an artefact folder that this class wrote."""
        artefact = load_artefact(path, method=cls.method)
        check_known_params(cls, artefact.manifest.params)
        router = cls()
        router.models_ = list(artefact.manifest.models)
        router.quality_ = artefact.array("quality", (len(router.models_),))
        router._table_sha256 = artefact.manifest.table_sha256
        router._split = artefact.manifest.split
        return router


class RandomRouter:
    """Predicts noise, uniform in [0, 1): each model is the best for an equal share of queries.

    The noise is a hash of query, model and seed, so the same query gets the same prediction.

    Args:
        random_state: Seed of the noise.
    """

    method = "random"

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state
        self.models_: list[str] | None = None
        self._split: str | None = None

    @property
    def models(self) -> list[str]:
        """Names of the models it was fitted on."""
        if self.models_ is None:
            raise not_fitted(self)
        return list(self.models_)

    def fit(self, table: OutcomeTable, *, split: str = "train") -> Self:
        """Take note of the models' names; reads no score."""
        check_number(self, "random_state", self.random_state, 0)
        table.rows(split)
        self.models_ = table.models
        self._split = split
        return self

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        """Predict noise for the named candidates."""
        import numpy as np

        candidate_columns(self.models, candidates)
        quality = np.array(
            [[self._noise(query.text, name) for name in candidates] for query in queries],
            np.float32,
        ).reshape(len(queries), len(candidates))
        return Prediction(quality, [Explanation() for _ in queries])

    def _noise(self, text: str, model: str) -> float:
        key = f"{self.random_state}\0{model}\0{text}".encode("utf-8", "surrogatepass")
        # 24 bits: what a float32 holds exactly.
        return int.from_bytes(hashlib.blake2b(key, digest_size=3).digest()) / 2**24

    def save(self, path: Path) -> None:
        """Write the fitted router as an artefact folder."""
        manifest = Manifest(
            method=self.method,
            models=self.models,
            split=self._split,
            params={"random_state": self.random_state},
        )
        save_artefact(path, manifest, {})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an artefact folder that this class wrote."""
        artefact = load_artefact(path, method=cls.method)
        check_known_params(cls, artefact.manifest.params)
        router = cls(**artefact.manifest.params)
        router.models_ = list(artefact.manifest.models)
        router._split = artefact.manifest.split
        return router


def category_table_choice(
    train_scores: NDArray[np.float64],
    train_categories: Sequence[str],
    categories: Sequence[str],
) -> NDArray[np.intp]:
    """The model with the best mean training score in each prompt's true category.

    Given the same rows twice, this is the category oracle (LLMRouterBench's "Max Expert").

    Args:
        train_scores: Shape (n_train, n_models), NaN for missing cells.
        train_categories: True category of each training row.
        categories: True category of each prompt to choose for. One without training rows gets the
            best single model.

    Returns:
        Positions of models, shape (n_prompts,). Ties go to the earlier model.

    References:
        "LLMRouterBench" (arXiv:2601.07206).
    """
    import numpy as np

    known = sorted(set(train_categories))
    labels = np.array([known.index(name) for name in train_categories], np.intp)
    means, kept = shrunken_means(train_scores, labels, len(known), 0.0)
    best = np.where(kept, means, -1.0).argmax(axis=1)
    position = {name: number for number, name in enumerate(known)}
    rows = np.array([position.get(name, len(known)) for name in categories], np.intp)
    return np.asarray(best[rows])
