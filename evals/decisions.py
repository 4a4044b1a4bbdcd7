"""What routers and policies decide on a table's prompts. Reads no outcome; prints nothing."""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.costs import ExpectedCosts, cost_unit
from orchestrator.policies import Policy, UtilityPolicy, order_by_utility
from orchestrator.pool import estimated_tokens
from routers.base import Explanation, Measured, Query, Router, RouterError
from routers.outcomes import OutcomeTable, Prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Decisions",
    "allowed_positions",
    "decide",
    "decisions_sha256",
    "expected_of",
    "shared_pool",
]

# Where the cost-quality curve is drawn. Qualities differ by less than costs do, so most trade-offs
# lie near 1: even steps leave up to half of the curve's costs between two of them, these a quarter.
KNOBS = tuple(1 - (1 - step / 20) ** 3 for step in range(21))
TIMED_PROMPTS = 50
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a router and a policy chose, from prompts alone.

    Attributes:
        name: What the report calls the router.
        prompts: The prompts decided on.
        candidates: The models to choose from; the columns of ``quality``.
        quality: Predicted, shape (n_prompts, n_candidates).
        choice: Positions of the chosen models, shape (n_prompts,).
        policy: Who chose.
        cost_quality: The policy's knob.
        fallbacks: For how many prompts the router fell back to its general category.
        sha256: Hash of the decisions; see ``decisions_sha256``.
        microseconds: Median time of predicting for one prompt, encoding included.
        training_s: Seconds that training took; NaN where nobody knows.
        sweep: The choices at other values of the knob, for the cost-quality curve.
        asked: Positions of all models that shall answer, the chosen one first, for each prompt;
            none if the policy never wants more than one.
        explanations: What the router says of each prompt.
    """

    name: str
    prompts: Prompts
    candidates: list[str]
    quality: NDArray[np.float32]
    choice: NDArray[np.intp]
    policy: Policy
    cost_quality: float
    fallbacks: int
    sha256: str
    microseconds: float = float("nan")
    training_s: float = float("nan")
    sweep: dict[float, NDArray[np.intp]] = field(default_factory=dict)
    asked: list[list[int]] | None = None
    explanations: Sequence[Explanation] = ()

    @property
    def models(self) -> list[str]:
        """The chosen model of each prompt."""
        return [self.candidates[j] for j in self.choice]


def shared_pool(
    routers: Mapping[str, Router], table: OutcomeTable, models: Sequence[str] | None = None
) -> list[str]:
    """The models every router can predict for and the table knows, in the first router's order.

    Reads models' names, no score.

    Raises:
        RouterError: There is none, or a wanted model is not among them.
    """
    known = [set(router.models) for router in routers.values()]
    if table.has_outcomes:
        known.append(set(table.models))
    first = next(iter(routers.values())).models
    pool = [name for name in first if all(name in names for names in known)]
    if models is not None:
        for name in models:
            if name not in pool:
                listed = ", ".join(map(repr, pool)) or "none"
                raise RouterError(
                    f"unknown model {name!r}; known to all routers and the table: {listed}"
                )
        return list(models)
    if not pool:
        raise RouterError(
            "no model is known to every router and to the table; the first router knows "
            + ", ".join(map(repr, first))
        )
    return pool


def decide(
    name: str,
    router: Router,
    table: OutcomeTable,
    *,
    split: str,
    candidates: Sequence[str],
    policy: Policy | None = None,
    cost_quality: float | None = None,
    for_report: bool = True,
) -> Decisions:
    """Predict and choose for every prompt of a split. Reads no outcome.

    Costs are those a service expects: the prices of the cards, the prompt's length, and answers as
    long as the router saw in training; see ``orchestrator.policies``.

    Args:
        name: What the report calls the router.
        router: A fitted router.
        table: The table the prompts and cards come from.
        split: Which prompts.
        candidates: The models to choose from.
        policy: Quality less cost by default.
        cost_quality: The knob, instead of the policy's own.
        for_report: Whether to time predictions and to choose at all values of the knob, too.

    Raises:
        RouterError: The policy cannot decide among these candidates.
    """
    policy = policy or UtilityPolicy()
    knob = policy.cost_quality if cost_quality is None else cost_quality
    prompts = table.with_prompts_of(split)
    prediction = router.predict([Query(text) for text in prompts.texts], candidates)
    allowed = allowed_positions(router, policy, table, candidates)
    names, quality = [candidates[j] for j in allowed], prediction.quality[:, allowed]
    costs = expected_of(router, policy, table, prompts.texts, names)

    def chosen(at: float) -> NDArray[np.intp]:
        return allowed[policy.choices(names, quality, costs, cost_quality=at)]

    choice = chosen(knob)
    return Decisions(
        name=name,
        prompts=prompts,
        candidates=list(candidates),
        quality=prediction.quality,
        choice=choice,
        policy=policy,
        cost_quality=knob,
        fallbacks=sum(explanation.fallback for explanation in prediction.explanations),
        sha256=decisions_sha256(prompts.ids, [candidates[int(j)] for j in choice]),
        microseconds=_microseconds(router, prompts.texts, candidates)
        if for_report
        else float("nan"),
        sweep={at: chosen(at) for at in KNOBS} if for_report else {},
        asked=_asked(policy, names, quality, costs, knob, allowed),
        explanations=prediction.explanations,
    )


def expected_of(
    router: Router,
    policy: Policy,
    table: OutcomeTable,
    texts: Sequence[str],
    candidates: Sequence[str],
) -> NDArray[np.float64]:
    """What the policy weighs, as in serving, shape (n_texts, n_candidates).

    Args:
        router: Knows what was measured of the candidates' answers.
        policy: Knows what costs are.
        table: Has the candidates' cards.
        texts: The prompts.
        candidates: Those that the policy may choose.
    """
    cards = [table.card(model) for model in candidates]
    measured: Mapping[str, Measured] = getattr(router, "measured", {})
    tokens = [estimated_tokens(text) for text in texts]
    expected = ExpectedCosts.of(cards, measured, cost_unit(policy.cost, cards, measured))
    return expected.in_unit(expected.usd(tokens))


def allowed_positions(
    router: Router, policy: Policy, table: OutcomeTable, candidates: Sequence[str]
) -> NDArray[np.intp]:
    """Positions of the candidates that the policy may choose.

    Raises:
        RouterError: There is none, or the policy cannot tell.
    """
    import numpy as np

    for name in policy.named_experts:
        if name not in candidates:
            raise RouterError(f"the policy names {name!r}, which is none of the candidates")
    measured: Mapping[str, Measured] = getattr(router, "measured", {})
    try:
        excluded = policy.excluded([table.card(model) for model in candidates], measured)
    except ValueError as error:
        raise RouterError(f"policy: {error}") from error
    allowed = [j for j, name in enumerate(candidates) if name not in excluded]
    if not allowed:
        reasons = "; ".join(f"{name}: {why}" for name, why in excluded.items())
        raise RouterError(f"the policy leaves no candidate ({reasons})")
    return np.array(allowed, np.intp)


def _asked(
    policy: Policy,
    names: Sequence[str],
    quality: NDArray[np.float32],
    costs: NDArray[np.float64],
    knob: float,
    allowed: NDArray[np.intp],
) -> list[list[int]] | None:
    utilities = policy.utilities(names, quality, costs, cost_quality=knob)
    asked = []
    for row, utility in enumerate(utilities):
        order = order_by_utility(utility.tolist(), costs[row].tolist())
        width = policy.width([float(quality[row, j]) for j in order]) or 1
        asked.append([int(allowed[j]) for j in order[:width]])
    return asked if any(len(row) > 1 for row in asked) else None


def _microseconds(router: Router, texts: Sequence[str], candidates: Sequence[str]) -> float:
    times = []
    for text in texts[:TIMED_PROMPTS]:
        # Routers share a cache of vectors; a number makes a text of it that no router has seen.
        query = Query(f"{text} {next(_numbers)}")
        started = time.perf_counter()
        router.predict([query], candidates)
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


def decisions_sha256(prompt_ids: Sequence[str], models: Sequence[str]) -> str:
    """SHA-256 of the lines ``prompt_id,model``, each ended by a line break, as UTF-8."""
    lines = "".join(f"{p},{m}\n" for p, m in zip(prompt_ids, models, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
