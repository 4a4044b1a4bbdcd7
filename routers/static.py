"""The same quality for every query: for pools nobody has measured yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from routers.base import Explanation, Prediction, Query, RouterError

__all__ = ["StaticRouter"]


class StaticRouter:
    """Predicts given numbers, whatever the query. It is configured, never fitted or saved.

    Args:
        quality: Expected score of each model, in [0, 1].
    """

    method = "static"

    def __init__(self, quality: Mapping[str, float]) -> None:
        self.quality = dict(quality)

    @property
    def models(self) -> list[str]:
        """Names of the rated models."""
        return list(self.quality)

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        """Predict for the named candidates, in their order."""
        import numpy as np

        unknown = [name for name in candidates if name not in self.quality]
        if unknown:
            known = ", ".join(map(repr, self.quality))
            raise RouterError(f"unknown model {unknown[0]!r}; known: {known}")
        row = np.array([self.quality[name] for name in candidates], dtype=np.float32)
        return Prediction(np.tile(row, (len(queries), 1)), [Explanation() for _ in queries])
