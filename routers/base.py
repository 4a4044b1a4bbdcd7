"""The interface every router implements. Predicts quality; policies decide.

A router is fitted on an outcome table and saved as an artefact; see ``routers.artefact``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = [
    "Explanation",
    "Measured",
    "Prediction",
    "Query",
    "Router",
    "RouterError",
    "TrainableRouter",
]


class RouterError(Exception):
    """A router cannot be fitted, loaded or asked as wanted. One sentence that says what to do."""


@dataclass(frozen=True, slots=True)
class Query:
    """What a router sees of a request.

    Attributes:
        text: The last user message, or the prompt of a text completion.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a router predicts what it predicts for one query.

    Attributes:
        category: The category it took the query for; none if it knows no categories.
        confidence: Calibrated probability of that category, in [0, 1]; none if it has no such.
        fallback: Whether the prediction is that of the general category, for lack of confidence.
        detail: Further facts by name, such as the probability of each category.
    """

    category: str | None = None
    confidence: float | None = None
    fallback: bool = False
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted quality of each candidate for each query.

    Attributes:
        quality: Shape (n_queries, n_candidates), values in [0, 1].
        explanations: One per query.
    """

    quality: NDArray[np.float32]
    explanations: list[Explanation]


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over a model's answers in the outcome table a router was trained on, where known."""

    output_tokens: float | None = None
    latency_s: float | None = None
    cost_usd: float | None = None


@runtime_checkable
class Router(Protocol):
    """Predicts how well each candidate would answer each query.

    ``predict`` is a pure function of the router's state and each single query: a batch equals its
    queries one by one, bit for bit. It may be called from several threads at a time.
    """

    method: str
    """The name of its kind, as in the registry."""

    @property
    def models(self) -> list[str]:
        """Names of the models it can predict for."""
        ...

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        """Predict for the named candidates, in their order.

        Raises:
            RouterError: It is not fitted, or a candidate is unknown to it.
        """
        ...


@runtime_checkable
class TrainableRouter(Router, Protocol):
    """A router that learns from an outcome table. Constructors only store hyper-parameters."""

    loaded_from: Path | None
    """The artefact's folder."""

    def fit(self, table: OutcomeTable, *, split: str = "train") -> TrainableRouter:
        """Learn from the rows of one split, forgetting what was learnt before; return self.

        Raises:
            RouterError: The table lacks what the method needs.
        """
        ...

    def save(self, path: Path) -> None:
        """Write the fitted router as an artefact folder."""
        ...

    @classmethod
    def load(cls, path: Path) -> TrainableRouter:
        """Read an artefact folder that this class wrote."""
        ...
