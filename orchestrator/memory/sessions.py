"""Sessions: who answered last in a conversation, and what leaving that expert would cost.

An expert that has read the earlier turns keeps them in its prompt cache, and reads them again for a
part of the price. Another has to read them all. So switching is priced, not forbidden.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import Field, TypeAdapter, ValidationError

from experts.base import AnyRequest
from experts.types import ChatRequest, Completion
from orchestrator.costs import ExpectedCosts
from orchestrator.decision import SessionShare
from orchestrator.memory.guard import Memory
from orchestrator.pool import estimated_prompt_tokens
from orchestrator.strict import StrictModel

__all__ = ["Session", "Sessions", "SessionsConfig"]

FEATURE = "sessions"


class SessionsConfig(StrictModel):
    """What a conversation's earlier turns are worth to the next decision."""

    ttl_s: float = Field(default=1800.0, gt=0)
    """Seconds after an answer for which its expert's prompt cache counts."""
    cached_input_share: float = Field(default=0.1, ge=0, le=1)
    """The part of the input price that tokens in an expert's prompt cache cost."""
    stickiness: float = Field(default=0.02, ge=0, le=1)
    """Points of quality that others must be better by, where the expert has no input price or the
    policy's costs are not US dollars."""


@dataclass(frozen=True, slots=True)
class Session:
    """What is known of a conversation.

    Attributes:
        expert: Who answered last.
        tokens: Of the conversation that the expert has seen, its own answer included.
        tool_calls: Ids of the tool calls in its answer.
    """

    expert: str
    tokens: int
    tool_calls: tuple[str, ...] = ()

    def waits_for(self, request: AnyRequest) -> bool:
        """Whether the request brings results of tools that the expert called."""
        if not isinstance(request, ChatRequest) or request.messages[-1].role != "tool":
            return False
        return request.messages[-1].tool_call_id in self.tool_calls

    def share(
        self,
        config: SessionsConfig,
        request: AnyRequest,
        costs: ExpectedCosts,
    ) -> SessionShare | None:
        """What it has to say in the next decision; none if its expert cannot be chosen.

        Args:
            config: What earlier turns are worth.
            request: The next request.
            costs: Of the experts that can be chosen.
        """
        if self.expert not in costs.names:
            return None
        price = float(costs.input_usd[costs.names.index(self.expert)])
        cached = min(self.tokens, estimated_prompt_tokens(request))
        priced = costs.unit == "usd" and price > 0
        return SessionShare(
            self.expert,
            cached_tokens=cached,
            cached_usd=cached * price * (1 - config.cached_input_share),
            stickiness=0.0 if priced else config.stickiness,
            tool_call=self.waits_for(request),
        )


_SESSION = TypeAdapter(Session)


class Sessions:
    """Remembers sessions. Whatever the store does, the worst is a decision without one.

    Args:
        config: What earlier turns are worth.
        memory: Where sessions are kept.
    """

    def __init__(self, config: SessionsConfig, memory: Memory) -> None:
        self.config = config
        self._memory = memory

    async def find(self, session_id: str, scope: str) -> Session | None:
        """What is known of a session; none if nobody answered in it lately.

        Args:
            session_id: As requests name it.
            scope: Whose requests they are.
        """
        get = self._memory.store.get(_key(session_id, scope))
        content = await self._memory.guarded(FEATURE, get, None)
        try:
            return _SESSION.validate_json(content) if content else None
        except ValidationError:
            return None  # of another version

    async def note(
        self, session_id: str, scope: str, expert: str, tokens: int, completion: Completion
    ) -> None:
        """Note who answered. Done before the answer's end, for a tool's result may come at once.

        Args:
            session_id: As requests name it.
            scope: Whose requests they are.
            expert: Who answered.
            tokens: What it has read and written.
            completion: Its answer.
        """
        calls = tuple(call["id"] for choice in completion.choices for call in choice.tool_calls)
        content = _SESSION.dump_json(Session(expert, tokens, calls))
        put = self._memory.store.put(_key(session_id, scope), content, ttl_s=self.config.ttl_s)
        await self._memory.guarded(FEATURE, put, None)


def _key(session_id: str, scope: str) -> str:
    named = hashlib.sha256(f"{scope}\0{session_id}".encode(errors="surrogatepass")).hexdigest()
    return f"{FEATURE}:{named}"
