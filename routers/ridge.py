"""Ridge regression from a query's vector to every model's score, with exact updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from routers.base import Explanation, RouterError
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.growing import GrowingRouter
from routers.params import check_number, not_fitted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RidgeRouter"]


class RidgeRouter(GrowingRouter):
    """Predicts scores linearly from the vector; rows and models come and go without retraining.

    What is kept are sums over rows, not rows: one Gram matrix per set of models that were run on
    the same prompts, and one vector per model. Adding rows and taking them away again is exact, in
    any order, up to rounding. Trains on 100,000 prompts in seconds; a prediction costs one product
    with the weights, and one with the inverse Gram matrix of the model that it predicts to be the
    best, for the uncertainty.

    Args:
        encoder: An encoder's name or an encoder.
        penalty: Strength of the L2 penalty, in prompts: the weight of a model's mean score against
            what its rows say.

    Attributes:
        grams_: Sums of outer products of vectors with a constant 1, shape (n_groups, width + 1,
            width + 1).
        groups_: The Gram matrix of each model, shape (n_models,).
        moments_: Sums of vectors times scores, shape (n_models, width + 1).

    References:
        The algebra of DUME and IR3DE (arXiv:2606.06098) over whole models. Departs from them in
        the inputs (sentence vectors instead of hidden states or token vectors), the targets (scores
        instead of domains), an unpenalised constant, and in leaving weights unnormalised, so that
        predictions are scores.
    """

    method = "ridge"
    arrays: ClassVar = {
        "grams": ("groups", "inputs", "inputs"),
        "groups": ("models",),
        "moments": ("models", "inputs"),
    }

    def __init__(self, *, encoder: str | Encoder = DEFAULT_ENCODER, penalty: float = 10.0) -> None:
        self.encoder = encoder
        self.penalty = penalty

    def _check_params(self) -> None:
        super()._check_params()
        check_number(self, "penalty", self.penalty, 0, low_open=True)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        present = ~np.isnan(rows.scores)
        masks, groups = np.unique(present.T, axis=0, return_inverse=True)
        inputs = _inputs(rows.vectors)
        self.grams_ = np.array([inputs[mask].T @ inputs[mask] for mask in masks])
        self.groups_ = groups.reshape(-1).astype(np.int64)
        self.moments_ = np.where(present, rows.scores, 0.0).T @ inputs

    def _ready(self) -> None:
        import numpy as np

        self._check_positions("groups", len(self.grams_))
        penalty = np.full(self.grams_.shape[1], self.penalty)
        penalty[-1] = 0.0
        regular = self.grams_ + np.diag(penalty)
        # Where fewer rows than one were seen the constant has no say; a trace keeps it solvable.
        regular[:, -1, -1] += 1e-9
        self._inverses = np.linalg.inv(regular)
        self._weights = np.array(
            [self._inverses[g] @ m for g, m in zip(self.groups_, self.moments_, strict=True)]
        )

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        inputs = np.append(given.astype(np.float64), 1.0)
        quality = (self._weights * inputs).sum(axis=1)
        spread = float(inputs @ self._inverses[self.groups_[quality.argmax()]] @ inputs)
        return quality, Explanation(detail={"uncertainty": max(spread, 0.0) ** 0.5})

    def partial_fit(
        self, texts: Sequence[str], scores: NDArray[np.float64], *, sign: int = 1
    ) -> Self:
        """Add rows, or with ``sign=-1`` take away rows that were added before.

        Args:
            texts: Prompts.
            scores: Shape (n_prompts, n_models), in the order of ``models``, NaN for missing cells.
            sign: 1 or -1.

        Raises:
            RouterError: It is not fitted, or the scores do not fit.
        """
        import numpy as np

        if self.models_ is None:
            raise not_fitted(self)
        if scores.shape != (len(texts), len(self.models_)):
            raise RouterError(f"scores must have the shape ({len(texts)}, {len(self.models_)})")
        inputs = _inputs(self._encode_all(texts))
        present = ~np.isnan(scores)
        # Models go on sharing a Gram matrix where they were run on the same of the new prompts.
        histories = np.column_stack([self.groups_, present.T])
        _, first, groups = np.unique(histories, axis=0, return_index=True, return_inverse=True)
        self.grams_ = np.array(
            [
                self.grams_[self.groups_[j]] + sign * (inputs[mask].T @ inputs[mask])
                for j, mask in zip(first, present.T[first], strict=True)
            ]
        )
        self.groups_ = groups.reshape(-1).astype(np.int64)
        self.moments_ = self.moments_ + sign * (np.where(present, scores, 0.0).T @ inputs)
        self._ready()
        return self

    def _describe(
        self, vectors: NDArray[np.float32], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        import numpy as np

        inputs = _inputs(vectors)
        self.grams_ = np.concatenate([self.grams_, (inputs.T @ inputs)[None]])
        return {"groups": np.array([len(self.grams_) - 1]), "moments": (scores @ inputs)[None]}

    def remove_model(self, name: str) -> Self:
        """Forget a model, and its Gram matrix if no other shares it.

        Raises:
            RouterError: It is unknown, or the only one.
        """
        import numpy as np

        super().remove_model(name)
        used, groups = np.unique(self.groups_, return_inverse=True)
        self.grams_, self.groups_ = self.grams_[used], groups.astype(np.int64)
        self._ready()
        return self


def _inputs(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors with a constant 1 behind, shape (n_rows, width + 1)."""
    import numpy as np

    return np.hstack([vectors.astype(np.float64), np.ones((len(vectors), 1))])
