"""Pilot vectors: each expert is where the prompts it won are. RouterRetriever over whole models."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation, RouterError
from routers.calibration import fit_platt, sigmoid
from routers.clusters import cluster
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.growing import GrowingRouter
from routers.params import check_count, check_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = ["PilotsRouter"]

# Stands for the score of a model that a prompt was not run on.
MISSING = -1.0


class PilotsRouter(GrowingRouter):
    """Predicts by the nearest pilot of each model.

    In each category (or cluster, in a table without categories) every prompt votes for the models
    that scored best on it; the mean vector of a model's votes there is a pilot of that model. A
    query's greatest cosine with a model's pilots ranks the models; calibration makes it quality.

    Keeps its prompts and their scores, as ``knn`` does: a model that joins or leaves changes how
    prompts vote, so these are counted again. That takes no training, and gives what a rebuild does,
    on a table with the model's scores or without them; prompts stay when a model leaves. Votes
    compare models, so one joins by its scores on prompts that are known, or by a table
    (``add_models``), from which prompts that are new are taken over with the scores of all.

    Args:
        encoder: An encoder's name or an encoder.
        n_clusters: Number of clusters that stand in for categories in a table without them.
        least_votes: Votes that make a pilot; fewer are luck.
        random_state: Seed of the clusters.

    Attributes:
        vectors_: Of the prompts, shape (n_prompts, width).
        groups_: Category or cluster of each, shape (n_prompts,).
        scores_: Shape (n_prompts, n_models), -1 where missing.
        pilots_: Counted from these; unit vectors, shape (n_pilots, width).
        winners_: Position of each pilot's model, shape (n_pilots,).
        slope_, biases_: Cosine to quality, see ``routers.calibration``; biases (n_models,).

    References:
        Lee et al., "RouterRetriever" (arXiv:2409.02685). Departs from it in ties: prompts that
        several models answer equally well vote for all of them with equal shares, where the paper's
        code gives them all to the first, and prompts on which all models tie do not vote.
    """

    method = "pilots"
    arrays: ClassVar = {
        "vectors": ("prompts", "width"),
        "groups": ("prompts",),
        "scores": ("prompts", "models"),
        "biases": ("models",),
    }
    numbers = ("slope",)

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        n_clusters: int = 16,
        least_votes: float = 5.0,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.least_votes = least_votes
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "n_clusters", self.n_clusters, 1)
        check_number(self, "least_votes", self.least_votes, 0)
        check_count(self, "random_state", self.random_state, 0)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        self.vectors_ = rows.vectors
        self.scores_ = np.where(np.isnan(rows.scores), MISSING, rows.scores)
        self._group(rows.categories)
        self._models_changed()

    def _group(self, categories: Sequence[str] | None) -> None:
        """Say which prompts vote together."""
        import numpy as np

        if categories is None:
            _, self.groups_ = cluster(self.vectors_, self.n_clusters, self.random_state)
        else:
            self.categories_ = sorted(set(categories))
            places = {name: place for place, name in enumerate(self.categories_)}
            self.groups_ = np.array([places[name] for name in categories], np.intp)

    def _models_changed(self) -> None:
        import numpy as np

        self._ready()
        scores = np.where(self.scores_ == MISSING, np.nan, self.scores_)
        self.biases_ = np.zeros(scores.shape[1])
        cosines = np.array([self._cosines(vector) for vector in self.vectors_])
        self.slope_, self.biases_ = fit_platt(cosines, scores)

    def _ready(self) -> None:
        if self.categories_ is not None:
            self._check_positions("groups", len(self.categories_))
        self._count_votes()

    def _count_votes(self) -> None:
        import numpy as np

        votes = _votes(np.where(self.scores_ == MISSING, np.nan, self.scores_))
        pilots, winners = [], []
        for group in np.unique(self.groups_):
            inside = self.groups_ == group
            for model, weights in enumerate(votes[inside].T):
                if weights.sum() >= max(self.least_votes, 1e-9):
                    mean = weights @ self.vectors_[inside]
                    pilots.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
                    winners.append(model)
        width = self.vectors_.shape[1]
        self.pilots_ = np.array(pilots, np.float32).reshape(len(pilots), width)
        self.winners_ = np.array(winners, np.int64)

    def _places(self, vectors: NDArray[np.float32]) -> NDArray[np.intp]:
        """Places of prompts among those it keeps, -1 for new ones, shape (n_prompts,).

        Prompts are told by their vectors; the second of two alike is the second of those it keeps.
        """
        import numpy as np

        kept: dict[bytes, deque[int]] = defaultdict(deque)
        for place, vector in enumerate(self.vectors_):
            kept[vector.tobytes()].append(place)
        found = [kept[vector.tobytes()] for vector in vectors]
        return np.array([places.popleft() if places else -1 for places in found], np.intp)

    def _describe(
        self, vectors: NDArray[np.float32], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:

        places = self._places(vectors)
        if (places < 0).any():
            raise RouterError(
                f"'pilots' compares models on the same prompts, and does not know "
                f"{(places < 0).sum()} of {len(places)}; give a table with the scores of all models"
            )
        return self._of_model(places, scores)

    def _of_model(
        self, places: NDArray[np.intp], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        """What it keeps of one model by its scores on the prompts at some places, NaN if missing.

        The bias is found when votes are counted.
        """
        import numpy as np

        column = np.full((len(self.vectors_), 1), MISSING)
        column[places, 0] = np.nan_to_num(scores, nan=MISSING)
        return {"scores": column, "biases": np.zeros(1)}

    def add_models(
        self, names: Sequence[str], table: OutcomeTable, *, split: str = "train"
    ) -> dict[str, int]:
        """Add models by their scores in an outcome table; see ``GrowingRouter``.

        Raises:
            RouterError: A name is taken, or the table lacks the categories of prompts that are new.
        """
        import numpy as np

        rows = self._rows(table, split, [*self.models, *names])
        self._add_prompts(rows)
        places = self._places(rows.vectors)
        found = {}
        for name in names:
            self._check_free(name)
            scores = rows.scores[:, rows.models.index(name)]
            self._append(name, self._of_model(places, scores))
            found[name] = int((~np.isnan(scores)).sum())
        self._models_changed()
        return found

    def _add_prompts(self, rows: TrainingRows) -> None:
        """Take over the prompts that are new, with the scores of the models that it knows."""
        import numpy as np

        new = np.flatnonzero(self._places(rows.vectors) < 0)
        if not len(new):
            return
        categories = None
        if self.categories_ is not None:
            if rows.categories is None:
                raise RouterError(
                    "'pilots' was trained on categories: give a table with the column 'category'"
                )
            old = [self.categories_[group] for group in self.groups_]
            categories = old + [rows.categories[row] for row in new]
        scores = np.full((len(new), len(self.models)), MISSING)
        for column, name in enumerate(self.models):
            if name in rows.models:
                scores[:, column] = rows.scores[new, rows.models.index(name)]
        self.scores_ = np.concatenate([self.scores_, np.nan_to_num(scores, nan=MISSING)])
        self.vectors_ = np.concatenate([self.vectors_, rows.vectors[new]])
        self._group(categories)

    def _cosines(self, vector: NDArray[np.float32]) -> NDArray[Any]:
        """With the nearest pilot of each model; 0 for a model without one."""
        import numpy as np

        best = np.full(len(self.biases_), -np.inf)
        np.maximum.at(best, self.winners_, self.pilots_ @ vector)
        return np.where(np.isfinite(best), best, 0.0)

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        return sigmoid(self.slope_ * self._cosines(given) + self.biases_), Explanation()


def _votes(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal shares of one vote for each prompt's best models, none where all that ran tie."""
    import numpy as np

    filled = np.where(np.isnan(scores), -1.0, scores)
    best = filled == filled.max(axis=1, keepdims=True)
    shares = best / best.sum(axis=1, keepdims=True)
    run = (~np.isnan(scores)).sum(axis=1)
    shares[best.sum(axis=1) >= run] = 0.0
    return np.asarray(shares)
