"""The first expert answers, or nobody."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from experts.base import AnyRequest, Expert
from experts.errors import ExpertTimeoutError
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext

__all__ = ["SingleStrategy", "stream_one"]


async def stream_one(
    name: str, request: AnyRequest, experts: Mapping[str, Expert], context: RequestContext
) -> AsyncGenerator[Chunk, None]:
    """Stream one expert's answer within the request's deadline, noting it in the path."""
    timeout_s = round(context.remaining_s, 3)  # whole milliseconds read better in errors
    if timeout_s <= 0:
        raise ExpertTimeoutError(name, 0.0)
    context.ask(name)
    async with aclosing(experts[name].stream(request, timeout_s=timeout_s)) as stream:
        async for chunk in stream:
            yield chunk


class SingleStrategy:
    """The first expert answers, or nobody."""

    name = "single"

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the first expert's answer."""
        return stream_one(decision.experts[0], request, experts, context)
