"""UniRoute: a model is its error rate per cluster of prompts, so new models need no retraining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.clusters import ClusterRouter
from routers.encoders import DEFAULT_ENCODER, Encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["UniRouteRouter"]


class UniRouteRouter(ClusterRouter):
    """Clusters come from prompts alone; each model is described by its mean errors in them.

    ``add_model`` describes a model that training never saw, from its scores on a few hundred
    prompts of any kind.

    Args:
        encoder: An encoder's name or an encoder.
        n_clusters: Number of clusters; few enough that a new model's prompts reach all of them.
        top_k: How many of the nearest clusters count in predicting.
        beta: How fast a cluster's weight falls with its cosine distance.
        shrinkage: Number of prompts with the model's mean error that each cluster's is mixed with.
        random_state: Seed of the initial centres.

    Attributes:
        centres_: Unit vectors, shape (n_clusters, width).
        errors_: Error rates, shape (n_models, n_clusters): the paper's Psi.

    References:
        Jitkrittum et al., "Universal Model Routing for Efficient LLM Inference"
        (arXiv:2502.08773), the k-means variant. Departs from it in queries' soft memberships and in
        shrinking error rates, without which a cluster that a new model has two prompts of is noise.
    """

    method = "uniroute"
    arrays: ClassVar = {"centres": ("clusters", "width"), "errors": ("models", "clusters")}

    errors_: NDArray[np.float64]

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        n_clusters: int = 24,
        top_k: int = 3,
        beta: float = 9.0,
        shrinkage: float = 10.0,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.top_k = top_k
        self.beta = beta
        self.shrinkage = shrinkage
        self.random_state = random_state

    def _profiles(self, means: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        return {"errors": 1.0 - means.T}

    def _known_means(self) -> NDArray[np.float64]:
        return 1.0 - self.errors_.T

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        nearest, weights = self._nearest(given)
        error = (self.errors_[:, nearest] * weights).sum(axis=1)
        return 1.0 - error, Explanation(detail={"cluster": int(nearest[0])})
