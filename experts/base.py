"""The one interface every engine implements. Knows nothing of routing or HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol, runtime_checkable

from experts.types import ChatRequest, Chunk, CompletionRequest, ExpertCard

__all__ = ["AnyRequest", "Expert"]

AnyRequest = ChatRequest | CompletionRequest


@runtime_checkable
class Expert(Protocol):
    """Answers requests. One instance serves many requests at the same time."""

    @property
    def card(self) -> ExpertCard:
        """What is publicly known of this expert. Cheap; constant over its life."""
        ...

    def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Answer a request piece by piece.

        The last chunk of each answer carries ``finish_reason``; the last of all carries ``usage``.
        ``request.model`` is ignored: whoever calls has chosen this expert. Closing the iterator
        (or cancelling its task) frees the expert within one token. If ``request.stream`` is false,
        nobody reads along, and an answer may come as one chunk.

        Args:
            request: A chat or text completion request.
            timeout_s: Seconds for the whole answer.

        Raises:
            InvalidRequestError: The expert cannot serve this request.
            ExpertError: It failed; ``retryable`` says whether another try may help.
        """
        ...

    async def check_health(self) -> None:
        """Return if it can answer now, raise an ExpertError if not. Idempotent."""
        ...

    async def aclose(self) -> None:
        """Free what it holds. Idempotent; no stream may be started afterwards."""
        ...
