"""A route: its router's predictions and its policy make a decision. Asks nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from experts.base import AnyRequest
from experts.types import ExpertCard
from orchestrator.config import ConfigError, RouteConfig
from orchestrator.costs import ExpectedCosts, cost_unit
from orchestrator.decision import Candidate, Decision, SessionShare
from orchestrator.errors import BadRequestError, EmptyPoolError
from orchestrator.learning.learner import Learner
from orchestrator.options import RoutingOptions, below_quality
from orchestrator.policies import order_by_utility
from orchestrator.pool import estimated_prompt_tokens
from routers.base import Prediction, Query, Router, RouterError
from routers.static import StaticRouter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Route", "build_route", "too_dear"]

# Experts that one request may have asked together.
MAX_EXPERTS = 16


@dataclass(frozen=True, slots=True)
class Route:
    """A route that can decide.

    Attributes:
        name: What requests call it.
        config: As the user wrote it.
        router: Predicts.
        experts: Those that its policy may choose.
        excluded: The others, each with the reason.
        costs: What answers of ``experts`` are expected to cost.
        release: The router's release, if it has releases.
        learner: Corrects predictions by feedback, if the route learns.
    """

    name: str
    config: RouteConfig
    router: Router
    experts: tuple[str, ...]
    excluded: Mapping[str, str]
    costs: ExpectedCosts
    release: str | None = None
    learner: Learner | None = None

    def decide(
        self,
        request: AnyRequest,
        pool: Sequence[ExpertCard],
        prediction: Prediction,
        *,
        excluded: Mapping[str, str],
        options: RoutingOptions,
        decision_id: str,
        features: NDArray[np.float16] | None = None,
        session: SessionShare | None = None,
    ) -> Decision:
        """Weigh predictions against costs.

        Args:
            request: What is asked.
            pool: Cards of the experts that can serve it, one at least.
            prediction: Of them, in that order.
            excluded: Experts that cannot, each with the reason.
            options: What the request itself says of its routing.
            decision_id: The decision's id; says whether the route explores.
            features: What the learner knows the request by.
            session: What the earlier turns have to say.

        Raises:
            BadRequestError: ``top_k`` is too large.
            EmptyPoolError: The options leave nobody.
        """
        if options.top_k is not None and options.top_k > MAX_EXPERTS:
            raise BadRequestError(
                f"top_k: how many experts shall answer, at most {MAX_EXPERTS}, got "
                f"{options.top_k}; as a sampling parameter it goes to a named expert only",
                "top_k",
            )
        policy, names = self.config.policy, [card.name for card in pool]
        knob = policy.cost_quality if options.cost_quality is None else options.cost_quality
        quality: NDArray[np.floating] = prediction.quality
        why = prediction.explanations[0]
        expected = self.costs.only(names)
        usd = expected.usd([estimated_prompt_tokens(request)], token_limit=request.token_limit)
        hopes = quality
        if self.learner is not None and features is not None:
            learnt = self.learner.correct(decision_id, features, quality, names, usd)
            quality, hopes = learnt.quality, learnt.quality + learnt.bonus
            why = replace(why, detail={**why.detail, "learning": learnt.detail})
        if session is not None:
            usd[:, names.index(session.expert)] -= session.cached_usd
        refused = below_quality(quality[0], names, options.min_quality or 0.0)
        refused |= too_dear(names, usd, options)
        if refused:
            # Those that are left are compared as if they were all there are.
            kept = [j for j, expert in enumerate(names) if expert not in refused]
            excluded = {**excluded, **refused}
            if not kept:
                raise EmptyPoolError(self.name, excluded)
            names, usd = [names[j] for j in kept], usd[:, kept]
            quality, hopes = quality[:, kept], hopes[:, kept]
            expected = self.costs.only(names)
        costs = expected.in_unit(usd)
        qualities = quality[0].tolist()
        if session is not None and session.expert in names:
            others = [j for j, expert in enumerate(names) if expert != session.expert]
            hopes = hopes.copy()
            hopes[:, others] -= session.stickiness
        utilities = policy.utilities(names, hopes, costs, cost_quality=knob)[0].tolist()
        candidates = tuple(
            Candidate(names[j], qualities[j], float(usd[0, j]), utilities[j])
            for j in order_by_utility(utilities, costs[0].tolist())
        )
        if session is not None and session.tool_call:
            # Only who called a tool has thought of what to do with its result. The order is stable.
            candidates = tuple(sorted(candidates, key=lambda one: one.expert != session.expert))
        width = options.top_k or policy.width([one.quality or 0.0 for one in candidates])
        return Decision(
            experts=tuple(candidate.expert for candidate in candidates),
            width=None if width is None else min(width, len(candidates)),
            route=self.name,
            router=self.config.router,
            router_release=self.release,
            policy=policy.type,
            strategy=self.config.strategy.type,
            cost_quality=knob,
            candidates=candidates,
            excluded=excluded,
            category=why.category,
            confidence=why.confidence,
            fallback=why.fallback,
            detail=why.detail,
            id=decision_id,
            session=session,
        )


def build_route(
    name: str,
    route: RouteConfig,
    router: Router,
    cards: Mapping[str, ExpertCard],
    release: str | None,
) -> Route:
    """A route as its config describes it.

    Args:
        name: Of the route.
        route: Its config.
        router: Its router.
        cards: Of all experts.
        release: The router's release, if it has releases.

    Raises:
        ConfigError: Router, policy and experts do not go together.
    """
    experts = route.experts or tuple(card for card in cards if card in router.models)
    wanted = dict.fromkeys((*experts, *route.policy.named_experts))
    unknown = [expert for expert in wanted if expert not in router.models]
    if unknown or not experts:
        raise ConfigError(
            f"route {name!r}: router {route.router!r} knows "
            f"{', '.join(map(repr, router.models))}, but not "
            f"{', '.join(map(repr, unknown or cards))}; train it on them, "
            f"or list only known ones under the route's 'experts'"
        )
    measured = getattr(router, "measured", {})
    try:
        excluded = route.policy.excluded([cards[expert] for expert in experts], measured)
    except ValueError as error:
        raise ConfigError(f"route {name!r}: policy: {error}") from error
    try:
        # A broken router shows now, and what it loads on first use does not delay a request.
        router.predict([Query("warm-up")], experts)
    except RouterError as error:
        raise ConfigError(f"route {name!r}: router {route.router!r}: {error}") from error
    if not (allowed := tuple(expert for expert in experts if expert not in excluded)):
        reasons = "; ".join(f"{expert}: {why}" for expert, why in excluded.items())
        raise ConfigError(f"route {name!r}: its policy leaves no expert ({reasons})")
    able = [cards[expert] for expert in allowed]
    unit = cost_unit(route.policy.cost, able, measured)
    costs = ExpectedCosts.of(able, measured, unit)
    guessed = isinstance(router, StaticRouter)
    learner = Learner(route.learning, allowed, guessed=guessed) if route.learning else None
    return Route(name, route, router, allowed, excluded, costs, release, learner)


def too_dear(
    names: Sequence[str], usd: NDArray[np.float64], options: RoutingOptions
) -> dict[str, str]:
    """Experts that are expected to cost more than the request allows, each with the reason."""
    if options.max_cost is None:
        return {}
    return {
        name: f"an answer is expected to cost {cost:.3g} US dollars, more than max_cost"
        for name, cost in zip(names, usd[0].tolist(), strict=True)
        if cost > options.max_cost
    }
