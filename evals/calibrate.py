"""Finds the number a policy needs to keep what it promises, on prompts with known outcomes.

Prices, thresholds and confidences are chosen from predictions and costs; only the confidence of
``top_p`` needs scores. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals.decisions import allowed_positions, decide, expected_of
from evals.evaluate import judge
from evals.metrics import Estimate
from orchestrator.costs import cost_unit
from orchestrator.policies import (
    BudgetPolicy,
    Policy,
    ThresholdPolicy,
    TopPPolicy,
    order_by_utility,
)
from routers.base import Query, Router, RouterError
from routers.outcomes import OutcomeTable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Calibrated", "calibrate", "find_price", "find_threshold"]

STEPS = 60
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A policy with its number, and what it did on the prompts it was found on.

    Attributes:
        policy: Ready for a config.
        score: Mean score of the chosen models.
        cost: Their mean cost, in ``cost_unit``.
        shares: Share of prompts each model got.
        experts_asked: Mean number of models that answer a prompt.
        coverage: Share of prompts on which one of them is right (the best score among them).
    """

    policy: Policy
    score: Estimate
    cost: float
    cost_unit: str
    shares: Mapping[str, float]
    experts_asked: float
    coverage: float | None


def calibrate(
    policy: Policy,
    router: Router,
    table: OutcomeTable,
    *,
    split: str,
    candidates: Sequence[str],
) -> Calibrated:
    """Find the policy's number on one split.

    Args:
        policy: With its goal: ``max_mean_cost``, ``strong_share`` or ``coverage``.
        router: A fitted router; it should not have learnt from these prompts.
        table: Prompts and outcomes.
        split: Which prompts.
        candidates: The models to choose from.

    Raises:
        RouterError: The goal is missing, or cannot be met.
    """
    kept = allowed_positions(router, policy, table, candidates)
    names = [candidates[j] for j in kept]
    texts = table.with_prompts_of(split).texts
    quality = router.predict([Query(text) for text in texts], names).quality
    costs = expected_of(router, policy, table, texts, names)
    if isinstance(policy, BudgetPolicy):
        # A price is worth nothing without its unit, and a service may know other costs.
        cards = [table.card(name) for name in names]
        unit = cost_unit(policy.cost, cards, getattr(router, "measured", {}))
        policy = policy.model_copy(update={"cost": unit})
        number: dict[str, float] = {"price": find_price(policy, names, quality, costs)}
    elif isinstance(policy, ThresholdPolicy):
        if len(names) < 2:
            raise RouterError(
                f"a ceiling of the policy leaves only {names[0]!r}: there is no threshold to find"
            )
        strong, weak = names.index(policy.strong), names.index(policy.weak)
        gap = quality[:, strong].astype("float64") - quality[:, weak].astype("float64")
        number = {"threshold": find_threshold(policy, gap)}
    elif isinstance(policy, TopPPolicy):
        scores = table.scores(split, names)
        number = {"confidence": _confidence(policy, names, quality, costs, scores)}
    else:
        raise RouterError(f"the policy {policy.type!r} has nothing to calibrate")
    return _measured(policy.model_copy(update=number), router, table, split, candidates)


def _measured(
    policy: Policy, router: Router, table: OutcomeTable, split: str, candidates: Sequence[str]
) -> Calibrated:
    made = decide(
        "router",
        router,
        table,
        split=split,
        candidates=candidates,
        policy=policy,
        for_report=False,
    )
    evaluation = judge([made], table, split=split, cost=policy.cost)
    line, figures = evaluation.lines[0], evaluation.figures["router"]
    best = figures.best_of_asked
    return Calibrated(
        policy,
        line.score,
        line.cost.mean,
        evaluation.cost_unit,
        line.shares,
        figures.experts_asked,
        None if best is None else best.mean,
    )


