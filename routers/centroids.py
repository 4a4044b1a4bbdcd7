"""A mean vector per model of the texts it was made for: adapters retrieved as documents are."""

from __future__ import annotations

from collections.abc import Sequence
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

    from routers.outcomes import OutcomeTable

__all__ = ["CentroidsRouter"]

# Among MiniLM's vectors alone, unknown domains lie as near as known ones in new words.
ENCODER = "multilingual+minilm-l2-int8"
# Log-odds of the best model. Above, qualities would lie so near 1 that their odds were lost.
MOST = 6.0
# Whose texts are no model's.
NOBODY = ""


class CentroidsRouter(GrowingRouter):
    """Predicts by how near a query is to the mean vector of each model's own texts.

    A model's own texts are the prompts of the category that bears its name, whatever was scored on
    them; if no category bears a model's name, those of the categories in which it is best. Nearness
    is the cosine of what sets query and texts apart from the mean of all domains, since vectors of
    short texts all point nearly the same way. Qualities are such that the softmax of their log-odds
    is TTMM's: ``w_k ~ exp(-(1 - cos_k) / beta^2)``.

    A model without texts, a base among its adapters, counts as if it were as near as ``threshold``,
    or as texts that are no model's. So it is best where no other is nearer.

    A model that joins or leaves needs no training, and gives exactly what a rebuild does. It brings
    its own texts and takes them with it: a rebuild without a model is one on a table without it and
    without the rows of its texts, which is what ``collegium library table`` writes of a library
    that it has left. On a table that keeps these rows they would be no model's. One that joins by a
    table of more than its own texts (``add_models``) has the texts that are no model's taken anew
    from there; the other models keep theirs.

    Args:
        encoder: An encoder's name or an encoder.
        beta: How fast a model's quality falls with the cosine.
        threshold: The cosine at which a model is as good as one without texts of its own.

    Attributes:
        means_: Mean vectors of the models' own texts, shape (n_models, width); zeros for none.
        others_: Mean vector of texts that are no model's, shape (width,); zeros for none.

    References:
        LoraRetriever (arXiv:2402.09997): mean embeddings of an adapter's samples. TTMM
        (arXiv:2505.14136): the weights. Departs from both in the mean that is taken away, from TTMM
        in vectors of whole prompts instead of their first fifty tokens, and in ``threshold`` for
        "nothing relevant", where the paper drops small weights, of which with few models there are
        none.
    """

    method = "centroids"
    arrays: ClassVar = {"means": ("models", "width"), "others": ("width",)}

    means_: NDArray[np.float64]
    others_: NDArray[np.float64]

    def __init__(
        self,
        *,
        encoder: str | Encoder = ENCODER,
        beta: float = 0.2,
        threshold: float = 0.275,
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

        own = _owners(rows, rows.models)
        self.means_ = np.vstack([_mean(rows.vectors[own == model]) for model in rows.models])
        self.others_ = _mean(rows.vectors[own == NOBODY])[0]

    def add_models(
        self, names: Sequence[str], table: OutcomeTable, *, split: str = "train"
    ) -> dict[str, int]:
        """Add models by their own texts in an outcome table; see ``GrowingRouter``.

        A category that bears the name of any model of the table is not one of no model.

        Raises:
            RouterError: A name is taken, or the table has no column ``category``.
        """
        rows = self._rows(table, split, [*self.models, *names])
        own = _owners(rows, [*self.models, *table.models])
        for name in names:
            self._check_free(name)
            self._append(name, {"means": _mean(rows.vectors[own == name])})
        # A table of the newcomers' texts alone says nothing of those that are no model's.
        if not set(own) <= set(names):
            self.others_ = _mean(rows.vectors[own == NOBODY])[0]
        self._models_changed()
        return {name: int((own == name).sum()) for name in names}

    def _describe(
        self, vectors: NDArray[np.float32], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        """All texts are the new model's own."""
        return {"means": _mean(vectors)}

    def _ready(self) -> None:
        import numpy as np

        self._own = self.means_.any(axis=1)
        domains = [*self.means_[self._own], *([self.others_] if self.others_.any() else [])]
        # Of a single domain nothing is known but where it lies.
        self._centre = np.mean(domains, axis=0) if len(domains) > 1 else np.zeros_like(self.others_)
        self._centroids = np.array([_unit(mean - self._centre) for mean in self.means_])
        self._other = _unit(self.others_ - self._centre) if self.others_.any() else self.others_

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        query = _unit(given.astype(np.float64) - self._centre)
        other = max(self.threshold, float(self._other @ query))
        cosines = np.where(self._own, self._centroids @ query, other)
        log_odds = (cosines - self.threshold) / self.beta**2
        log_odds -= max(0.0, float(log_odds.max()) - MOST)
        return sigmoid(log_odds), Explanation()


def _owners(rows: TrainingRows, models: Sequence[str]) -> NDArray[np.str_]:
    """Name of the model that each prompt is a text of, shape (n_prompts,).

    Args:
        rows: With scores of the models that compete where no category bears a model's name.
        models: All that categories may be named after.
    """
    import numpy as np

    if rows.categories is None:
        raise RouterError(
            "'centroids' needs a table with the column 'category', which says what models are "
            "for; 'collegium library table' writes one"
        )
    categories = np.array(rows.categories)
    owners = {name: name for name in models}
    if not set(rows.categories) & owners.keys():
        for category in np.unique(categories):
            scores = rows.scores[categories == category]
            run = ~np.isnan(scores)
            means = np.where(run, scores, 0.0).sum(axis=0) / run.sum(axis=0).clip(1)
            best = int(np.where(run.any(axis=0), means, -1.0).argmax())
            owners[category] = rows.models[best]
    return np.array([owners.get(category, NOBODY) for category in rows.categories])


def _mean(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of vectors, shape (1, width); zeros of nothing."""
    import numpy as np

    total = vectors.sum(axis=0, keepdims=True, dtype=np.float64)
    return np.asarray(total / max(1, len(vectors)))


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))
