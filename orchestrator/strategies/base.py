"""The interface of strategies: run experts, compose their answers into one stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

from experts.base import AnyRequest, Expert
from experts.config import ExpertConfig
from experts.types import Chunk
from orchestrator.decision import Decision, RequestContext
from orchestrator.strict import StrictModel

__all__ = ["Strategy"]


class Strategy(StrictModel):
    """Executes a decision. One instance serves many requests at the same time.

    A strategy is its own config: fields are what a route's ``strategy`` may set.
    """

    type: str
    """Which kind of strategy."""

    @property
    def named_experts(self) -> tuple[str, ...]:
        """Experts the strategy speaks of, such as a judge; they need not be the route's."""
        return ()

    def check_experts(
        self, route: str, names: Sequence[str], entries: Iterable[ExpertConfig]
    ) -> None:
        """Make sure that the strategy can do with a route's experts.

        Args:
            route: Name of the route, for the message.
            names: Of its experts.
            entries: All experts of the config.

        Raises:
            ValueError: It cannot.
        """

    def run(
        self,
        request: AnyRequest,
        decision: Decision,
        experts: Mapping[str, Expert],
        context: RequestContext,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer the request.

        Asks through ``orchestrator.strategies.calls`` only, which keeps deadline and cost limit and
        notes who was asked. Whose answer is given is settled before the first chunk leaves, for
        headers name it. Closing the iterator closes all experts' streams.

        Args:
            request: What to answer.
            decision: Experts in the order in which they are expected to be worth it.
            experts: By name; those of the decision and ``named_experts`` at least.
            context: The request's deadline and cost limit; takes note of every call.

        Raises:
            ExpertError: Nobody could answer, or an expert failed after its first chunk.
            CostLimitError: The limit leaves no answer.
        """
        raise NotImplementedError
