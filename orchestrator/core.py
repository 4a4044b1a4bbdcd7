"""Answering one request: pool, router, policy, strategy. Knows nothing of HTTP or hosting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError, ExpertUnavailableError
from experts.paths import resolve_path
from experts.types import ChatRequest, Chunk, ExpertCard, collect
from orchestrator.config import (
    ArtefactRouterConfig,
    CollegiumConfig,
    ConfigError,
    RouteConfig,
    StaticRouterConfig,
)
from orchestrator.costs import ExpectedCosts, cost_unit
from orchestrator.decision import Candidate, Decision, RequestContext, SessionShare
from orchestrator.errors import BadRequestError, EmptyPoolError, UnknownModelError
from orchestrator.memory.cache import CachedAnswer, ResponseCache
from orchestrator.memory.decisions import DecisionLog
from orchestrator.memory.feedback import FeedbackLog
from orchestrator.memory.guard import Memory
from orchestrator.memory.sessions import Sessions
from orchestrator.memory.sqlite import SQLiteStore
from orchestrator.options import RoutingOptions, below_quality, not_allowed
from orchestrator.policies import order_by_utility
from orchestrator.pool import estimated_prompt_tokens, has_content, prompt_text, split_pool
from orchestrator.strategies.calls import play
from orchestrator.strategies.single import SingleStrategy
from routers.base import Prediction, Query, Router, RouterError
from routers.static import StaticRouter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Orchestrator", "load_routers"]

# Encoding a query keeps one core busy for milliseconds; more threads than this would only make
# every query wait longer, and the event loop needs a core too.
ROUTER_THREADS = 2

# Experts that one request may have asked together.
MAX_EXPERTS = 16

# An expert that does not even say whether it is healthy is not.
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Route:
    config: RouteConfig
    router: Router
    experts: tuple[str, ...]
    excluded: Mapping[str, str]
    costs: ExpectedCosts


def load_routers(config: CollegiumConfig) -> dict[str, Router]:
    """Load every router of a config.

    Raises:
        ConfigError: An artefact is missing or cannot be used.
    """
    routers: dict[str, Router] = {}
    for name, entry in config.routers.items():
        try:
            routers[name] = _load_router(entry)
        except (RouterError, ExpertError) as error:
            raise ConfigError(f"router {name!r}: {error}") from error
    return routers


def _load_router(entry: ArtefactRouterConfig | StaticRouterConfig) -> Router:
    if isinstance(entry, StaticRouterConfig):
        return StaticRouter(entry.quality)
    from routers.registry import load_router

    return load_router(resolve_path(entry.path))


class Orchestrator:
    """Decides who answers a request, and has it answered.

    Args:
        config: The config all names come from.
        experts: One Expert per card of the config; may be empty if only decisions are wanted.
        routers: One Router per router of the config.
        memory: What outlives requests, closed with this; none keeps it here, whatever the config
            says, which is enough for decisions.

    Raises:
        ConfigError: A route's experts are unknown to its router.
    """

    def __init__(
        self,
        config: CollegiumConfig,
        experts: Mapping[str, Expert],
        routers: Mapping[str, Router],
        memory: Memory | None = None,
    ) -> None:
        self.config = config
        self.cards = config.cards()
        self.experts = experts
        self.routes = {
            name: _build_route(name, route, routers[route.router], self.cards)
            for name, route in config.routes.items()
        }
        self._named_costs = {n: ExpectedCosts.of([card]) for n, card in self.cards.items()}
        self._threads = ThreadPoolExecutor(ROUTER_THREADS, thread_name_prefix="router")
        self._single = SingleStrategy()
        self.memory = memory or Memory(SQLiteStore(max_records=config.memory.max_records))
        self.decisions = DecisionLog(self.memory)
        self.feedback = FeedbackLog(self.memory, self.decisions)
        self._cache = _open_cache(config, self.memory)
        self._sessions = Sessions(config.sessions, self.memory) if config.sessions else None

    async def decide(
        self,
        request: AnyRequest,
        *,
        options: RoutingOptions | None = None,
        context: RequestContext | None = None,
    ) -> Decision:
        """Decide who shall answer.

        The decision depends on this request and the config alone; with sessions, also on who
        answered last in the request's own session.

        Args:
            request: The request; its ``model`` names an expert or a route.
            options: What the request itself says of its routing.
            context: Says whose request it is; takes note of the router's time.

        Raises:
            BadRequestError: There is nothing to answer.
            UnknownModelError: ``model`` names neither.
            EmptyPoolError: No expert of the route can serve the request.
        """
        if not has_content(request):
            field = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise BadRequestError(f"{field}: must hold some text; all of it is empty", field)
        options = options or RoutingOptions()
        if context is not None:
            context.session_id = options.session_id
        if options.route is None and request.model in self.cards:
            return self._decide_named(request, options)
        name = options.route or request.model
        route = self.routes.get(name)
        if route is None:
            known = self.routes if options.route else [*self.routes, *self.cards]
            raise UnknownModelError(name, known, "route" if options.route else "model")
        allowed = not_allowed(route.experts, options.allowed_models or ["*"])
        pool, unable = split_pool(
            request, [self.cards[expert] for expert in route.experts if expert not in allowed]
        )
        excluded = {**route.excluded, **allowed, **unable}
        if not pool:
            raise EmptyPoolError(name, excluded)
        started = time.monotonic()
        text = prompt_text(request, route.config.conversation)
        prediction = await self._predict(route.router, text, pool)
        if context is not None:
            context.router_s = time.monotonic() - started
        share = await self._share(
            request, options, context, route.costs.only([c.name for c in pool])
        )
        return _decision(name, request, route, pool, excluded, prediction, options, share)

    async def _share(
        self,
        request: AnyRequest,
        options: RoutingOptions,
        context: RequestContext | None,
        costs: ExpectedCosts,
    ) -> SessionShare | None:
        if self._sessions is None or context is None or options.session_id is None:
            return None
        session = await self._sessions.find(options.session_id, context.scope)
        return session.share(self._sessions.config, request, costs) if session else None

    async def _predict(self, router: Router, text: str, pool: Sequence[ExpertCard]) -> Prediction:
        queries, candidates = [Query(text)], [card.name for card in pool]
        if isinstance(router, StaticRouter):
            # Looking numbers up takes less time than a hop to a thread.
            return router.predict(queries, candidates)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, router.predict, queries, candidates
        )

    def _decide_named(self, request: AnyRequest, options: RoutingOptions) -> Decision:
        name = request.model
        _, excluded = split_pool(request, [self.cards[name]])
        excluded |= not_allowed([name], options.allowed_models or ["*"])
        usd = self._named_costs[name].usd(
            [estimated_prompt_tokens(request)], token_limit=request.token_limit
        )
        excluded |= _too_dear([name], usd, options)
        if excluded:
            raise EmptyPoolError(name, excluded)
        return Decision(experts=(name,), candidates=(Candidate(name, cost_usd=float(usd[0, 0])),))

    def run(
        self, request: AnyRequest, decision: Decision, context: RequestContext
    ) -> AsyncGenerator[Chunk, None]:
        """Have the request answered as decided.

        Raises:
            ExpertError: Nobody could answer, or an expert failed midway.
        """
        if context.cache is not None and context.cache.answer is not None:
            return _given_again(context.cache.answer)
        route = self.routes.get(decision.route or "")
        strategy = route.config.strategy if route else self._single
        chunks = strategy.run(request, decision, self.experts, context)
        session = self._sessions is not None and context.session_id is not None
        if session or (context.cache is not None and context.cache.state == "miss"):
            return self._noted(chunks, decision, context)
        return chunks

    async def recall(
        self, request: AnyRequest, options: RoutingOptions, context: RequestContext
    ) -> Decision | None:
        """Look for an answer that was given before; ``run`` gives it again.

        Args:
            request: The request.
            options: What the request itself says of its routing.
            context: Says whose request it is; takes note of what was found.

        Returns:
            The decision to do so; none if there is no such answer.
        """
        if self._cache is None:
            return None
        context.cache = await self._cache.find(request, options, context.scope)
        answer = context.cache.answer
        if answer is None:
            return None
        context.answered_by = answer.expert
        return Decision((answer.expert,), route=answer.route, policy="cache", strategy="cache")

    async def _noted(
        self, chunks: AsyncGenerator[Chunk, None], decision: Decision, context: RequestContext
    ) -> AsyncGenerator[Chunk, None]:
        """The same chunks; once the answer is whole, what shall be remembered of it is."""
        given: list[Chunk] = []
        async with aclosing(chunks):
            async for chunk in chunks:
                given.append(chunk)
                yield chunk
        expert = context.expert
        if expert is None:
            return
        completion = await collect(_all(given))
        if self._sessions is not None and context.session_id is not None:
            seen = next(call.usage for call in reversed(context.calls) if call.expert == expert)
            await self._sessions.note(
                context.session_id, context.scope, expert, seen.total_tokens, completion
            )
        if self._cache is not None and context.cache is not None:
            self._cache.keep(context.cache, CachedAnswer(expert, decision.route, completion))

    async def check_health(self) -> dict[str, BaseException | None]:
        """The state of every expert: none if it can answer, else what is wrong."""
        results = await asyncio.gather(
            *(_check_health(name, expert) for name, expert in self.experts.items()),
            return_exceptions=True,
        )
        return dict(zip(self.experts, results, strict=True))

    async def aclose(self) -> None:
        """Free routers' threads and all experts, and write down what is still to be written."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._cache is not None:
            self._cache.close()
        await asyncio.gather(
            *(expert.aclose() for expert in self.experts.values()), return_exceptions=True
        )
        await self.memory.aclose()