def find_price(
    policy: BudgetPolicy,
    names: Sequence[str],
    quality: NDArray[np.float32],
    costs: NDArray[np.float64],
) -> float:
    """The least price whose decisions keep to the bound; mean cost falls as the price rises.

    Args:
        policy: With its ``max_mean_cost``.
        names: Of the candidates.
        quality: Predicted, shape (n_prompts, n_candidates).
        costs: Expected, in the policy's unit, same shape.

    Raises:
        RouterError: The bound is missing, or cannot be kept.
    """
    import numpy as np

    bound = policy.max_mean_cost
    if bound is None:
        raise RouterError("the policy 'budget' needs its bound: set max_mean_cost")
    if not costs.any():
        raise RouterError(
            f"no candidate's cost is known in {policy.cost or 'any unit'}; give the table's models "
            "prices, parameters or latencies, or set cost to what is known of them"
        )

    def mean_cost(price: float) -> float:
        choice = policy.model_copy(update={"price": price}).choices(names, quality, costs)
        return float(costs[np.arange(len(costs)), choice].mean())

    if mean_cost(0.0) <= bound:
        return 0.0
    spread = costs.max() - costs.min()
    # From here on a unit of quality is worth less than the smallest difference that matters.
    high = 1e6 / spread if spread > 0 else 0.0
    if mean_cost(high) > bound:
        raise RouterError(
            f"no choice keeps to a mean cost of {bound:g}: the cheapest candidate "
            f"of each prompt costs {mean_cost(high):g}"
        )
    return _bisect(lambda price: mean_cost(price) <= bound, 1e-6 / spread, high)


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least number for which it holds, between two positive ones, by halving their ratio."""
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        if holds(middle):
            high = middle
        else:
            low = middle
    return float(high)


def find_threshold(policy: ThresholdPolicy, gap: NDArray[np.float64]) -> float:
    """The least threshold that gives the strong expert at most its share.

    Args:
        policy: With its ``strong_share``.
        gap: Predicted quality of the strong one less the weak one's, shape (n_prompts,).

    Raises:
        RouterError: The share is missing.
    """
    import numpy as np

    if policy.strong_share is None:
        raise RouterError("the policy 'threshold' needs its goal: set strong_share")
    falling, allowed = np.sort(gap)[::-1], int(policy.strong_share * len(gap))
    # Rounding must not make a gain out of a tie, nor a tie out of a gain.
    if allowed == len(gap):
        return float(falling[-1]) - ROUNDING
    return float(falling[allowed]) + ROUNDING


def _confidence(
    policy: TopPPolicy,
    candidates: Sequence[str],
    quality: NDArray[np.float32],
    costs: NDArray[np.float64],
    scores: NDArray[np.float64],
) -> float:
    """The least confidence whose sets of experts hold a right one as often as wanted."""
    import numpy as np

    if policy.coverage is None:
        raise RouterError("the policy 'top_p' needs its goal: set coverage")
    utilities = policy.utilities(candidates, quality, costs)
    orders = [
        order_by_utility(u.tolist(), c.tolist()) for u, c in zip(utilities, costs, strict=True)
    ]
    ordered = np.take_along_axis(np.where(np.isnan(scores), -1.0, scores), np.array(orders), axis=1)
    best_of = np.maximum.accumulate(ordered, axis=1)
    chances = np.take_along_axis(quality.astype(float), np.array(orders), axis=1)

    def covered(confidence: float) -> float:
        stopping = policy.model_copy(update={"confidence": confidence})
        widths = [stopping.width(row) for row in chances.tolist()]
        reached = best_of[np.arange(len(widths)), np.array(widths) - 1]
        # Prompts on which none of the asked was run tell nothing.
        return float(reached[reached >= 0].mean()) if (reached >= 0).any() else 0.0

    if covered(1.0) < policy.coverage:
        raise RouterError(
            f"{policy.max_experts} experts cover {covered(1.0):.3f} of the prompts, less than "
            f"{policy.coverage:g}: raise max_experts or lower the coverage"
        )
    grid = np.linspace(0.0, 1.0, 201)
    return float(next(c for c in grid if covered(float(c)) >= policy.coverage))
