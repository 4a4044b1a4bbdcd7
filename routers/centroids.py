"""A mean vector per model of the texts it was made for: adapters retrieved as documents are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation, RouterError
from routers.calibration import sigmoid
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.growing import GrowingRouter
from routers.params import check_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CentroidsRouter"]


class CentroidsRouter(GrowingRouter):
    """Predicts by the cosine of a query with the mean vector of each model's own texts.

    A model's own texts are the prompts of the category that bears its name, whatever was scored on
    them; if no category bears a model's name, those of the categories in which it is best. A model
    without texts, a base among its adapters, counts as good as a coin, so it is best where no other
    is as near as ``threshold``. Qualities are such that the softmax of
    their log-odds is TTMM's: ``w_k ~ exp(-(1 - cos_k) / beta^2)``. What is known of one model
    depends on no other, so one that joins or leaves changes nothing, and a rebuild gives the same.

    Args:
        encoder: An encoder's name or an encoder.
        beta: How fast a model's quality falls with the cosine.
        threshold: The cosine at which a model is as good as one without texts of its own.

    Attributes:
        centroids_: Unit vectors, shape (n_models, width); zeros for a model without texts.

    References:
        LoraRetriever (arXiv:2402.09997): mean embeddings of an adapter's samples. TTMM
        (arXiv:2505.14136): the weights; departs from it in vectors of whole prompts instead of
        their first fifty tokens, and in ``threshold`` for "nothing relevant", where the paper drops
        small weights, of which with few models there are none.
    """

    method = "centroids"
    arrays: ClassVar = {"centroids": ("models", "width")}

    centroids_: NDArray[np.float32]

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        beta: float = 0.2,
        threshold: float = 0.3,
    ) -> None:
        self.encoder = encoder
        self.beta = beta
        self.threshold = threshold

    def _check_params(self) -> None:
        super()._check_params()
        check_number(self, "beta", self.beta, 1e-3)
        check_number(self, "threshold", self.threshold, -1)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        if rows.categories is None:
            raise RouterError(
                "'centroids' needs a table with the column 'category', which says what models are "
                "for; 'collegium library table' writes one"
            )
        own = self._owners(rows)
        self.centroids_ = np.vstack(
            [_centroid(rows.vectors[own == model]) for model in range(len(rows.models))]
        )

    def _owners(self, rows: TrainingRows) -> NDArray[np.intp]:
        """Position of the model that each prompt is a text of, -1 for none; shape (n_prompts,)."""
        import numpy as np

        categories = np.array(rows.categories)
        named = {name: place for place, name in enumerate(rows.models)}
        if not set(rows.categories or ()) & named.keys():
            for category in np.unique(categories):
                scores = rows.scores[categories == category]
                run = ~np.isnan(scores)
                means = np.where(run, scores, 0.0).sum(axis=0) / run.sum(axis=0).clip(1)
                named[category] = int(np.where(run.any(axis=0), means, -1.0).argmax())
        return np.array([named.get(category, -1) for category in categories], np.intp)

    def _describe(
        self, vectors: NDArray[np.float32], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        """All texts are the new model's own."""
        return {"centroids": _centroid(vectors)}

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        own = self.centroids_.any(axis=1)
        cosines = np.where(own, self.centroids_ @ given, self.threshold)
        return sigmoid((cosines - self.threshold) / self.beta**2), Explanation()


def _centroid(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The direction of the mean, shape (1, width); zeros of nothing."""
    import numpy as np

    mean = vectors.sum(axis=0, keepdims=True, dtype=np.float64)
    length = max(float(np.linalg.norm(mean)), 1e-12)
    return np.asarray(mean / length, np.float32)
