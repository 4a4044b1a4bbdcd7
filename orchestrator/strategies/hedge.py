"""A second expert is asked where the first is slow to begin; whoever begins first answers."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, PrivateAttr

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import Failure, another_may_answer, freed, stream_one
from orchestrator.strategies.pump import Pump

__all__ = ["HedgeStrategy"]

# Times to the first chunk that are kept of each expert, and how many make a percentile of them.
KEPT_TIMES = 256
ENOUGH_TIMES = 20
SLOW_QUANTILE = 0.95

# Second calls that may be saved up while nothing is slow.
MAX_SAVED = 10.0


@dataclass(slots=True)
class _Seen:
    """What this process has seen of its requests; no part of the config, so all are equal.

    Attributes:
        times_s: Seconds to the first chunk by expert and by whether the request was a stream's.
        saved: Second calls that may be made now.
    """

    times_s: dict[tuple[str, bool], deque[float]] = field(default_factory=dict, compare=False)
    saved: float = field(default=0.0, compare=False)

    def note(self, expert: str, stream: bool, seconds: float) -> None:
        """Keep a time to the first chunk."""
        times = self.times_s.setdefault((expert, stream), deque(maxlen=KEPT_TIMES))
        times.append(seconds)

    def take(self) -> bool:
        """Whether one more second call may be made; it is taken off then."""
        # Rounded, because ten times a tenth must make one.
        allowed = round(self.saved, 9) >= 1
        self.saved -= allowed
        return allowed

    def slow_s(self, expert: str, stream: bool) -> float | None:
        """The time that most of the expert's answers begin within, if enough have been seen."""
        times = sorted(self.times_s.get((expert, stream), ()))
        if len(times) < ENOUGH_TIMES:
            return None
        return times[math.ceil(SLOW_QUANTILE * len(times)) - 1]


class HedgeStrategy(Strategy):
    """The first expert answers; where it is slow to begin, the second is asked too.

    Whoever has the first chunk of a stream, or the whole of a plain answer, is the one that
    answers; the other is cancelled. An expert that fails before that leaves the other, which is
    asked at once if it was not yet. So no more than two are asked, and a second one beside the
    first only for ``max_extra_share`` of the requests: an overload is not doubled.

    References:
        Dean and Barroso, "The Tail at Scale" (CACM 56(2), 2013): hedged requests after the 95th
        percentile of the expected latency. Departs from it in the limit on their share.
    """

    type: Literal["hedge"]
    """Which kind of strategy."""
    wait_s: float | None = Field(default=None, ge=0)
    """Seconds without a first chunk (plain requests: without the answer) after which the second
    expert is asked; none takes the 95th percentile of the first expert's latest 256 times in this
    process, apart for streams and plain requests."""
    first_wait_s: float = Field(default=2.0, ge=0)
    """Seconds to wait without ``wait_s`` until 20 times of the expert have been seen."""
    again: bool = False
    """Ask the first expert once more instead of the second: another replica may be faster."""
    max_extra_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the requests that may have a second expert asked beside the first; while nothing is
    slow, up to ten are saved up."""

    _seen: _Seen = PrivateAttr(default_factory=_Seen)

    async def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer of the expert that begins first."""
        seen = self._seen
        seen.saved = min(MAX_SAVED, seen.saved + self.max_extra_share)
        first, *others = decision.experts[:1] * 2 if self.again else decision.experts[:2]
        wait_s = self._wait_s(first, request) if others else None
        race = _Race(request, experts, context, seen)
        try:
            race.ask(first)
            while (winner := await race.winner(wait_s)) is None:
                wait_s = None
                if not race.running:
                    if not others:
                        raise race.failures[-1]
                    race.ask(others.pop())
                elif seen.take():
                    race.ask(others.pop(), purpose="hedge")
            context.answered_by = winner.expert
            async for chunk in winner.pump.items():
                assert chunk is not None, "nobody set a pause"
                if chunk.usage is not None:
                    await freed(race.tasks - {winner.pump.task})  # what they cost is known then
                    chunk.usage = context.usage
                yield chunk
        finally:
            await freed(race.tasks)

    def _wait_s(self, expert: str, request: AnyRequest) -> float:
        if self.wait_s is not None:
            return self.wait_s
        slow_s = self._seen.slow_s(expert, request.stream)
        return self.first_wait_s if slow_s is None else slow_s


@dataclass(slots=True)
class _Runner:
    expert: str
    pump: Pump[Chunk]
    started: float = field(default_factory=time.monotonic)


class _Race:
    """Experts that are asked the same, until one of them begins to answer.

    Attributes:
        running: Who has neither begun nor failed.
        failures: Why others have failed.
        tasks: Of all that were asked.
    """

    def __init__(
        self,
        request: AnyRequest,
        experts: Mapping[str, Expert],
        context: RequestContext,
        seen: _Seen,
    ) -> None:
        self.running: list[_Runner] = []
        self.failures: list[Failure] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self._request = request
        self._experts = experts
        self._context = context
        self._seen = seen

    def ask(self, expert: str, *, purpose: str = "answer") -> None:
        """Ask one more."""
        chunks = stream_one(expert, self._request, self._experts, self._context, purpose=purpose)
        runner = _Runner(expert, Pump(chunks))
        self.running.append(runner)
        self.tasks.add(runner.pump.task)

    async def winner(self, wait_s: float | None) -> _Runner | None:
        """Who begins first; the others are cancelled. None if all fail or ``wait_s`` passes.

        Raises:
            ExpertError: The deadline has passed, or the request is wrong for everybody.
        """
        until = math.inf if wait_s is None else time.monotonic() + wait_s
        while self.running:
            left = None if until == math.inf else max(0.0, until - time.monotonic())
            signs = [self._sign(runner) for runner in self.running]
            done, _ = await asyncio.wait(signs, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for runner in [r for r in self.running if self._sign(r).done()]:
                error = runner.pump.error
                if error is None:
                    self._won(runner)
                    return runner
                self.running.remove(runner)
                self._failed(error)
            if not done:
                return None
        return None

    def _sign(self, runner: _Runner) -> asyncio.Future[None]:
        return runner.pump.begun if self._request.stream else runner.pump.task

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, ExpertError | CostLimitError):
            raise error
        if not another_may_answer(error) or self._context.remaining_s <= 0:
            raise error
        self.failures.append(error)

    def _won(self, winner: _Runner) -> None:
        for runner in self.running:
            # Of one that has not begun, this is less than the time it would have taken.
            seconds = time.monotonic() - runner.started
            self._seen.note(runner.expert, self._request.stream, seconds)
            if runner is not winner:
                runner.pump.task.cancel()
