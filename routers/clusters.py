"""Clusters of unit vectors: what the cluster-based routers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from routers.fitted import TrainingRows
from routers.growing import GrowingRouter
from routers.params import check_count, check_number
from routers.training import shrunken_means

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ClusterRouter", "cluster"]

# Of the ridge regression that likens a new model to known ones; 2 to 10 are alike.
LIKENESS_PENALTY = 5.0


def cluster(
    vectors: NDArray[np.float32], n_clusters: int, random_state: int
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Spherical k-means: scikit-learn's on unit vectors, centres scaled to length 1.

    Args:
        vectors: Shape (n_rows, width), each of length 1.
        n_clusters: How many; of up to 4,096 rows no more than there are different ones.
        random_state: Seed of the initial centres.

    Returns:
        Centres, shape (n_clusters, width), and the cluster of each row.
    """
    import numpy as np
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    distinct = len(np.unique(vectors, axis=0)) if len(vectors) <= 4096 else len(vectors)
    model = KMeans(min(n_clusters, distinct), n_init=1, random_state=random_state)
    # Threads would add up their parts of a centre in the order in which they finish.
    with threadpool_limits(1):
        labels = model.fit_predict(vectors)
    centres = model.cluster_centers_
    lengths = np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return (centres / lengths).astype(np.float32), np.asarray(labels, np.intp)


class ClusterRouter(GrowingRouter):
    """Base of routers that know a model by its mean scores in clusters of prompts.

    Clusters come from prompts alone, so a model that training never saw is described by its scores
    on a few hundred prompts of any kind (``add_model``), and where these are few, by the models
    it is like.

    Args:
        n_clusters: Number of clusters.
        top_k: How many of the nearest clusters count.
        beta: How fast a cluster's weight falls with its cosine distance.
        shrinkage: Number of prompts with the model's mean score that each cluster's is mixed with.
        random_state: Seed of the initial centres.

    Attributes:
        centres_: Unit vectors, shape (n_clusters, width).
    """

    n_clusters: int
    top_k: int
    beta: float
    shrinkage: float
    random_state: int

    centres_: NDArray[np.float32]

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "n_clusters", self.n_clusters, 1)
        check_count(self, "top_k", self.top_k, 1)
        check_number(self, "beta", self.beta, 0)
        check_number(self, "shrinkage", self.shrinkage, 0)
        check_count(self, "random_state", self.random_state, 0)

    def _profiles(self, means: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        """The method's one array with an axis ``models``.

        Args:
            means: Mean scores, shape (n_clusters, n_models).
        """
        raise NotImplementedError

    def _known_means(self) -> NDArray[np.float64]:
        """What ``_profiles`` was given, for the models it knows."""
        raise NotImplementedError

    def _learn(self, rows: TrainingRows) -> None:
        labels = self._cluster(rows)
        for name, array in self._profiles(self._means(rows.scores, labels)).items():
            setattr(self, f"{name}_", array)

    def _cluster(self, rows: TrainingRows) -> NDArray[np.intp]:
        """Set the centres; return the cluster of each row."""
        self.centres_, labels = cluster(rows.vectors, self.n_clusters, self.random_state)
        return labels

    def _means(self, scores: NDArray[np.float64], labels: NDArray[np.intp]) -> NDArray[np.float64]:
        """Shrunken mean scores, shape (n_clusters, n_models)."""
        return shrunken_means(scores, labels, len(self.centres_), float(self.shrinkage))[:-1]

    def _nearest(self, vector: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[Any]]:
        """The nearest clusters and their weights, softmax(-beta * cosine distance)."""
        import numpy as np

        similarity = self.centres_ @ vector
        nearest = np.argsort(-similarity, kind="stable")[: self.top_k]
        gaps = (similarity[nearest] - similarity[nearest[0]]).astype(np.float64)
        weights = np.exp(self.beta * gaps)
        return nearest, weights / weights.sum()

    def _describe(
        self, vectors: NDArray[np.float32], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        import numpy as np

        labels = np.array([int((self.centres_ @ vector).argmax()) for vector in vectors])
        expected = self._expected(labels, scores)
        above = self._means((scores - expected[labels])[:, None], labels)
        return self._profiles((expected[:, None] + above).clip(0.0, 1.0))

    def _expected(
        self, labels: NDArray[np.intp], scores: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What a new model's likeness to the others lets expect of it, shape (n_clusters,).

        Its few prompts per cluster are shrunk towards this. Its mean score alone would make it look
        too good in hard clusters and too bad in easy ones, beside models that are known there.
        """
        from sklearn.linear_model import Ridge

        known = self._known_means()
        level = known.mean(axis=1)
        others = known - level[:, None]
        model = Ridge(LIKENESS_PENALTY).fit(others[labels], scores - level[labels])
        expected: NDArray[np.float64] = level + model.predict(others)
        return expected
