"""Clusters of unit vectors: what the cluster-based routers share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["cluster", "soft_memberships"]


def cluster(
    vectors: NDArray[np.float32], n_clusters: int, random_state: int
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Spherical k-means: scikit-learn's on unit vectors, centres scaled to length 1.

    Args:
        vectors: Shape (n_rows, width), each of length 1.
        n_clusters: How many; no more than there are different rows are made.
        random_state: Seed of the initial centres.

    Returns:
        Centres, shape (n_clusters, width), and the cluster of each row.
    """
    import numpy as np
    from sklearn.cluster import KMeans

    distinct = len(np.unique(vectors, axis=0)) if len(vectors) <= 4096 else len(vectors)
    model = KMeans(min(n_clusters, distinct), n_init=1, random_state=random_state)
    labels = model.fit_predict(vectors)
    centres = model.cluster_centers_
    lengths = np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return (centres / lengths).astype(np.float32), np.asarray(labels, np.intp)


def soft_memberships(
    centres: NDArray[np.float32], vector: NDArray[np.float32], top_k: int, beta: float
) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """The nearest clusters of a vector and their weights, softmax(-beta * cosine distance)."""
    import numpy as np

    similarity = centres @ vector
    nearest = np.argsort(-similarity, kind="stable")[:top_k]
    weights = np.exp(beta * (similarity[nearest] - similarity[nearest[0]]).astype(np.float64))
    return nearest, weights / weights.sum()
