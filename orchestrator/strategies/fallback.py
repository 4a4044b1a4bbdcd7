"""The first expert answers; the next one if it fails before its first byte."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from experts.base import AnyRequest, Expert
from experts.errors import (
    ContextLengthError,
    ExpertError,
    InvalidRequestError,
    UnsupportedFeatureError,
)
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.single import stream_one

__all__ = ["FallbackStrategy"]

logger = logging.getLogger("collegium.strategies")


class FallbackStrategy:
    """Try experts in the decision's order until one answers.

    An error moves on to the next expert as long as nothing of the answer has left: up to the first
    chunk of a stream, up to the end of a plain answer. Later errors are raised, and so is at once
    an error that every expert would meet. All attempts share the request's deadline.

    Args:
        max_attempts: Experts to try at most.
    """

    name = "fallback"

    def __init__(self, max_attempts: int = 3) -> None:
        self.max_attempts = max_attempts

    async def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer of the first expert that gives one."""
        attempts = decision.experts[: self.max_attempts]
        for attempt, name in enumerate(attempts, start=1):
            held: list[Chunk] = []
            begun = False
            try:
                async with aclosing(stream_one(name, request, experts, context)) as stream:
                    async for chunk in stream:
                        if request.stream:
                            begun = True
                            yield chunk
                        else:
                            held.append(chunk)
            except ExpertError as error:
                last = attempt == len(attempts) or context.remaining_s <= 0
                if begun or last or not _another_may_answer(error):
                    raise
                logger.warning("expert %s failed, trying the next: %s", name, error)
            else:
                for chunk in held:
                    yield chunk
                return


def _another_may_answer(error: ExpertError) -> bool:
    """Whether the error is the expert's: its engine, key, setup, context or abilities."""
    own_limits = (ContextLengthError, UnsupportedFeatureError)
    return isinstance(error, own_limits) or not isinstance(error, InvalidRequestError)
