"""From predicted quality and cost to an order of experts. Policies decide, they predict nothing.

All policies are one formula. A candidate with predicted quality ``q`` and with the share ``r`` of
the dearest candidate's cost has, at the knob ``k`` (``cost_quality``), the utility

    k * (q - charge) - (1 - k) * r

and policies differ in the charge: points of quality that a candidate must be better by. So the
knob means the same everywhere: 0 takes the cheapest, 1 what the policy finds best, and raising it
never makes the expected cost of a decision fall. ``threshold`` alone takes its weak expert for the
cheapest, whatever it costs.

A policy sees one request's numbers only, so the same request gets the same order whatever else is
in flight. Numbers come as matrices of shape (n_requests, n_candidates): a service decides on one
row, an evaluation on thousands, with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from experts.types import ExpertCard
from orchestrator.costs import CostUnit, cost_per_answer, cost_unit, typical
from orchestrator.strict import StrictModel, default_type
from routers.base import Measured

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BudgetPolicy",
    "Policy",
    "PolicyConfig",
    "ThresholdPolicy",
    "TopPPolicy",
    "UtilityPolicy",
    "order_by_utility",
    "relative_costs",
]


# What a knob of 0 is taken for: of equally cheap experts the better one, instead of the first.
LEAST_KNOB = 1e-6


class Policy(StrictModel):
    """What all policies share: the knob, ceilings, and the expert that is as good as free.

    Ceilings mask: experts beyond them are no candidates, and the others are compared as if they
    were all there are. A router trained on all models need not be trained again for that.

    References:
        Jin et al., "MoE^2" (arXiv:2501.09410): a gate that is optimal for all experts stays so for
        those that keep to latency and energy limits, masked and normalised again. Zeng et al.,
        "AdaMoE" (arXiv:2406.13233): null experts, here an expert that others must beat by a margin.
    """

    type: str
    """Which kind of policy."""
    cost_quality: float = Field(default=1.0, ge=0, le=1)
    """0 takes the cheapest expert, 1 the best by this policy; the same number users send per
    request."""
    cost: CostUnit | None = None
    """What costs are; none takes the first of these that is known of any candidate."""
    max_latency_s: float | None = Field(default=None, gt=0)
    """Leave out experts whose answers typically take longer, in seconds."""
    max_energy_j: float | None = Field(default=None, gt=0)
    """Leave out experts whose answers typically take more energy, in joules."""
    null_expert: str | None = None
    """An expert that answers unless another is predicted better by ``null_margin``, such as the
    smallest model."""
    null_margin: float = Field(default=0.02, ge=0, le=1)
    """Points of quality by which others must be better than ``null_expert``."""

    @property
    def uncalibrated(self) -> str | None:
        """The number that ``collegium calibrate`` has to find before the policy can decide."""
        return None

    @property
    def named_experts(self) -> tuple[str, ...]:
        """Experts the policy speaks of."""
        return () if self.null_expert is None else (self.null_expert,)

    def excluded(
        self, cards: Sequence[ExpertCard], measured: Mapping[str, Measured]
    ) -> dict[str, str]:
        """Experts that may not be chosen, each with the reason.

        Raises:
            ValueError: A ceiling is set, and what it limits is unknown of an expert.
        """
        reasons = {}
        for field, unit, ceiling in (
            ("latency_s", "s", self.max_latency_s),
            ("energy_j", "J", self.max_energy_j),
        ):
            if ceiling is None:
                continue
            for card in cards:
                found = typical(card, field, measured)
                if found is None:
                    raise ValueError(
                        f"max_{field} needs {field!r} of every expert, and nobody knows that of "
                        f"{card.name!r}; write it into the expert's config"
                    )
                if found > ceiling:
                    reasons[card.name] = (
                        f"an answer typically takes {found:g} {unit}, more than {ceiling:g}"
                    )
        return reasons

    def charges(self, names: Sequence[str], costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points of quality each candidate must be better by.

        Args:
            names: Of the candidates.
            costs: Expected, in the policy's unit, shape (n_requests, n_candidates).

        Returns:
            Same shape as ``costs``.
        """
        import numpy as np

        charged = np.zeros_like(costs)
        if self.null_expert in names:
            charged += np.array([0.0 if name == self.null_expert else self.null_margin
                                 for name in names])  # fmt: skip
        return charged

    def relative(self, names: Sequence[str], costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Costs as the knob weighs them, the dearest 1, same shape as ``costs``."""
        return relative_costs(costs)

    def utilities(
        self,
        names: Sequence[str],
        quality: NDArray[np.floating],
        costs: NDArray[np.float64],
        *,
        cost_quality: float | None = None,
    ) -> NDArray[np.float64]:
        """The worth of each candidate; higher is better.

        Args:
            names: Of the candidates.
            quality: Predicted, in [0, 1], shape (n_requests, n_candidates).
            costs: Expected, in the policy's unit, same shape.
            cost_quality: The requests' own knob, instead of the policy's.

        Returns:
            Same shape.
        """
        knob = max(LEAST_KNOB, self.cost_quality if cost_quality is None else cost_quality)
        worth = quality.astype("float64") - self.charges(names, costs)
        return knob * worth - (1 - knob) * self.relative(names, costs)

    def choices(
        self,
        names: Sequence[str],
        quality: NDArray[np.floating],
        costs: NDArray[np.float64],
        *,
        cost_quality: float | None = None,
    ) -> NDArray[np.intp]:
        """Position of the best candidate of each request, shape (n_requests,)."""
        import numpy as np

        utilities = self.utilities(names, quality, costs, cost_quality=cost_quality)
        best = utilities == utilities.max(axis=1, keepdims=True)
        return np.asarray(np.where(best, costs, np.inf).argmin(axis=1), np.intp)

    def width(self, quality: Sequence[float]) -> int | None:
        """How many experts shall answer, by their predicted quality; none: the strategy says."""
        return None


class UtilityPolicy(Policy):
    """Order experts by quality less cost."""

    type: Literal["utility"] = "utility"
    """Which kind of policy."""


class BudgetPolicy(Policy):
    """Keep to a mean cost: a unit of cost is charged a price in points of quality.

    Of all ways to spend the same, choosing the best of quality less price times cost is the one
    with the highest mean quality. ``collegium calibrate`` finds the price.
    """

    type: Literal["budget"]
    """Which kind of policy."""
    max_mean_cost: float | None = Field(default=None, gt=0)
    """The bound, in the policy's unit, for ``collegium calibrate``."""
    price: float | None = Field(default=None, ge=0)
    """Points of quality that a unit of cost must bring; found by ``collegium calibrate``."""

    @property
    def uncalibrated(self) -> str | None:
        """``price``, if it is not known yet."""
        return "price" if self.price is None else None

    def excluded(
        self, cards: Sequence[ExpertCard], measured: Mapping[str, Measured]
    ) -> dict[str, str]:
        """As of all policies; an expert of unknown cost would pass for one that is free."""
        reasons = super().excluded(cards, measured)
        kept = [card for card in cards if card.name not in reasons]
        unit = cost_unit(self.cost, kept, measured)
        for card in kept:
            # A price of 0 is a price, as of an expert of one's own; but not if nobody has another.
            if unit != "usd" and cost_per_answer(card, unit, measured) is None:
                raise ValueError(
                    f"a budget in {unit} needs that of every expert, and nobody knows it of "
                    f"{card.name!r}"
                )
        return reasons

    def charges(self, names: Sequence[str], costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Price times cost."""
        return super().charges(names, costs) + _known(self.price) * costs


class ThresholdPolicy(Policy):
    """Two experts: the strong one only where it is predicted better by a threshold.

    References:
        Ong et al., "RouteLLM" (arXiv:2406.18665). Departs from it in thresholding the difference of
        two predicted qualities, which any router has, instead of a predicted win rate.
    """

    type: Literal["threshold"]
    """Which kind of policy."""
    weak: str
    """The expert that answers by default."""
    strong: str
    """The expert that answers where it is worth it."""
    strong_share: float | None = Field(default=None, ge=0, le=1)
    """Share of requests that the strong one shall get, for ``collegium calibrate``."""
    threshold: float | None = None
    """Points of quality the strong one must be better by; found by ``collegium calibrate``."""

    @model_validator(mode="after")
    def _two(self) -> ThresholdPolicy:
        if self.weak == self.strong:
            raise ValueError(f"weak and strong are both {self.weak!r}; name two experts")
        if self.null_expert not in (None, self.weak, self.strong):
            raise ValueError(
                f"null_expert {self.null_expert!r} must be {self.weak!r} or {self.strong!r}: the "
                "policy chooses between those two"
            )
        return self

    @property
    def uncalibrated(self) -> str | None:
        """``threshold``, if it is not known yet."""
        return "threshold" if self.threshold is None else None

    @property
    def named_experts(self) -> tuple[str, ...]:
        """The two, and the null expert."""
        return (self.weak, self.strong, *super().named_experts)

    def excluded(
        self, cards: Sequence[ExpertCard], measured: Mapping[str, Measured]
    ) -> dict[str, str]:
        """All but the two, and those beyond a ceiling."""
        pair = (self.weak, self.strong)
        others = {c.name: f"the policy chooses between {self.weak!r} and {self.strong!r}"
                  for c in cards if c.name not in pair}  # fmt: skip
        return others | super().excluded([card for card in cards if card.name in pair], measured)

    def charges(self, names: Sequence[str], costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The threshold for the strong one."""
        import numpy as np

        extra = [_known(self.threshold) if name == self.strong else 0.0 for name in names]
        return np.asarray(super().charges(names, costs) + np.array(extra))

    def relative(self, names: Sequence[str], costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """1 for the strong one, whatever it costs."""
        import numpy as np

        strong = np.array([float(name == self.strong) for name in names])
        return np.asarray(np.zeros_like(costs) + strong)


class TopPPolicy(Policy):
    """As many experts as it takes until one of them is right with enough confidence.

    Strategies that ask one expert take the first. Experts are taken in the order of utility until
    1 - prod(1 - quality) reaches ``confidence``, or there are ``max_experts``: without that cap,
    flat predictions would call everybody. Experts err on the same prompts, so the product is too
    sure of itself; ``collegium calibrate`` finds the ``confidence`` that reaches the wanted
    ``coverage`` on prompts with known outcomes.

    References:
        Huang et al., "Harder Tasks Need More Experts" (arXiv:2403.07652): as many experts as reach
        a cumulated probability. Departs from it in adding up qualities as chances of independent
        experts, which need not sum to 1, and in the cap.
    """

    type: Literal["top_p"]
    """Which kind of policy."""
    max_experts: int = Field(default=3, ge=1)
    """Experts at most."""
    coverage: float | None = Field(default=None, gt=0, lt=1)
    """Share of requests of which some asked expert shall be right, for ``collegium calibrate``."""
    confidence: float | None = Field(default=None, ge=0, le=1)
    """When to stop adding experts; found by ``collegium calibrate``."""

    @property
    def uncalibrated(self) -> str | None:
        """``confidence``, if it is not known yet."""
        return "confidence" if self.confidence is None else None

    def width(self, quality: Sequence[float]) -> int:
        """How many experts reach the confidence together."""
        wrong = 1.0
        for number, chance in enumerate(quality[: self.max_experts], start=1):
            wrong *= 1.0 - chance
            if 1.0 - wrong >= _known(self.confidence):
                return number
        return min(self.max_experts, len(quality))


PolicyConfig = Annotated[
    UtilityPolicy | BudgetPolicy | ThresholdPolicy | TopPPolicy,
    Field(discriminator="type"),
    default_type("utility"),
]


def order_by_utility(utilities: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Positions by falling utility; ties go to the cheaper, then to the earlier candidate."""
    return sorted(range(len(utilities)), key=lambda j: (-utilities[j], costs[j], j))


def relative_costs(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs on a scale where each request's dearest candidate has 1; same shape."""
    import numpy as np

    dearest = costs.max(axis=-1, keepdims=True, initial=0.0)
    return np.asarray(np.divide(costs, dearest, out=np.zeros_like(costs), where=dearest > 0))


def _known(number: float | None) -> float:
    if number is None:
        raise ValueError("the policy is not calibrated yet; run 'collegium calibrate'")
    return number
