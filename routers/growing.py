"""Routers whose models come and go without retraining: what joining and leaving share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from routers.base import RouterError
from routers.fitted import VectorRouter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = ["GrowingRouter"]


class GrowingRouter(VectorRouter):
    """Base of routers that know each model by what stands in its own place of some arrays.

    A method says what a new model's places hold (``_describe``). Those are the arrays of ``arrays``
    that have an axis ``models``.
    """

    def _describe(
        self, vectors: NDArray[np.float32], scores: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        """Every array with an axis ``models``, for one new model; sets what else it needs.

        Args:
            vectors: Of the prompts it was run on, shape (n_prompts, width).
            scores: Its scores on them, shape (n_prompts,).
        """
        raise NotImplementedError

    def _models_changed(self) -> None:
        """Called when models have come or gone: learn again what depends on all of them."""
        self._ready()

    def add_models(
        self, names: Sequence[str], table: OutcomeTable, *, split: str = "train"
    ) -> dict[str, int]:
        """Add models by what an outcome table says of them, as ``collegium update`` does.

        Returns:
            How many prompts each was described by.

        Raises:
            RouterError: A name is taken, or the table does not describe its model.
        """
        import numpy as np

        texts, scores = table.with_prompts_of(split).texts, table.scores(split, names)
        found = {}
        for name, column in zip(names, scores.T, strict=True):
            some = np.flatnonzero(~np.isnan(column))
            self.add_model(name, [texts[row] for row in some], column[some])
            found[name] = len(some)
        return found

    def add_model(
        self, name: str, texts: Sequence[str], scores: Sequence[float] | NDArray[np.float64]
    ) -> Self:
        """Add a model by its scores on some prompts, any prompts; the others are untouched.

        Raises:
            RouterError: The name is taken, or texts and scores do not match.
        """
        import numpy as np

        values = np.asarray(scores, np.float64)
        self._check_free(name)
        if values.shape != (len(texts),) or not len(texts):
            raise RouterError(f"one score per text is needed, not {values.size} for {len(texts)}")
        if not ((values >= 0) & (values <= 1)).all():
            raise RouterError("scores must lie in [0, 1]; leave out texts that were not run")
        self._append(name, self._describe(self._encode_all(texts), values))
        self._models_changed()
        return self

    def _check_free(self, name: str) -> None:
        if name in self.models:
            raise RouterError(
                f"there is a model {name!r} already; give another name, or remove it first"
            )

    def _append(self, name: str, described: Mapping[str, NDArray[Any]]) -> None:
        """Give a model places in the arrays; ``_models_changed`` is to follow."""
        import numpy as np

        for array, new in described.items():
            axis = self.arrays[array].index("models")
            old = getattr(self, f"{array}_")
            setattr(self, f"{array}_", np.concatenate([old, new], axis=axis))
        self.models_ = [*self.models, name]

    def remove_model(self, name: str) -> Self:
        """Forget a model.

        Raises:
            RouterError: It is unknown, or the only one.
        """
        import numpy as np

        models = self.models
        if name not in models or len(models) == 1:
            raise RouterError(f"cannot remove {name!r} from {', '.join(map(repr, models))}")
        for array, axes in self.arrays.items():
            if "models" in axes:
                old = getattr(self, f"{array}_")
                kept = np.delete(old, models.index(name), axis=axes.index("models"))
                setattr(self, f"{array}_", kept)
        self.models_ = [other for other in models if other != name]
        self.measured = {other: of for other, of in self.measured.items() if other != name}
        self._models_changed()
        return self
