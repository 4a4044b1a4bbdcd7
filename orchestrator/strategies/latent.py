"""One expert writes, and listens to others of the same engine while it does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from experts.base import AnyRequest, Expert
from experts.config import ExpertConfig, cards_of
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.calls import expected_usd, stream_one
from orchestrator.strategies.fallback import FallbackStrategy, first_to_answer
from orchestrator.strategies.listening import PEERS, listening_usd
from orchestrator.strategies.several import predicted, shares_by_quality

__all__ = ["LatentStrategy", "hosted_together"]

# Engines whose experts can listen to each other: those of one entry, and all scripted ones, which
# stand in for members of one.
LISTENING: frozenset[str] = frozenset({"latent", "scripted"})


class LatentStrategy(Strategy):
    """The first expert writes, and listens to the hidden states of the next ones while it does.

    All experts of the route must be members of one engine of the kind ``latent``. If the writer
    fails before its first byte, the next expert writes and listens to those after it, as in
    ``fallback``. If a peer fails, the writer goes on without it.

    References:
        Mixture of Thoughts (arXiv:2509.21164). Departs from it in gates that are the softmax of the
        log-odds of predicted qualities, so that any router can lead a collaboration.
    """

    type: Literal["latent"]
    """Which kind of strategy."""
    active: int = Field(default=2, ge=1, le=16)
    """Experts that take part, the writer included, where neither the policy nor the request says; 1
    has it write alone."""
    writer: str | None = None
    """The expert that writes whenever it can serve the request, of a collaboration that was trained
    with one writer; none has the decision's first expert write."""

    @property
    def named_experts(self) -> tuple[str, ...]:
        """The one that always writes, if there is one."""
        return () if self.writer is None else (self.writer,)

    def check_experts(
        self, route: str, names: Sequence[str], entries: Iterable[ExpertConfig]
    ) -> None:
        """Make sure that the experts can listen to each other, the writer among them.

        Raises:
            ValueError: Not all are members of one engine, or the writer is none of them.
        """
        if not hosted_together(entries, names):
            raise ValueError(
                f"the strategy 'latent' of route {route!r} needs experts that one entry with "
                f"engine 'latent' hosts together, which {', '.join(map(repr, names))} are not; "
                "list only members of one under the route's 'experts'"
            )
        if self.writer is not None and self.writer not in names:
            raise ValueError(
                f"the writer {self.writer!r} of route {route!r} is none of its experts: "
                f"{', '.join(map(repr, names))}"
            )

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the answer of the first expert that gives one."""
        # The others stay in the decision's order.
        names = tuple(sorted(decision.experts, key=lambda name: name != self.writer))
        known = predicted(decision)
        active = decision.width or self.active

        def ask(writer: str) -> AsyncGenerator[Chunk, None]:
            place = names.index(writer)
            peers = names[place + 1 : place + active]
            peers = _affordable(writer, peers, request, experts, context)
            shares = shares_by_quality([known.get(name, 0.5) for name in (writer, *peers)])
            own = {PEERS: dict(zip(peers, shares[1:], strict=True))}
            return stream_one(writer, request.model_copy(update=own), experts, context)

        attempts = names[: FallbackStrategy().max_attempts]
        return first_to_answer(attempts, ask, request, context)


def _affordable(
    writer: str,
    peers: Sequence[str],
    request: AnyRequest,
    experts: Mapping[str, Expert],
    context: RequestContext,
) -> tuple[str, ...]:
    """The peers up to the first that the cost limit does not pay for, beside the writer."""
    if context.max_cost_usd is None:
        return tuple(peers)
    usd = expected_usd(experts[writer], request)
    paid = []
    for peer in peers:
        usd += listening_usd(experts[peer], request)
        if not context.affords(usd):
            break
        paid.append(peer)
    return tuple(paid)


def hosted_together(entries: Iterable[ExpertConfig], names: Iterable[str]) -> bool:
    """Whether all experts can listen to each other: members of one engine of the kind ``latent``.

    Scripted experts count as such among themselves: they are the double that stands in for one.

    Args:
        entries: Of the config.
        names: Of the experts.
    """
    hosts = {
        card.name: "" if entry.engine == "scripted" else entry.name
        for entry in entries
        if entry.engine in LISTENING
        for card in cards_of(entry)
    }
    found = [hosts.get(name) for name in names]
    return None not in found and len(set(found)) == 1
