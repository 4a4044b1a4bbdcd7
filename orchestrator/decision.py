"""What was decided for one request, and what happened since. Knows nothing of how or by whom."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Candidate", "Decision", "RequestContext", "new_decision_id"]


def new_decision_id() -> str:
    """A fresh id, under which a decision is found in headers and logs."""
    return "dec_" + uuid.uuid4().hex


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
class Decision:
    """Who shall answer a request, in which order and how.

    Attributes:
        experts: Names, best first.
        width: How many of them shall answer, for strategies that compose several answers.
        route: The route asked for; none if an expert was named.
        policy: Name of the policy; ``named`` if an expert was named.
        candidates: Every expert that could serve the request, best first.
        excluded: Experts of the route that could not, each with the reason.
        category: The router's category of the query, if it knows categories.
        confidence: Calibrated probability of that category.
        fallback: Whether the router was too unsure and used its general category.
        detail: Further facts from the router.
    """

    experts: tuple[str, ...]
    width: int = 1
    route: str | None = None
    router: str | None = None
    policy: str = "named"
    strategy: str = "single"
    cost_quality: float | None = None
    candidates: tuple[Candidate, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    category: str | None = None
    confidence: float | None = None
    fallback: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=new_decision_id)


@dataclass(slots=True)
class RequestContext:
    """What happens to one request on its way; strategies write, HTTP and telemetry read.

    Attributes:
        deadline: Moment on the monotonic clock, in seconds, when the request must be done.
        path: Experts asked so far, in order.
        received: Moment on the monotonic clock when the request came.
        asked: Moment when the first expert was asked.
        router_s: Seconds the router took.
    """

    deadline: float
    path: list[str] = field(default_factory=list)
    received: float = field(default_factory=time.monotonic)
    asked: float | None = None
    router_s: float = 0.0

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def ask(self, expert: str) -> None:
        """Note that an expert is being asked."""
        self.path.append(expert)
        if self.asked is None:
            self.asked = time.monotonic()

    @property
    def overhead_ms(self) -> float:
        """Milliseconds between the request's arrival and the first expert being asked."""
        return ((self.asked or time.monotonic()) - self.received) * 1000
