"""Finds the numbers of a cascade on prompts with known outcomes and confidences. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from evals.cascades import (
    Cells,
    calibrations_of,
    replay,
    simulated_threshold,
    tune_cascade,
    tune_cascade_routing,
)
from evals.decisions import allowed_positions, expected_of
from evals.metrics import Estimate, bootstrap_mean, chosen
from orchestrator.config import validation_lines
from orchestrator.costs import CostUnit, cost_unit
from orchestrator.policies import BudgetPolicy, Policy, UtilityPolicy
from orchestrator.strategies.cascade import CascadeStrategy
from orchestrator.strategies.confidence import Signal
from orchestrator.strict import StrictModel
from routers.base import Query, Router, RouterError
from routers.outcomes import OutcomeTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CalibratedCascade", "CascadeGoal", "calibrate_cascade", "make_goal"]


class CascadeGoal(StrictModel):
    """What a cascade shall keep to."""

    max_mean_cost: float | None = Field(default=None, gt=0)
    """The bound on the mean cost of all answers together, in the unit ``cost``; calls of the
    signals ``verify`` and ``judge`` come on top."""
    cost: CostUnit | None = None
    """What costs are; none takes the first that is known."""
    mode: Literal["cascade_routing", "cascade"] = "cascade_routing"
    """Which kind of cascade."""
    max_answers: int = Field(default=3, ge=1, le=16)
    """Experts that answer one request at most."""
    signal: Signal = "logprob"
    """What the table's confidences are."""
    judge: str | None = None
    """Who made them, for the signal ``judge``."""
    order: tuple[str, str] | None = None
    """With ``stand_ins``: the two of the cascade, of which the second needs no outcomes."""
    stand_ins: tuple[str, str] | None = None
    """Two weaker experts to find the threshold of ``order`` with."""
    charge: float | None = Field(default=None, ge=0, lt=1)
    """With ``stand_ins``: points of quality that an answer of the second must bring."""

    @model_validator(mode="after")
    def _one_goal(self) -> CascadeGoal:
        simulated = (self.order, self.stand_ins, self.charge)
        if any(part is not None for part in simulated):
            if None in simulated or self.mode != "cascade" or self.max_mean_cost is not None:
                raise ValueError(
                    "stand-ins need 'order', 'stand_ins' and 'charge' together, the mode "
                    "'cascade', and no 'max_mean_cost'"
                )
        elif self.max_mean_cost is None:
            raise ValueError("a cascade needs its bound: set max_mean_cost")
        return self


@dataclass(frozen=True, slots=True)
class CalibratedCascade:
    """A policy and a strategy for a route, and what they did on the prompts they were found on.

    Attributes:
        policy: What asking costs.
        strategy: The cascade.
        score: Mean score of the answers given; unknown where the cascade could not be replayed.
        cost: Mean expected cost of all calls, in ``cost_unit``.
        answers: Mean number of experts that answer a prompt.
    """

    policy: Policy
    strategy: CascadeStrategy
    score: Estimate | None = None
    cost: float = 0.0
    cost_unit: str = "usd"
    answers: float = 0.0

    @property
    def yaml(self) -> str:
        """Both as they stand under a route, without what is left at its default."""
        parts: dict[str, Any] = {"policy": self.policy, "strategy": self.strategy}
        fields = {
            name: {"type": part.type, **part.model_dump(mode="json", exclude_defaults=True)}
            for name, part in parts.items()
        }
        return yaml.safe_dump(fields, sort_keys=False)


def make_goal(fields: dict[str, Any]) -> CascadeGoal:
    """A goal from settings.

    Raises:
        RouterError: They are not a cascade's.
    """
    try:
        return CascadeGoal.model_validate(fields)
    except ValidationError as error:
        lines = (f"--set: {line}" for line in validation_lines(error))
        raise RouterError("; ".join(lines)) from None


