"""The interface of strategies: run experts, compose their answers into one stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from experts.base import AnyRequest, Expert
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext

__all__ = ["Strategy"]


class Strategy(Protocol):
    """Executes a decision. One instance serves many requests at the same time."""

    name: str

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer the request.

        Calls ``context.ask`` before it asks an expert, so that the path is known when the first
        chunk arrives. Closing the iterator closes the experts' streams.

        Raises:
            ExpertError: Nobody could answer, or an expert failed after its first chunk.
        """
        ...
