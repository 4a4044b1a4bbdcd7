"""What strategies that ask several experts, or one several times, have in common."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from pydantic import Field

from experts.base import AnyRequest, Expert
from experts.types import ChatRequest, Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import Answer, Failure, another_may_answer, answers
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.pump import ticking

__all__ = [
    "MAX_ANSWERS",
    "SeveralStrategy",
    "answers_in_time",
    "predicted",
    "preference",
    "shares_by_quality",
    "ticks",
]

# Answers that one request may have asked for together.
MAX_ANSWERS = 32

# How long a stream's client waits without a sign of life. Faster requests have none, so that an
# early error still has its own HTTP status.
TICK_S = 2.0

# Qualities of 0 and 1 have no log-odds.
LEAST_QUALITY = 1e-6

T = TypeVar("T")


class SeveralStrategy(Strategy):
    """Asks several times before it answers, so a stream begins when the answer is settled.

    Text completions and requests for several answers (``n``) are answered as ``fallback`` does.
    """

    experts: int = Field(default=3, ge=1, le=16)
    """How many experts are asked, best first, where neither the policy nor the request says."""
    samples: int = Field(default=1, ge=1, le=16)
    """Answers of each expert. Of several, each has its own seed, and 32 in all are the most."""
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Randomness of several answers of one expert, unless the request has its own above 0."""
    deadline_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the request's time after which nobody is waited for any more, once there is an
    answer."""

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer with one of several answers."""
        calls = self.calls(request, decision)
        one = len(calls) == 1 and not self.composes_one
        if not isinstance(request, ChatRequest) or request.n > 1 or one:
            return FallbackStrategy().run(request, decision, experts, context)
        context.composing = True
        return self.compose(request, calls, decision, experts, context)

    def compose(
        self,
        request: ChatRequest,
        calls: Sequence[tuple[str, AnyRequest]],
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Make one answer of those to the calls."""
        raise NotImplementedError

    async def otherwise(
        self,
        failure: Failure,
        request: AnyRequest,
        calls: Sequence[tuple[str, AnyRequest]],
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """The answer of one of the other experts, where all that were asked have failed."""
        asked = {name for name, _ in calls}
        rest = tuple(name for name in decision.experts if name not in asked)
        if not rest or context.remaining_s <= 0 or not another_may_answer(failure):
            raise failure
        context.composing = False
        further = replace(decision, experts=rest)
        async with aclosing(FallbackStrategy().run(request, further, experts, context)) as chunks:
            async for chunk in chunks:
                yield chunk

    @property
    def composes_one(self) -> bool:
        """Whether there is something to do about a single answer."""
        return False

    def calls(self, request: AnyRequest, decision: Decision) -> list[tuple[str, AnyRequest]]:
        """Whom to ask what: every expert once before any is asked again."""
        width = decision.width or self.experts
        names = decision.experts[:width]
        if self.samples == 1:
            return [(name, request) for name in names]
        asked = [self._sample(request, number) for number in _seeds(request, self.samples)]
        return [(name, one) for one in asked for name in names][:MAX_ANSWERS]

    def _sample(self, request: AnyRequest, seed: int) -> AnyRequest:
        temperature = request.temperature or self.temperature
        return request.model_copy(update={"seed": seed, "temperature": temperature})


def _seeds(request: AnyRequest, count: int) -> list[int]:
    # Without a seed of its own a request shall get other answers when it is sent again.
    first = random.getrandbits(32) if request.seed is None else request.seed
    return [first + number if first + number < 2**63 else number for number in range(count)]


def predicted(decision: Decision) -> dict[str, float]:
    """Predicted quality by expert, of those that have one."""
    return {one.expert: one.quality for one in decision.candidates if one.quality is not None}


def shares_by_quality(qualities: Sequence[float]) -> list[float]:
    """How much each expert counts: the softmax of the log-odds of their qualities.

    Args:
        qualities: Predicted, in [0, 1].
    """
    kept = [min(max(quality, LEAST_QUALITY), 1 - LEAST_QUALITY) for quality in qualities]
    odds = [quality / (1 - quality) for quality in kept]
    total = math.fsum(odds)
    return [one / total for one in odds]


def preference(predicted: Mapping[str, float], expert: str, place: int) -> tuple[float, int]:
    """A key that is higher for the answer to prefer as long as nothing else is known of them."""
    return predicted.get(expert, 0.0), -place


async def answers_in_time(
    calls: Sequence[tuple[str, AnyRequest]],
    experts: Mapping[str, Expert],
    context: RequestContext,
    *,
    share: float,
) -> AsyncGenerator[Answer | Failure | None, None]:
    """Answers and failures as they come, none now and then while nothing comes.

    Ends when a share of the time that is left has passed and there is an answer, or when all have
    come. Closing it cancels who has not answered yet.
    """
    end = time.monotonic() + share * context.remaining_s
    answered = False

    def pause_s() -> float:
        return max(0.0, min(TICK_S, end - time.monotonic())) if answered else TICK_S

    async with aclosing(ticking(answers(calls, experts, context), pause_s)) as coming:
        async for found in coming:
            if found is None and answered and time.monotonic() >= end:
                return
            answered = answered or isinstance(found, Answer)
            yield found


async def ticks(
    work: asyncio.Future[T], *, until: float | None = None
) -> AsyncGenerator[None, None]:
    """Something every few seconds until the work is done; closing cancels the work.

    Args:
        work: What is waited for.
        until: Moment on the monotonic clock when the work is cancelled; none waits to its end.
    """
    try:
        while True:
            wait_s = TICK_S if until is None else min(TICK_S, until - time.monotonic())
            done, _ = await asyncio.wait({work}, timeout=max(0.0, wait_s))
            if done or (until is not None and time.monotonic() >= until):
                return
            yield
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
