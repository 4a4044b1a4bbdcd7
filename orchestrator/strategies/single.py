"""The first expert answers, or nobody."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Literal

from experts.base import AnyRequest, Expert
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import stream_one

__all__ = ["SingleStrategy"]


class SingleStrategy(Strategy):
    """The first expert answers, or nobody."""

    type: Literal["single"] = "single"
    """Which kind of strategy."""

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the first expert's answer; of an expert asked by name, whatever it is."""
        named = decision.route is None
        return stream_one(decision.experts[0], request, experts, context, check=not named)
