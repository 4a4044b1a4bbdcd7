"""How many US dollars a key may spend per day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from orchestrator.errors import BudgetExhaustedError
from orchestrator.memory.guard import Memory

__all__ = ["Budget"]

FEATURE = "budget"

# A day's counter outlives the day for whoever wants to read it.
KEEP_S = 2 * 86400.0


class Budget:
    """Counts what each key spends, and refuses more when the day's budget is spent.

    A request counts when it has ended. Those in work when the budget runs out are finished, so a
    day may cost more by as much as they cost. A store that does not work lets requests through.

    Args:
        memory: Where to count.
        usd_per_day: US dollars per key and day, of UTC.
    """

    def __init__(self, memory: Memory, usd_per_day: float) -> None:
        self._memory = memory
        self._usd_per_day = usd_per_day

    async def check(self, scope: str) -> None:
        """Let a request pass if something is left.

        Raises:
            BudgetExhaustedError: Nothing is left today.
        """
        now = datetime.now(UTC)
        reading = self._memory.store.add(_key(scope, now), 0.0, ttl_s=KEEP_S)
        if await self._memory.guarded(FEATURE, reading, 0.0) >= self._usd_per_day:
            midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
            raise BudgetExhaustedError(self._usd_per_day, (midnight - now).total_seconds())

    def spend(self, scope: str, usd: float) -> None:
        """Count what a request has cost."""
        if usd > 0:
            key = _key(scope, datetime.now(UTC))
            self._memory.later(FEATURE, lambda: self._memory.store.add(key, usd, ttl_s=KEEP_S))


def _key(scope: str, now: datetime) -> str:
    return f"budget:{scope}:{now.date().isoformat()}"
