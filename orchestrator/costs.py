"""What answers are expected to cost: from prices, sizes and measurements, before anybody is asked.

Numbers come as matrices of shape (n_requests, n_experts), as in ``orchestrator.policies``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from experts.types import ExpertCard
from routers.base import Measured

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CostUnit", "ExpectedCosts", "cost_per_answer", "cost_unit", "typical"]

# What is assumed of an answer nobody has seen yet, of an expert nobody has measured.
TYPICAL_ANSWER_TOKENS = 256

CostUnit = Literal["usd", "active_params_b", "latency_s"]


@dataclass(frozen=True, slots=True)
class ExpectedCosts:
    """Costs of some experts' answers; made once, asked for every request.

    Attributes:
        names: Of the experts.
        unit: What costs are.
        input_usd: Price of a token of the prompt, shape (n_experts,).
        output_usd: Price of a token of the answer, same shape.
        output_tokens: Of the expert's mean answer, same shape.
        answer_usd: What each answer costs besides: the tokens an expert puts into prompts by
            itself, or the measured mean cost where it has no price; same shape.
        answer_cost: Cost of an answer in a unit other than US dollars, 0 where unknown, same shape.
    """

    names: tuple[str, ...]
    unit: CostUnit
    input_usd: NDArray[np.float64]
    output_usd: NDArray[np.float64]
    output_tokens: NDArray[np.float64]
    answer_usd: NDArray[np.float64]
    answer_cost: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        cards: Sequence[ExpertCard],
        measured: Mapping[str, Measured] | None = None,
        unit: CostUnit = "usd",
    ) -> ExpectedCosts:
        """Costs of these experts.

        Args:
            cards: Of the experts.
            measured: What is known of their answers, by name.
            unit: What costs are.
        """
        import numpy as np

        measured = measured or {}
        known = [measured.get(card.name, Measured()) for card in cards]
        rows = [
            (
                card.input_usd_per_mtok / 1e6,
                card.output_usd_per_mtok / 1e6,
                one.output_tokens or TYPICAL_ANSWER_TOKENS,
                card.added_prompt_tokens * card.input_usd_per_mtok / 1e6
                if card.input_usd_per_mtok or card.output_usd_per_mtok
                else one.cost_usd or 0.0,
                0.0 if unit == "usd" else cost_per_answer(card, unit, measured) or 0.0,
            )
            for card, one in zip(cards, known, strict=True)
        ]
        columns = np.array(rows, np.float64).reshape(-1, 5).T
        return cls(tuple(card.name for card in cards), unit, *columns)

    def only(self, names: Sequence[str]) -> ExpectedCosts:
        """Those of some of the experts, in this order."""
        if tuple(names) == self.names:
            return self
        kept = [self.names.index(name) for name in names]
        return ExpectedCosts(
            tuple(names),
            self.unit,
            self.input_usd[kept],
            self.output_usd[kept],
            self.output_tokens[kept],
            self.answer_usd[kept],
            self.answer_cost[kept],
        )

    def usd(
        self, prompt_tokens: Sequence[float], *, token_limit: float | None = None
    ) -> NDArray[np.float64]:
        """What requests are expected to cost in US dollars, shape (n_requests, n_experts).

        Args:
            prompt_tokens: Of each request.
            token_limit: Tokens that answers may have.
        """
        import numpy as np

        tokens = self.output_tokens
        if token_limit is not None:
            tokens = np.minimum(tokens, token_limit)
        answers = tokens * self.output_usd + self.answer_usd
        return np.asarray(np.array(prompt_tokens, np.float64)[:, None] * self.input_usd + answers)

    def in_unit(self, usd: NDArray[np.float64]) -> NDArray[np.float64]:
        """The costs in the unit, same shape as the US dollars; 0 where unknown."""
        import numpy as np

        return usd if self.unit == "usd" else np.broadcast_to(self.answer_cost, usd.shape)


def cost_unit(
    wanted: CostUnit | None, cards: Sequence[ExpertCard], measured: Mapping[str, Measured]
) -> CostUnit:
    """The unit of cost, the same for all requests to the same experts.

    Where it is left open: US dollars if anybody has a price, else active parameters, which are what
    a self-hosted expert costs in compute, and where these are unknown too the latency.

    Args:
        wanted: The unit a policy names, if it does.
        cards: Of all experts that may be chosen.
        measured: What is known of experts' answers, by name.
    """
    if wanted is not None:
        return wanted
    units: tuple[CostUnit, ...] = get_args(CostUnit)
    return next((u for u in units if any(cost_per_answer(c, u, measured) for c in cards)), "usd")


def cost_per_answer(
    card: ExpertCard, unit: CostUnit, measured: Mapping[str, Measured]
) -> float | None:
    """An answer's cost, or for US dollars a number that is 0 or none where there is no price."""
    if unit == "usd":
        stated = measured.get(card.name, Measured()).cost_usd
        return card.input_usd_per_mtok or card.output_usd_per_mtok or stated
    if unit == "active_params_b":
        return card.active_params_b or card.total_params_b
    return typical(card, "latency_s", measured)


def typical(card: ExpertCard, field: str, measured: Mapping[str, Measured]) -> float | None:
    """What the card says, else what was measured while the router was trained."""
    stated: float | None = getattr(card, field)
    if stated is not None:
        return stated
    found: float | None = getattr(measured.get(card.name), field, None)
    return found
