"""What was decided for one request, and what happened since. Knows nothing of how or by whom."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experts.base import AnyRequest
from experts.errors import ContextLengthError, InvalidRequestError, UnsupportedFeatureError
from experts.types import Mixture, Usage

if TYPE_CHECKING:
    from orchestrator.learning.learner import Lesson
    from orchestrator.memory.cache import Lookup
    from orchestrator.options import RoutingOptions

__all__ = [
    "DECISION_PREFIX",
    "LISTEN",
    "PUBLIC",
    "Call",
    "Candidate",
    "Decision",
    "RequestContext",
    "SessionShare",
    "new_decision_id",
]

DECISION_PREFIX = "dec_"

# The scope of requests without a key.
PUBLIC = "public"

# The purpose of an expert that is only listened to while another writes.
LISTEN = "listen"

# How calls end through no fault of the expert.
_BLAMELESS = {
    None,
    "cancelled",
    *(error.__name__ for error in (ContextLengthError, InvalidRequestError,
                                   UnsupportedFeatureError)),
}  # fmt: skip


def new_decision_id() -> str:
    """A fresh id, under which a decision is found in headers and logs."""
    return DECISION_PREFIX + uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Candidate:
    """One expert as the policy saw it.

    Attributes:
        quality: Predicted score in [0, 1]; none where no router was asked.
        cost_usd: Expected cost of this request in US dollars.
        utility: What the policy made of both; higher is better.
    """

    expert: str
    quality: float | None = None
    cost_usd: float = 0.0
    utility: float | None = None


@dataclass(frozen=True, slots=True)
class SessionShare:
    """What a conversation's earlier turns had to say in a decision.

    Attributes:
        expert: Who answered last, and has the earlier turns in its prompt cache.
        cached_tokens: About how many of the prompt's tokens that are.
        cached_usd: What these cost it less than anybody else, in US dollars.
        stickiness: Points of quality that others had to be better by.
        tool_call: Whether the request answers its tool call, so that it goes on in any case.
    """

    expert: str
    cached_tokens: int
    cached_usd: float
    stickiness: float
    tool_call: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Who shall answer a request, in which order and how.

    Attributes:
        experts: Names, best first.
        width: How many of them shall answer, for strategies that compose several answers; none
            leaves it to the strategy.
        route: The route asked for; none if an expert was named.
        router_release: Which release of the router, where it has releases.
        policy: Name of the policy; ``named`` if an expert was named, ``cache`` if an answer that
            was given before is given again.
        candidates: Every expert that could serve the request, best first.
        excluded: Experts of the route that could not, each with the reason.
        category: The router's category of the query, if it knows categories.
        confidence: Calibrated probability of that category.
        fallback: Whether the router was too unsure and used its general category.
        detail: Further facts from the router.
        session: What the earlier turns had to say, if anything.
        experiment: The experiment asked for, if one was; ``route`` is then its arm's.
        arm: The arm that the client belongs to.
    """

    experts: tuple[str, ...]
    width: int | None = None
    route: str | None = None
    router: str | None = None
    router_release: str | None = None
    policy: str = "named"
    strategy: str = "single"
    cost_quality: float | None = None
    candidates: tuple[Candidate, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    category: str | None = None
    confidence: float | None = None
    fallback: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)
    session: SessionShare | None = None
    experiment: str | None = None
    arm: str | None = None
    id: str = field(default_factory=new_decision_id)


@dataclass(slots=True)
class Call:
    """One expert asked for one thing.

    Attributes:
        expert: Its name.
        purpose: What for: ``answer``, or what a strategy needs besides answers.
        started: Moment on the monotonic clock when it was asked.
        cost_usd: What it cost; what it is expected to cost while it is under way.
        seconds: How long it took; none while it is under way.
        usage: Its token counts, as far as they are known.
        error: Name of the error it ended with; ``cancelled`` if nobody wanted the rest, ``lost`` if
            the writer went on without listening to it.
    """

    expert: str
    purpose: str = "answer"
    started: float = field(default_factory=time.monotonic)
    cost_usd: float = 0.0
    seconds: float | None = None
    usage: Usage = field(default_factory=Usage)
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether an answer was wanted and its expert is to blame that there is none."""
        return self.purpose == "answer" and self.error not in _BLAMELESS


@dataclass(slots=True)
class RequestContext:
    """What happens to one request on its way; strategies write, HTTP and telemetry read.

    Attributes:
        deadline: Moment on the monotonic clock, in seconds, when the request must be done.
        max_cost_usd: US dollars that all calls together may cost; none sets no limit.
        calls: Experts asked so far, in order.
        received: Moment on the monotonic clock when the request came.
        router_s: Seconds the router took.
        answered_by: Whose answer is given, where that is not the expert asked last.
        scope: Whose request it is: a hash of the API key. What is remembered belongs to a scope.
        reroute: Decides anew, by the same route among the same candidates, for strategies whose
            next step depends on what is there so far; none where an expert was named.
        composing: Whether several are asked, so that it is open who answers until ``answered_by``.
        options: What the request itself says of its routing.
        lesson: What feedback on the answer can be learnt from, if anything is.
        session_id: The conversation, as the request names it.
        cache: What the response cache had for the request; none if there is no cache.
        peers: Who the writer listened to as its answer began, with their gates; none if it was not
            asked to.
        mixture: Which adapters were mixed; none if nobody was asked to mix any.
    """

    deadline: float
    max_cost_usd: float | None = None
    calls: list[Call] = field(default_factory=list)
    received: float = field(default_factory=time.monotonic)
    router_s: float = 0.0
    answered_by: str | None = None
    scope: str = PUBLIC
    reroute: Callable[[AnyRequest], Awaitable[Decision]] | None = None
    composing: bool = False
    session_id: str | None = None
    options: RoutingOptions | None = None
    lesson: Lesson | None = None
    cache: Lookup | None = None
    peers: dict[str, float] | None = None
    mixture: Mixture | None = None

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def path(self) -> list[str]:
        """Experts asked to write so far, in order."""
        return [call.expert for call in self.calls if call.purpose != LISTEN]

    @property
    def expert(self) -> str | None:
        """Who answers: named by the strategy, else asked last; none as long as it is open."""
        if self.answered_by or self.composing:
            return self.answered_by
        return self.path[-1] if self.calls else None

    @property
    def failures(self) -> bool:
        """Whether an expert failed at the answer, or at what it was to be made of."""
        return any(
            call.error not in _BLAMELESS and call.purpose not in ("judge", "verify")
            for call in self.calls
        )

    @property
    def usage(self) -> Usage:
        """Tokens of all calls; what peers read is what the writer read and wrote."""
        return sum((call.usage for call in self.calls if call.purpose != LISTEN), Usage())

    @property
    def cost_usd(self) -> float:
        """US dollars of all calls, what is under way as expected."""
        return sum(call.cost_usd for call in self.calls)

    def affords(self, usd: float) -> bool:
        """Whether so many US dollars more keep to the limit."""
        return self.max_cost_usd is None or self.cost_usd + usd <= self.max_cost_usd

    @property
    def overhead_ms(self) -> float:
        """Milliseconds between the request's arrival and the first expert being asked."""
        asked = self.calls[0].started if self.calls else time.monotonic()
        return (asked - self.received) * 1000
