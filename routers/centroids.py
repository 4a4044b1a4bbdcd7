"""A mean vector per model of the texts it was made for: adapters retrieved as documents are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation, RouterError
from routers.calibration import sigmoid
from routers.encoders import Encoder
from routers.fitted import TrainingRows
from routers.growing import GrowingRouter
from routers.params import check_number

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CentroidsRouter"]

# Of MiniLM's vectors alone, unknown domains lie among known ones.
ENCODER = "multilingual+minilm-l2-int8"
# Texts of a model that are kept, and how many there must be to say how far apart they lie.
KEPT, LEAST_TEXTS = 32, 8
# Log-odds of a model that is just better than a coin.
BETTER = 1e-3


class CentroidsRouter(GrowingRouter):
    """Predicts by how near a query is to the mean vector of each model's own texts.

    A model's own texts are the prompts of the category that bears its name, whatever was scored on
    them; if no category bears a model's name, those of the categories in which it is best. Nearness
    is the cosine of what sets query and texts apart from the mean of all domains, since vectors of
    short texts all point nearly the same way. Qualities are such that the softmax of their log-odds
    is TTMM's: ``w_k ~ exp(-(1 - cos_k) / beta^2)``.

    A model without texts, a base among its adapters, counts as good as a coin. It is best where no
    other is as near as ``threshold``, or as the farthest of its own texts where those lie
    further apart; and where texts that are no model's are nearer. A model that joins or leaves
    needs no training, and gives exactly what a rebuild does.

    Args:
        encoder: An encoder's name or an encoder.
        beta: How fast a model's quality falls with the cosine.
        threshold: The cosine from which on a model is better than one without texts of its own, or
            less if some of its own texts are not as near.

    Attributes:
        means_: Mean vectors of the models' own texts, shape (n_models, width); zeros for none.
        sizes_: How many those are, shape (n_models,).
        texts_: Vectors of some of them, shape (n_models, 32, width); zeros behind the last.
        others_: Mean vector of texts that are no model's, shape (width,); zeros for none.

    References:
        LoraRetriever (arXiv:2402.09997): mean embeddings of an adapter's samples. TTMM
        (arXiv:2505.14136): the weights. Departs from both in the mean that is taken away, from TTMM
        in vectors of whole prompts instead of their first fifty tokens, and in ``threshold`` for
        "nothing relevant", where the paper drops small weights, of which with few models there are
        none.
    """

    method = "centroids"
    arrays: ClassVar = {
        "means": ("models", "width"),
        "sizes": ("models",),
        "texts": ("models", "kept", "width"),
        "others": ("width",),
    }

    means_: NDArray[np.float64]
    sizes_: NDArray[np.int64]
    texts_: NDArray[np.float32]
    others_: NDArray[np.float64]

    def __init__(
        self,
        *,
        encoder: str | Encoder = ENCODER,
        beta: float = 0.2,
        threshold: float = 0.35,
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
        owners = self._owners(rows)
        described = [_described(rows.vectors[owners == m]) for m in range(len(rows.models))]
        self.means_, self.sizes_, self.texts_ = (
            np.concatenate([of[name] for of in described]) for name in ("means", "sizes", "texts")
        )
        self.others_ = _described(rows.vectors[owners < 0])["means"][0]

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
        return _described(vectors)

    def _ready(self) -> None:
        import numpy as np

        self._own = self.means_.any(axis=1)
        domains = [*self.means_[self._own], *([self.others_] if self.others_.any() else [])]
        # Of a single domain nothing is known but where it lies.
        self._centre = np.mean(domains, axis=0) if len(domains) > 1 else np.zeros_like(self.others_)
        self._centroids = _units(self.means_ - self._centre)
        self._other = _units(self.others_ - self._centre) if self.others_.any() else None
        self._edges = np.array([self._edge(model) for model in range(len(self.means_))])

    def _edge(self, model: int) -> float:
        """The cosine with a model's mean that all of its own texts reach, or the threshold."""
        import numpy as np

        size = int(self.sizes_[model])
        if size < LEAST_TEXTS:
            return self.threshold
        texts = self.texts_[model][:size].astype(np.float64)
        # Each with the mean of the others: its own part would make it look near.
        rest = (size * self.means_[model] - texts) / (size - 1)
        cosines = (_units(texts - self._centre) * _units(rest - self._centre)).sum(axis=1)
        return min(self.threshold, float(cosines.min()))

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        query = _units(given.astype(np.float64) - self._centre)
        cosines = np.where(self._own, self._centroids @ query, -1.0)
        other = -1.0 if self._other is None else float(self._other @ query)
        log_odds = (cosines - self.threshold) / self.beta**2
        log_odds[~self._own] = max(0.0, (other - self.threshold) / self.beta**2)
        nearest = int(cosines.argmax())
        if cosines[nearest] > max(other, self._edges[nearest]):
            log_odds[nearest] = max(log_odds[nearest], BETTER)
        return sigmoid(log_odds), Explanation()


def _described(vectors: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Mean, number, and some of a model's texts, with a first axis of length 1."""
    import numpy as np

    total = vectors.sum(axis=0, keepdims=True, dtype=np.float64)
    chosen = np.linspace(0, len(vectors) - 1, min(KEPT, len(vectors))).astype(np.intp)
    texts = np.zeros((1, KEPT, vectors.shape[1]), np.float32)
    texts[0, : len(chosen)] = vectors[chosen]
    means = total / max(1, len(vectors))
    return {"means": means, "sizes": np.array([len(vectors)]), "texts": texts}


def _units(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))