def _open_cache(config: CollegiumConfig, memory: Memory) -> ResponseCache | None:
    if config.cache is None:
        return None
    try:
        return ResponseCache(config.cache, memory, config.fingerprint)
    except RouterError as error:
        raise ConfigError(f"cache: {error}") from error


async def _all(chunks: Sequence[Chunk]) -> AsyncGenerator[Chunk, None]:
    for chunk in chunks:
        yield chunk


async def _given_again(answer: CachedAnswer) -> AsyncGenerator[Chunk, None]:
    for chunk in play(answer.completion, answer.completion.usage):
        yield chunk


async def _check_health(name: str, expert: Expert) -> None:
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            await expert.check_health()
    except TimeoutError:
        raise ExpertUnavailableError(name, "no answer to the health check") from None


def _build_route(
    name: str, route: RouteConfig, router: Router, cards: Mapping[str, ExpertCard]
) -> _Route:
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
    return _Route(route, router, allowed, excluded, costs)


def _decision(
    name: str,
    request: AnyRequest,
    route: _Route,
    pool: Sequence[ExpertCard],
    excluded: Mapping[str, str],
    prediction: Prediction,
    options: RoutingOptions,
    session: SessionShare | None,
) -> Decision:
    if options.top_k is not None and options.top_k > MAX_EXPERTS:
        raise BadRequestError(
            f"top_k: how many experts shall answer, at most {MAX_EXPERTS}, got {options.top_k}; "
            "as a sampling parameter it goes to an expert named as model only",
            "top_k",
        )
    policy, names = route.config.policy, [card.name for card in pool]
    knob = policy.cost_quality if options.cost_quality is None else options.cost_quality
    quality = prediction.quality
    expected = route.costs.only(names)
    usd = expected.usd([estimated_prompt_tokens(request)], token_limit=request.token_limit)
    if session is not None:
        usd[:, names.index(session.expert)] -= session.cached_usd
    refused = below_quality(quality[0], names, options.min_quality or 0.0)
    refused |= _too_dear(names, usd, options)
    if refused:
        # Those that are left are compared as if they were all there are.
        kept = [j for j, expert in enumerate(names) if expert not in refused]
        excluded = {**excluded, **refused}
        if not kept:
            raise EmptyPoolError(name, excluded)
        names, quality, usd = [names[j] for j in kept], quality[:, kept], usd[:, kept]
        expected = route.costs.only(names)
    costs = expected.in_unit(usd)
    qualities = quality[0].tolist()
    if session is not None and session.expert in names:
        others = [j for j, expert in enumerate(names) if expert != session.expert]
        quality = quality.copy()
        quality[:, others] -= session.stickiness
    utilities = policy.utilities(names, quality, costs, cost_quality=knob)[0].tolist()
    candidates = tuple(
        Candidate(names[j], qualities[j], float(usd[0, j]), utilities[j])
        for j in order_by_utility(utilities, costs[0].tolist())
    )
    if session is not None and session.tool_call:
        # Only who called a tool has thought of what to do with its result. The order is stable.
        candidates = tuple(sorted(candidates, key=lambda one: one.expert != session.expert))
    why = prediction.explanations[0]
    width = options.top_k or policy.width([one.quality or 0.0 for one in candidates])
    return Decision(
        experts=tuple(candidate.expert for candidate in candidates),
        width=min(width, len(candidates)),
        route=name,
        router=route.config.router,
        policy=policy.type,
        strategy=route.config.strategy.type,
        cost_quality=knob,
        candidates=candidates,
        excluded=excluded,
        category=why.category,
        confidence=why.confidence,
        fallback=why.fallback,
        detail=why.detail,
        session=session,
    )


def _too_dear(
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
