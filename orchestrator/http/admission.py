"""How many requests may be in work at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import OverloadedError

__all__ = ["Admission"]


class Admission:
    """Counts requests in work and refuses more than the limit.

    A request counts from before its body is read, so that bodies in memory are bounded too.

    Args:
        limit: Requests in work at the same time.

    Attributes:
        in_flight: Requests in work now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0

    def enter(self) -> None:
        """Count one more request; whoever calls must call ``leave`` once.

        Raises:
            OverloadedError: Too many are in work; nothing was counted.
        """
        if self.in_flight >= self.limit:
            raise OverloadedError(self.limit)
        self.in_flight += 1

    def check_low_priority(self) -> None:
        """Refuse a request that has entered, if half of the places are taken without it.

        Raises:
            OverloadedError: They are; whoever calls still has to call ``leave``.
        """
        if not self.has_room:
            raise OverloadedError(self.limit // 2)

    @property
    def has_room(self) -> bool:
        """Whether less than half of the places are taken, without the request that asks."""
        return self.in_flight - 1 < max(1, self.limit // 2)

    def leave(self) -> None:
        """A request is done."""
        self.in_flight -= 1

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count a request for as long as the block runs."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
