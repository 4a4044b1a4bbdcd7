"""Answering one request: pool, router, policy, strategy. Knows nothing of HTTP or hosting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError, ExpertUnavailableError
from experts.paths import resolve_path
from experts.types import ChatRequest, Chunk, Completion, ExpertCard, collect
from orchestrator.config import (
    ArtefactRouterConfig,
    CollegiumConfig,
    ConfigError,
    StaticRouterConfig,
)
from orchestrator.costs import ExpectedCosts
from orchestrator.decision import (
    PUBLIC,
    Candidate,
    Decision,
    RequestContext,
    SessionShare,
    new_decision_id,
)
from orchestrator.embeddings import Embeddings
from orchestrator.errors import BadRequestError, EmptyPoolError, UnknownModelError
from orchestrator.learning.experiments import Experiment
from orchestrator.learning.feedback import Learning
from orchestrator.learning.learner import Learner, Lesson
from orchestrator.learning.shadow import Shadows
from orchestrator.learning.tally import Tally
from orchestrator.learning.teaching import Teaching
from orchestrator.memory.cache import CachedAnswer, Lookup, ResponseCache
from orchestrator.memory.decisions import DecisionLog
from orchestrator.memory.feedback import FeedbackLog
from orchestrator.memory.guard import Memory
from orchestrator.memory.sessions import Sessions
from orchestrator.memory.sqlite import SQLiteStore
from orchestrator.options import RoutingOptions, not_allowed
from orchestrator.pool import estimated_prompt_tokens, has_content, prompt_text, split_pool
from orchestrator.release_watch import ReleaseWatch
from orchestrator.routes import Route, build_route, too_dear
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

# Candidates, best first, that a further decision for the same request may choose from.
MAX_ALLOWED = 64

# An expert that does not even say whether it is healthy is not.
HEALTH_TIMEOUT_S = 5.0


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
    from routers.releases import current_release

    return load_router(current_release(resolve_path(entry.path)))


class Orchestrator:
    """Decides who answers a request, and has it answered.

    Args:
        config: The config all names come from.
        experts: One Expert per card of the config; may be empty if only decisions are wanted.
        routers: One Router per router of the config.
        memory: What outlives requests, closed with this; none keeps it here, whatever the config
            says, which is enough for decisions.

    Raises:
        ConfigError: A route's experts are unknown to its router, or do not go with its strategy.
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
        self.releases = ReleaseWatch(config, routers, self._prepare)
        self.routes = {
            name: self._route(name, routers[route.router], self.releases.in_use.get(route.router))
            for name, route in config.routes.items()
        }
        self.embeddings = Embeddings(config, routers)
        self._named_costs = {n: ExpectedCosts.of([card]) for n, card in self.cards.items()}
        self._threads = ThreadPoolExecutor(ROUTER_THREADS, thread_name_prefix="router")
        self._single = SingleStrategy()
        self.memory = memory or Memory(SQLiteStore(max_records=config.memory.max_records))
        self.decisions = DecisionLog(self.memory)
        self.feedback = FeedbackLog(self.memory, self.decisions)
        self.experiments = {
            name: Experiment(
                name, entry, Tally(self.memory, ("experiment", name, entry.a, entry.b), "ab")
            )
            for name, entry in config.experiments.items()
        }
        self.learning = Learning(
            {name: route.learner for name, route in self.routes.items() if route.learner},
            self.experiments,
        )
        self._teaching = Teaching(self.memory, self.learning)
        self.feedback.on_feedback.append(self._teaching.told)
        self.shadows = Shadows(
            {name: route.shadow for name, route in config.routes.items() if route.shadow},
            self._answer_by,
            experts,
            self.memory,
        )

        self._cache = _open_cache(config, self.memory)
        self._sessions = Sessions(config.sessions, self.memory) if config.sessions else None

    def _route(self, name: str, router: Router, release: str | None) -> Route:
        route = build_route(name, self.config.routes[name], router, self.cards, release)
        try:
            # Where a route lists nobody, only its router knows whom it may choose.
            route.config.strategy.check_experts(name, route.experts, self.config.experts)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return route

    def _prepare(self, name: str, router: Router, release: str) -> Callable[[], None]:
        """What puts a router in use; requests under way keep the one they began with."""
        changed = {
            route_name: self._route(route_name, router, release)
            for route_name, route in self.config.routes.items()
            if route.router == name
        }
        use_for_embeddings = self.embeddings.prepare(name, router)

        def use() -> None:
            use_for_embeddings()
            for route_name, route in changed.items():
                # What was learnt of experts is not forgotten with the router.
                learner = self.routes[route_name].learner
                if learner is not None:
                    learner.bandit.include(route.experts)
                changed[route_name] = replace(route, learner=learner)
            self.routes = {**self.routes, **changed}

        return use

    async def decide(
        self,
        request: AnyRequest,
        *,
        options: RoutingOptions | None = None,
        context: RequestContext | None = None,
    ) -> Decision:
        """Decide who shall answer.

        The decision depends on this request, the config, what the route has learnt from feedback by
        now and, with sessions, on who answered last in the request's own session; never on other
        requests in work.

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
        self.releases.look()
        self._teaching.look()
        options = options or RoutingOptions()
        if context is not None:
            context.session_id = options.session_id
            context.options = options
        if options.route is None and request.model in self.cards:
            return self._decide_named(request, options)
        name, decision_id = options.route or request.model, new_decision_id()
        experiment, arm = self.experiments.get(name), None
        if experiment is not None:
            scope = context.scope if context else PUBLIC
            key = None if scope == PUBLIC else scope
            arm = experiment.arm_of(key, options.session_id, decision_id)
            name = experiment.route(arm)
        route = self.routes.get(name)
        if route is None:
            known = [*self.routes, *self.experiments, *([] if options.route else self.cards)]
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
        features = await self._features(route.learner, text)
        if context is not None:
            context.router_s = time.monotonic() - started
            if features is not None or experiment is not None:
                quality = prediction.quality[0].tolist()
                priors = {card.name: q for card, q in zip(pool, quality, strict=True)}
                context.lesson = Lesson(
                    name,
                    priors=priors,
                    features=features,
                    experiment=experiment.name if experiment else None,
                    arm=arm,
                    encoder=route.learner.config.encoder if route.learner else None,
                )
        share = await self._share(
            request, options, context, route.costs.only([card.name for card in pool])
        )
        decision = route.decide(
            request,
            pool,
            prediction,
            excluded=excluded,
            options=options,
            decision_id=decision_id,
            features=features,
            session=share,
        )
        if experiment is None:
            return decision
        return replace(decision, experiment=experiment.name, arm=arm)

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

    async def _features(self, learner: Learner | None, text: str) -> NDArray[np.float16] | None:
        if learner is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, learner.features, text
        )

    def _decide_named(self, request: AnyRequest, options: RoutingOptions) -> Decision:
        name = request.model
        _, excluded = split_pool(request, [self.cards[name]])
        excluded |= not_allowed([name], options.allowed_models or ["*"])
        usd = self._named_costs[name].usd(
            [estimated_prompt_tokens(request)], token_limit=request.token_limit
        )
        excluded |= too_dear([name], usd, options)
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
        if route:
            context.reroute = lambda further: self.decide(further, options=_as_decided(decision))
        chunks = strategy.run(request, decision, self.experts, context)
        if context.lesson is not None:
            chunks = self.learning.followed(chunks, request, decision, context)
        session = self._sessions is not None and context.session_id is not None
        if session or (context.cache is not None and context.cache.state == "miss"):
            chunks = self._noted(chunks, decision, context)
        if self.shadows.wants(decision, request, context):
            chunks = self.shadows.followed(chunks, request, decision, context.options)
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
        if (options.route or request.model) in self.experiments:
            # An arm must not get the other's answers.
            context.cache = Lookup("off")
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
        # What was said in place of an expert that failed is soon said better.
        if self._cache is not None and context.cache is not None and not context.failures:
            self._cache.keep(context.cache, CachedAnswer(expert, decision.route, completion))

    async def _answer_by(
        self, request: AnyRequest, options: RoutingOptions, context: RequestContext
    ) -> Completion:
        """A route's answer, of which nobody learns anything."""
        decision = await self.decide(request, options=options, context=context)
        context.reroute = lambda further: self.decide(further, options=_as_decided(decision))
        strategy = self.routes[decision.route or ""].config.strategy
        async with aclosing(strategy.run(request, decision, self.experts, context)) as chunks:
            return await collect(chunks)

    async def comparisons(self) -> list[dict[str, Any]]:
        """What experiments and shadows have found out by now, on all replicas.

        Raises:
            MemoryUnavailableError: The store does not answer.
        """
        await self._teaching.read()
        experiments = [await one.results() for one in self.experiments.values()]
        return experiments + [await one.results() for one in self.shadows.shadows.values()]

    async def check_health(self) -> dict[str, BaseException | None]:
        """The state of every expert: none if it can answer, else what is wrong."""
        results = await asyncio.gather(
            *(_check_health(name, expert) for name, expert in self.experts.items()),
            return_exceptions=True,
        )
        return dict(zip(self.experts, results, strict=True))

    async def aclose(self) -> None:
        """Free routers' threads and all experts, and write down what is still to be written."""
        await self.shadows.aclose()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._cache is not None:
            self._cache.close()
        self.embeddings.close()
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


def _as_decided(decision: Decision) -> RoutingOptions:
    """Options that decide as before: what the request allowed is what it had to choose from."""
    return RoutingOptions(
        route=decision.route,
        cost_quality=decision.cost_quality,
        allowed_models=[one.expert for one in decision.candidates[:MAX_ALLOWED]] or None,
    )
