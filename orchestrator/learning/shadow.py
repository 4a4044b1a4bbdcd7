"""Copies of some requests go to a second route, and a judge compares both answers.

The answer has been given by then: a copy neither delays nor fails anything, and is dropped wherever
there is no room for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Literal, get_args

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError
from experts.types import ChatRequest, Choice, Chunk, Completion, Usage
from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import RequestError
from orchestrator.learning.config import ShadowConfig
from orchestrator.learning.learner import drawn
from orchestrator.learning.sequential import Arm, mean_interval
from orchestrator.learning.tally import Tally
from orchestrator.memory.guard import Memory
from orchestrator.options import RoutingOptions
from orchestrator.strategies.calls import plain
from orchestrator.strategies.judging import ExpertJudge

__all__ = ["Shadow", "ShadowOutcome", "Shadows"]

logger = logging.getLogger("collegium.learning")

ShadowOutcome = Literal["better", "equal", "worse", "failed", "dropped"]
# Probability of a wrong verdict, as experiments have it.
ERROR = 0.05
Answerer = Callable[[AnyRequest, RoutingOptions, RequestContext], Awaitable[Completion]]


class Shadow:
    """One route's shadow and what it has seen.

    Attributes:
        name: Of the route whose requests are copied.
        counts: How often each outcome occurred, by all replicas.
    """

    def __init__(self, name: str, config: ShadowConfig, memory: Memory) -> None:
        self.name = name
        self.config = config
        of = ("shadow", name, config.route, config.judge)
        self.counts = Tally(memory, of, get_args(ShadowOutcome))

    async def results(self) -> dict[str, Any]:
        """Counts, the shadow's share of wins less one half, and what they say by now."""
        counts = await self.counts.read()
        better, worse = counts["better"], counts["worse"]
        # A win is worth 1, a tie 0.5; each was guessed to be 0.5, so that no order matters.
        wins = Arm(
            better + worse + counts["equal"],
            better + 0.5 * counts["equal"],
            0.25 * (better + worse),
        )
        low, high = mean_interval(wins, error=ERROR)
        mean, compared, copied = wins.mean, wins.n, sum(counts.values())
        verdict = "undecided"
        if low > 0.5 or high < 0.5:
            verdict = "b" if low > 0.5 else "a"
        return {
            "name": self.name,
            "kind": "shadow",
            "arms": [
                {"name": "a", "route": self.name, "requests": copied,
                 "outcomes": compared, "mean": None if mean is None else 1 - mean},
                {"name": "b", "route": self.config.route, "requests": copied,
                 "outcomes": compared, "mean": mean},
            ],
            "counts": counts,
            "difference": None if mean is None else 2 * mean - 1,
            "low": 2 * low - 1,
            "high": 2 * high - 1,
            "error": ERROR,
            "verdict": verdict,
        }  # fmt: skip


class Shadows:
    """Copies requests in the background.

    Args:
        configs: Of the routes that have a shadow, by name.
        answer_by: Has a request answered by a route.
        experts: By name, judges among them.
        memory: Where outcomes are counted.
    """

    def __init__(
        self,
        configs: Mapping[str, ShadowConfig],
        answer_by: Answerer,
        experts: Mapping[str, Expert],
        memory: Memory,
    ) -> None:
        self.shadows = {name: Shadow(name, config, memory) for name, config in configs.items()}
        self._answer_by = answer_by
        self._experts = experts
        self._tasks: dict[str, set[asyncio.Task[None]]] = {name: set() for name in configs}
        self.has_room: Callable[[], bool] = lambda: True
        """Whether the service has places left over; set by whoever knows."""
        self.listener: Callable[[str, ShadowOutcome, RequestContext], None] = lambda *_: None
        """Told of every outcome, with the route and the calls that were made for it."""

    def wants(self, decision: Decision, request: AnyRequest, context: RequestContext) -> bool:
        """Whether a request is to be copied.

        Never one that says itself who may see it, or that has several answers.
        """
        shadow = self.shadows.get(decision.route or "")
        if shadow is None or not drawn(f"shadow:{decision.id}", shadow.config.share):
            return False
        restricted = context.options is not None and context.options.allowed_models is not None
        one = (request.n or 1) == 1 and (
            isinstance(request, ChatRequest) or isinstance(request.prompt, str)
        )
        return one and not restricted

    async def followed(
        self,
        chunks: AsyncGenerator[Chunk, None],
        request: AnyRequest,
        decision: Decision,
        options: RoutingOptions | None,
    ) -> AsyncGenerator[Chunk, None]:
        """Pass an answer on, and compare it with the shadow's once it is given."""
        text: list[str] = []
        called = False
        async with aclosing(chunks):
            async for chunk in chunks:
                text.append(chunk.text)
                called = called or bool(chunk.tool_calls)
                yield chunk
        # A judge of texts has nothing to say of a tool call.
        if called:
            return
        shadow = self.shadows[decision.route or ""]
        tasks, config = self._tasks[shadow.name], shadow.config
        own = (options or RoutingOptions()).model_copy(
            update={"route": config.route, "session_id": None}
        )
        context = RequestContext(
            deadline=time.monotonic() + config.timeout_s, max_cost_usd=config.max_cost_usd
        )
        if len(tasks) >= config.max_in_flight or not self.has_room():
            self._note(shadow, "dropped", context)
            return
        copy = self._compare(shadow, request, own, decision.id, "".join(text), context)
        task = asyncio.create_task(copy)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _note(self, shadow: Shadow, outcome: ShadowOutcome, context: RequestContext) -> None:
        shadow.counts.add(outcome)
        self.listener(shadow.name, outcome, context)

    async def _compare(
        self,
        shadow: Shadow,
        request: AnyRequest,
        options: RoutingOptions,
        decision_id: str,
        given: str,
        context: RequestContext,
    ) -> None:
        outcome: ShadowOutcome = "failed"
        try:
            async with asyncio.timeout(shadow.config.timeout_s):
                found = await self._answer_by(plain(request), options, context)
                # A judge of texts has nothing to say of a tool call, whosever it is.
                outcome = (
                    "dropped"
                    if found.choices[0].tool_calls
                    else await self._judged(
                        shadow.config.judge, request, given, found.text, context
                    )
                )
        except (ExpertError, RequestError, TimeoutError) as error:
            logger.info("shadow of %s (%s): %s", shadow.name, decision_id, error)
        except Exception:
            logger.exception("shadow of %s (%s) failed", shadow.name, decision_id)
        self._note(shadow, outcome, context)

    async def _judged(
        self, name: str, request: AnyRequest, given: str, copied: str, context: RequestContext
    ) -> ShadowOutcome:
        """How the copy's answer compares; the judge is not told whose is whose."""
        if given.strip() == copied.strip():
            return "equal"
        judge = ExpertJudge(name, self._experts, context)
        verdict = await judge.compare(request, _said(copied), _said(given))
        if verdict.score is None:
            return "failed"
        if verdict.score == 0.5:
            return "equal"
        return "better" if verdict.score > 0.5 else "worse"

    async def aclose(self) -> None:
        """Stop all copies."""
        tasks = [task for running in self._tasks.values() for task in running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _said(text: str) -> Completion:
    return Completion([Choice(text)], Usage())