def calibrate_cascade(
    goal: CascadeGoal,
    router: Router,
    table: OutcomeTable,
    *,
    split: str,
    candidates: Sequence[str],
) -> CalibratedCascade:
    """Find a cascade's numbers on one split.

    Args:
        goal: What it shall keep to.
        router: A fitted router; it should not have learnt from these prompts.
        table: Prompts, outcomes and confidences.
        split: Which prompts.
        candidates: The models to choose from.

    Raises:
        RouterError: There are no confidences, or the goal cannot be met.
    """
    import numpy as np

    if goal.stand_ins is not None:
        return _simulated(goal, router, table, split, candidates)
    policy = BudgetPolicy(type="budget", max_mean_cost=goal.max_mean_cost, cost=goal.cost)
    kept = allowed_positions(router, policy, table, candidates)
    names = [candidates[j] for j in kept]
    cards = [table.card(name) for name in names]
    unit = cost_unit(goal.cost, cards, getattr(router, "measured", {}))
    policy = policy.model_copy(update={"cost": unit})
    cells = _cells(router, policy, table, split, names)
    if goal.mode == "cascade":
        bound = goal.max_mean_cost or 0.0
        strategy = tune_cascade(
            cells, bound=bound, max_answers=goal.max_answers, signal=goal.signal, judge=goal.judge
        )
        made: tuple[Policy, CascadeStrategy] = UtilityPolicy(cost=unit), strategy
    else:
        made = tune_cascade_routing(
            policy, cells, max_answers=goal.max_answers, signal=goal.signal, judge=goal.judge
        )
    done = replay(made[1], made[0], cells)
    return CalibratedCascade(
        made[0],
        made[1],
        bootstrap_mean(chosen(cells.scores, done.given)),
        float(done.spent(cells.costs).mean()),
        unit,
        float(np.mean(done.answers)),
    )


def _cells(
    router: Router, policy: Policy, table: OutcomeTable, split: str, names: Sequence[str]
) -> Cells:
    import numpy as np

    texts = table.with_prompts_of(split).texts
    signals = table.confidences(split, names)
    if np.isnan(signals).all():
        raise RouterError(
            "the outcome table has no confidences, so no answer can be judged; fill its column "
            "'confidence' with 'collegium collect --confidence'"
        )
    quality = router.predict([Query(text) for text in texts], names).quality
    costs = expected_of(router, policy, table, texts, names)
    scores = table.scores(split, names)
    return Cells(names, quality.astype(np.float64), costs, scores, signals)


def _simulated(
    goal: CascadeGoal, router: Router, table: OutcomeTable, split: str, candidates: Sequence[str]
) -> CalibratedCascade:
    """The threshold of a cascade whose strong expert has no outcomes, from weaker stand-ins."""
    assert goal.order is not None
    assert goal.stand_ins is not None
    assert goal.charge is not None
    first, second = goal.stand_ins
    names = list(dict.fromkeys((first, second, goal.order[0])))
    for name in names:
        if name not in candidates:
            known = ", ".join(map(repr, candidates))
            raise RouterError(f"unknown model {name!r}; known to the router and table: {known}")
    policy = UtilityPolicy(cost=goal.cost)
    cells = _cells(router, policy, table, split, names)
    calibrations = calibrations_of(cells)
    for name in (first, goal.order[0]):
        if name not in calibrations:
            raise RouterError(f"{name!r} has too few confidences on split {split!r}")

    def chances(j: int) -> NDArray[Any]:
        import numpy as np

        known = calibrations[names[j]]
        pairs = zip(cells.signals[:, j].tolist(), cells.quality[:, j].tolist(), strict=True)
        # What is not known stays so, and does not count.
        return np.array([s if np.isnan(s) else known.chance(s, q) for s, q in pairs])

    strong = names.index(second)
    threshold = simulated_threshold(
        (chances(0), cells.scores[:, 0]), cells.scores[:, strong], charge=goal.charge
    )
    weak = goal.order[0]
    strategy = CascadeStrategy(
        mode="cascade",
        max_answers=2,
        signal=goal.signal,
        judge=goal.judge,
        calibrations={weak: calibrations[weak]},
        order=goal.order,
        thresholds=(round(threshold, 6),),
    )
    return CalibratedCascade(policy, strategy)
