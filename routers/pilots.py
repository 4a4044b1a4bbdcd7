"""Pilot vectors: each expert is where the prompts it won are. RouterRetriever over whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.calibration import fit_platt, sigmoid
from routers.clusters import cluster
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows, VectorRouter
from routers.params import check_count, check_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PilotsRouter"]


class PilotsRouter(VectorRouter):
    """Predicts by the nearest pilot of each model.

    In each category (or cluster, in a table without categories) every prompt votes for the models
    that scored best on it; the mean vector of a model's votes there is a pilot of that model. A
    query's greatest cosine with a model's pilots ranks the models; calibration makes it quality.

    Args:
        encoder: An encoder's name or an encoder.
        n_clusters: Number of clusters that stand in for categories in a table without them.
        least_votes: Votes that make a pilot; fewer are luck.
        random_state: Seed of the clusters.

    Attributes:
        pilots_: Unit vectors, shape (n_pilots, width).
        winners_: Position of each pilot's model, shape (n_pilots,).
        slope_, biases_: Cosine to quality, see ``routers.calibration``; biases (n_models,).

    References:
        Lee et al., "RouterRetriever" (arXiv:2409.02685). Departs from it in ties: prompts that
        several models answer equally well vote for all of them with equal shares, where the paper's
        code gives them all to the first, and prompts on which all models tie do not vote.
    """

    method = "pilots"
    arrays: ClassVar = {
        "pilots": ("pilots", "width"),
        "winners": ("pilots",),
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

        if rows.categories is not None:
            names = sorted(set(rows.categories))
            groups = np.array([names.index(name) for name in rows.categories], np.intp)
        else:
            _, groups = cluster(rows.vectors, self.n_clusters, self.random_state)
        votes = _votes(rows.scores)
        pilots, winners = [], []
        for group in np.unique(groups):
            inside = groups == group
            for model in range(len(rows.models)):
                weights = votes[inside, model]
                if weights.sum() >= max(self.least_votes, 1e-9):
                    mean = weights @ rows.vectors[inside]
                    pilots.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
                    winners.append(model)
        width = rows.vectors.shape[1]
        self.pilots_ = np.array(pilots, np.float32).reshape(len(pilots), width)
        self.winners_ = np.array(winners, np.int64)
        self.biases_ = np.zeros(len(rows.models))
        cosines = np.array([self._cosines(vector) for vector in rows.vectors])
        self.slope_, self.biases_ = fit_platt(cosines, rows.scores)

    def _ready(self) -> None:
        self._check_positions("winners", len(self.models))

    def _cosines(self, vector: NDArray[np.float32]) -> NDArray[Any]:
        """With the nearest pilot of each model; 0 for a model without one."""
        import numpy as np

        best = np.full(len(self.biases_), -np.inf)
        np.maximum.at(best, self.winners_, self.pilots_ @ vector)
        return np.where(np.isfinite(best), best, 0.0)

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        return sigmoid(self.slope_ * self._cosines(given) + self.biases_), Explanation()


def _votes(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equal shares of one vote for each prompt's best models, none where all models tie."""
    import numpy as np

    filled = np.where(np.isnan(scores), -1.0, scores)
    best = filled == filled.max(axis=1, keepdims=True)
    shares = best / best.sum(axis=1, keepdims=True)
    run = (~np.isnan(scores)).sum(axis=1)
    shares[best.sum(axis=1) == run] = 0.0
    return np.asarray(shares)
