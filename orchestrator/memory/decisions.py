"""The decision log: one record per request, without a word of what was asked or answered."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.decision import Decision, RequestContext
from orchestrator.errors import UnknownDecisionError
from orchestrator.memory.guard import Memory

__all__ = ["CallRecord", "DecisionLog", "DecisionRecord"]

FEATURE = "decisions"


class _Record(BaseModel):
    # A record of an older or newer version can be read too.
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class CallRecord(_Record):
    """One expert asked for one thing."""

    expert: str
    """Its name."""
    purpose: str
    """What for: ``answer``, or what a strategy needs besides answers."""
    seconds: float | None
    """How long it took; null if it did not end."""
    prompt_tokens: int
    """Tokens it read."""
    completion_tokens: int
    """Tokens it wrote."""
    cost_usd: float
    """What it cost in US dollars."""
    error: str | None
    """Name of the error it ended with; ``cancelled`` if nobody wanted the rest, ``lost`` if the
    writer went on without listening to it."""


class DecisionRecord(_Record):
    """What was decided for a request, and what came of it."""

    id: str
    """The decision's id."""
    object: Literal["decision"] = "decision"
    """What this is."""
    created: float
    """When the request ended, in seconds since 1970."""
    scope: str
    """A hash of the API key it came with."""
    model: str
    """What the request asked for: a route or an expert."""
    route: str | None
    """The route that decided; null if an expert was named."""
    policy: str
    """The route's policy, or ``named``."""
    strategy: str
    """How the answer was composed."""
    experts: list[str]
    """The experts, best first."""
    expert: str | None
    """Who answered, or was asked last; null if nobody was asked."""
    path: list[CallRecord]
    """Every expert asked or listened to, in order."""
    peers: dict[str, float] | None = None
    """Who the writer listened to as its answer began, with their gates; null if it was not asked
    to."""
    adapters: dict[str, float] | None = None
    """Which adapters the answer's model mixed, with their shares; null if it was not asked to."""
    merging: str | None = None
    """What of them was added up, ``outputs`` or ``parameters``; null if it was not asked to."""
    status: int
    """The HTTP status; 499 if the client left."""
    category: str | None
    """What the router took the query for, if it knows categories."""
    confidence: float | None
    """Calibrated probability of that category."""
    cost_usd: float
    """US dollars of all calls."""
    seconds: float
    """From the request's arrival to its end."""
    session_id: str | None
    """The conversation, as the request named it."""

    @classmethod
    def of(
        cls,
        decision: Decision,
        context: RequestContext,
        *,
        model: str,
        status: int,
        session_id: str | None,
    ) -> DecisionRecord:
        """The record of a request that has ended."""
        return cls(
            id=decision.id,
            created=time.time(),
            scope=context.scope,
            model=model,
            route=decision.route,
            policy=decision.policy,
            strategy=decision.strategy,
            experts=list(decision.experts),
            expert=context.expert,
            path=[
                CallRecord(
                    expert=call.expert,
                    purpose=call.purpose,
                    seconds=call.seconds,
                    prompt_tokens=call.usage.prompt_tokens,
                    completion_tokens=call.usage.completion_tokens,
                    cost_usd=call.cost_usd,
                    error=call.error,
                )
                for call in context.calls
            ],
            peers=context.peers,
            adapters=context.mixture.shares if context.mixture else None,
            merging=context.mixture.merging if context.mixture else None,
            status=status,
            category=decision.category,
            confidence=None if decision.confidence is None else float(decision.confidence),
            cost_usd=context.cost_usd,
            seconds=time.monotonic() - context.received,
            session_id=session_id,
        )


class DecisionLog:
    """Keeps records of decisions; writes them after the answer has left.

    Args:
        memory: Where to keep them.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._waiting: dict[str, DecisionRecord] = {}

    def add(self, record: DecisionRecord) -> None:
        """Have a record written. What cannot be is counted as an error of memory."""
        self._waiting[record.id] = record
        if not self._memory.later(FEATURE, lambda: self._write(record)):
            del self._waiting[record.id]

    async def _write(self, record: DecisionRecord) -> None:
        try:
            content = record.model_dump_json().encode()
            await self._memory.store.append(FEATURE, record.id, content)
        finally:
            self._waiting.pop(record.id, None)

    async def find(self, id: str, scope: str) -> DecisionRecord:
        """The record of a decision, for the key whose request it was.

        Raises:
            UnknownDecisionError: There is none (any more), or it is somebody else's.
            MemoryUnavailableError: The store does not answer.
        """
        # Who has just got an answer may ask before its record is written.
        record = self._waiting.get(id)
        if record is None:
            content = await self._memory.required(FEATURE, self._memory.store.read(FEATURE, id))
            record = DecisionRecord.model_validate_json(content) if content else None
        if record is None or record.scope != scope:
            raise UnknownDecisionError(id)
        return record
