"""Whom a writer of a latent collaboration listens to: noted, paid for, and missed when lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from experts.base import AnyRequest, Expert
from experts.types import Usage
from orchestrator.costs import TYPICAL_ANSWER_TOKENS
from orchestrator.decision import LISTEN, Call, RequestContext
from orchestrator.pool import estimated_prompt_tokens, estimated_tokens

__all__ = ["PEERS", "Listening", "listening_usd"]

logger = logging.getLogger("collegium.strategies")

PEERS = "peers"
"""The field by which a request has an expert listen to others: their names with their gates."""


def listening_usd(peer: Expert, request: AnyRequest) -> float:
    """What listening to a peer is expected to cost: it reads the prompt and the answer."""
    written = min(request.token_limit or TYPICAL_ANSWER_TOKENS, TYPICAL_ANSWER_TOKENS)
    return peer.card.usd(Usage.of(estimated_prompt_tokens(request) + written, 0))


class Listening:
    """The peers of one call.

    Each is a call of its own. It costs what it reads, the prompt and the answer, at its card's
    price of prompt tokens; they are counted as the writer counts them.

    Args:
        writer: The call of who writes.
        request: What it was asked.
        experts: By name.
        context: Takes note of the peers.
    """

    def __init__(
        self,
        writer: Call,
        request: AnyRequest,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> None:
        self._writer = writer
        self._request = request
        self._experts = experts
        self._context = context
        self._calls: dict[str, Call] | None = None

    def to(self, peers: Mapping[str, float], written: int) -> list[str]:
        """Take note of what the writer says.

        Args:
            peers: Who it listens to from now on, with their gates.
            written: Characters of the answer so far.

        Returns:
            Who is lost since the answer began.
        """
        begins = self._calls is None
        if self._calls is None:
            self._calls = self._begin(peers)
        lost = [
            call for name, call in self._calls.items() if name not in peers and call.error is None
        ]
        for call in lost:
            read = estimated_prompt_tokens(self._request) + estimated_tokens("." * written)
            self._settle(call, Usage() if begins else Usage.of(read, 0), "lost")
            logger.warning("expert %s goes on without %s", self._writer.expert, call.expert)
        # Who was lost before the first byte is missing from the header.
        return [] if begins else [call.expert for call in lost]

    def _begin(self, peers: Mapping[str, float]) -> dict[str, Call]:
        self._context.peers = dict(peers)
        wanted = (self._request.model_extra or {}).get(PEERS) or ()
        calls = {
            name: Call(
                name,
                LISTEN,
                started=self._writer.started,
                cost_usd=listening_usd(self._experts[name], self._request),
            )
            for name in dict.fromkeys((*wanted, *peers))
            if name in self._experts
        }
        self._context.calls += calls.values()
        return calls

    def end(self) -> None:
        """Settle who is still listened to, once the writer's own call is."""
        for call in (self._calls or {}).values():
            if call.error is None:
                read = Usage.of(self._writer.usage.total_tokens, 0)
                self._settle(call, read, self._writer.error and "cancelled")

    def _settle(self, call: Call, usage: Usage, error: str | None) -> None:
        call.seconds = time.monotonic() - call.started
        call.usage, call.error = usage, error
        call.cost_usd = self._experts[call.expert].card.usd(usage)
