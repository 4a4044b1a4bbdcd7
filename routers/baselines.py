"""What every router must beat: chance, best single model, prompt length, true category's best.

All but the last are routers like any other. The category table needs the true category, which no
request carries, so it is a function for evaluations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from routers.base import Explanation, Query
from routers.fitted import FittedRouter, TrainingRows
from routers.params import check_count, check_number
from routers.training import overall_means, shrunken_means

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BestSingleRouter", "RandomRouter", "category_table_choice"]


class BestSingleRouter(FittedRouter):
    """Predicts each model's mean training score, so one model is always the best.

    Where cells are missing, means are over categories, if known (``overall_means``). Trains in
    milliseconds, predicts in microseconds. Models without a training score cannot be predicted for.

    Attributes:
        quality_: Mean scores, shape (n_models,).
    """

    method = "best_single"
    arrays: ClassVar = {"quality": ("models",)}

    def __init__(self) -> None:
        pass

    def _learn(self, rows: TrainingRows) -> None:
        self.quality_ = overall_means(rows.scores, rows.categories)

    def _predict_one(self, given: Query) -> tuple[NDArray[np.floating], Explanation]:
        return self.quality_, Explanation()


class LengthRouter(FittedRouter):
    """Predicts by the prompt's length alone: mean scores of short, middling and long prompts.

    Args:
        bins: Number of ranges of length, each with as many training prompts.
        shrinkage: Number of prompts with the model's mean score that each mean is mixed with.

    Attributes:
        edges_: Upper ends of all ranges but the last, in characters, shape (bins - 1,).
        quality_: Mean scores, shape (bins, n_models).
    """

    method = "length"
    arrays: ClassVar = {"edges": ("edges",), "quality": ("bins", "models")}

    def __init__(self, *, bins: int = 8, shrinkage: float = 10.0) -> None:
        self.bins = bins
        self.shrinkage = shrinkage

    def _check_params(self) -> None:
        check_count(self, "bins", self.bins, 1)
        check_number(self, "shrinkage", self.shrinkage, 0)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np

        lengths = [len(text) for text in rows.texts]
        self.edges_ = np.quantile(lengths, np.arange(1, self.bins) / self.bins)
        labels = np.searchsorted(self.edges_, lengths)
        means = shrunken_means(rows.scores, labels, self.bins, float(self.shrinkage))
        self.quality_ = means[:-1]

    def _predict_one(self, given: Query) -> tuple[NDArray[np.floating], Explanation]:
        import numpy as np

        return self.quality_[int(np.searchsorted(self.edges_, len(given.text)))], Explanation()


class RandomRouter(FittedRouter):
    """Predicts noise, uniform in [0, 1): each model is the best for an equal share of queries.

    The noise is a hash of query, model and seed, so the same query gets the same prediction.

    Args:
        random_state: Seed of the noise.
    """

    method = "random"

    def __init__(self, *, random_state: int = 0) -> None:
        self.random_state = random_state

    def _check_params(self) -> None:
        check_count(self, "random_state", self.random_state, 0)

    def _learn(self, rows: TrainingRows) -> None:
        pass

    def _predict_one(self, given: Query) -> tuple[NDArray[np.floating], Explanation]:
        import numpy as np

        noise = [self._noise(given.text, name) for name in self.models]
        return np.array(noise, np.float32), Explanation()

    def _noise(self, text: str, model: str) -> float:
        key = f"{self.random_state}\0{model}\0{text}".encode("utf-8", "surrogatepass")
        # 24 bits: what a float32 holds exactly.
        return int.from_bytes(hashlib.blake2b(key, digest_size=3).digest()) / 2**24


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
    scored = ~np.isnan(train_scores).all(axis=0)
    means = shrunken_means(train_scores, labels, len(known), 0.0)
    means[-1] = overall_means(train_scores, train_categories)
    best = np.where(scored, means, -1.0).argmax(axis=1)
    position = {name: number for number, name in enumerate(known)}
    rows = np.array([position.get(name, len(known)) for name in categories], np.intp)
    return np.asarray(best[rows])
