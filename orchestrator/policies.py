"""From predicted quality and cost to an order of experts. Policies decide, they predict nothing.

A policy sees one request's numbers only, so the same request gets the same order whatever else is
in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from experts.types import ExpertCard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Policy", "UtilityPolicy", "expected_cost_usd", "relative_costs"]

# What is assumed of an answer nobody has seen yet, when the request sets no limit.
TYPICAL_ANSWER_TOKENS = 256


class Policy(Protocol):
    """Orders candidates, best first."""

    name: str

    def utilities(self, quality: Sequence[float], relative_cost: Sequence[float]) -> list[float]:
        """The worth of each candidate; higher is better."""
        ...


@dataclass(frozen=True, slots=True)
class UtilityPolicy:
    """Quality less cost, weighed by one knob.

    The utility of candidate ``j`` is ``cost_quality * quality[j] - (1 - cost_quality) *
    relative_cost[j]``. Ties go to the cheaper, then to the earlier candidate.

    Args:
        cost_quality: 0 takes the cheapest, 1 the best; the same number users send per request.

    Examples:
        >>> UtilityPolicy(1.0).choose([0.7, 0.9], [0.1, 1.0])
        [1, 0]
        >>> UtilityPolicy(0.5).choose([0.7, 0.9], [0.1, 1.0])
        [0, 1]
    """

    cost_quality: float = 1.0
    name: str = "utility"

    def utilities(self, quality: Sequence[float], relative_cost: Sequence[float]) -> list[float]:
        """The worth of each candidate; higher is better."""
        weight = self.cost_quality
        return [
            weight * float(q) - (1 - weight) * float(c)
            for q, c in zip(quality, relative_cost, strict=True)
        ]

    def choose(self, quality: Sequence[float], relative_cost: Sequence[float]) -> list[int]:
        """Indices of the candidates, best first.

        Args:
            quality: Predicted quality of each candidate, in [0, 1].
            relative_cost: Cost of each candidate, 1 for the dearest; see ``relative_costs``.
        """
        return order_by_utility(self.utilities(quality, relative_cost), relative_cost)

    def choose_all(
        self, quality: NDArray[np.floating], relative_cost: NDArray[np.float64]
    ) -> NDArray[np.intp]:
        """The first of ``choose`` for many requests at once.

        Args:
            quality: Shape (n_requests, n_candidates).
            relative_cost: Same shape.

        Returns:
            Shape (n_requests,).
        """
        import numpy as np

        weight = self.cost_quality
        utilities = weight * quality.astype(np.float64) - (1 - weight) * relative_cost
        best = utilities == utilities.max(axis=1, keepdims=True)
        return np.asarray(np.where(best, relative_cost, np.inf).argmin(axis=1), np.intp)


def order_by_utility(utilities: Sequence[float], relative_cost: Sequence[float]) -> list[int]:
    """Indices by falling utility; ties go to the cheaper, then to the earlier candidate."""
    return sorted(range(len(utilities)), key=lambda j: (-utilities[j], relative_cost[j], j))


def expected_cost_usd(
    card: ExpertCard, prompt_tokens: float, answer_tokens: float = TYPICAL_ANSWER_TOKENS
) -> float:
    """What one request is expected to cost with this expert, in US dollars."""
    input_usd = prompt_tokens * card.input_usd_per_mtok
    return (input_usd + answer_tokens * card.output_usd_per_mtok) / 1e6


def relative_costs(cards: Sequence[ExpertCard], costs_usd: Sequence[float]) -> list[float]:
    """Costs on a scale where the dearest candidate has 1.

    Where nobody has a price, active parameters stand in for it: they are what a self-hosted
    expert costs in compute. Where these are unknown too, all cost nothing.
    """
    costs = list(costs_usd)
    if not any(costs):
        costs = [card.active_params_b or card.total_params_b or 0.0 for card in cards]
    dearest = max(costs, default=0.0)
    return [cost / dearest for cost in costs] if dearest > 0 else [0.0] * len(costs)
