"""The first expert answers; the next one if it fails before its first byte."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Literal

from pydantic import Field

from experts.base import AnyRequest, Expert
from experts.errors import ExpertError
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import another_may_answer, held_back, stream_one

__all__ = ["FallbackStrategy", "first_to_answer"]

logger = logging.getLogger("collegium.strategies")


class FallbackStrategy(Strategy):
    """The first expert answers; the next one if it fails before its first byte.

    An error moves on to the next expert as long as nothing of the answer has left: up to the first
    chunk of a stream, up to the end of a plain answer. Later errors are raised, and so is at once
    an error that every expert would meet. All attempts share the request's deadline and cost limit.
    """

    type: Literal["fallback"] = "fallback"
    """Which kind of strategy."""
    max_attempts: int = Field(default=3, ge=1, le=16)
    """Experts to try at most."""
    fallbacks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Who may stand in for an expert, in order, by the expert that was chosen; those that cannot
    serve the request are left out. Of an expert that is not named here, all others of the route, in
    the order of utility."""

    @property
    def named_experts(self) -> tuple[str, ...]:
        """Experts that ``fallbacks`` names."""
        others = (name for names in self.fallbacks.values() for name in names)
        return tuple(dict.fromkeys((*self.fallbacks, *others)))

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer of the first expert that gives one."""
        chosen, *others = decision.experts
        able = set(others)
        others = [name for name in self.fallbacks.get(chosen, others) if name in able]
        return first_to_answer(
            [chosen, *others][: self.max_attempts],
            lambda name: stream_one(name, request, experts, context),
            request,
            context,
        )


async def first_to_answer(
    attempts: Sequence[str],
    ask: Callable[[str], AsyncGenerator[Chunk, None]],
    request: AnyRequest,
    context: RequestContext,
) -> AsyncGenerator[Chunk, None]:
    """Stream the answer of the first expert that gives one.

    Args:
        attempts: Experts to try, in order.
        ask: Streams one expert's answer.
        request: What is answered.
        context: The request's deadline; its usage is the answer's.

    Raises:
        ExpertError: The last one's failure, one after the first byte, or one that every expert
            would meet.
        CostLimitError: The last one is too dear.
    """
    for attempt, name in enumerate(attempts, start=1):
        begun = False
        try:
            async with aclosing(held_back(ask(name), request, context)) as pieces:
                async for piece in pieces:
                    begun = True
                    yield piece
            return
        except (ExpertError, CostLimitError) as error:
            last = attempt == len(attempts) or context.remaining_s <= 0
            if begun or last or not another_may_answer(error):
                raise
            logger.warning("expert %s failed, trying the next: %s", name, error)
