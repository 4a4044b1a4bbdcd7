"""Counts of all replicas that share a memory."""

from __future__ import annotations

import json
from collections.abc import Iterable

from orchestrator.memory.guard import Memory

__all__ = ["Tally"]

FEATURE = "learning"


class Tally:
    """Counts by name, added up over replicas and, with a memory that outlives them, restarts.

    Args:
        memory: Where they are kept.
        of: What is counted, with everything that makes it another thing to count.
        names: Few.
    """

    def __init__(self, memory: Memory, of: Iterable[str], names: Iterable[str]) -> None:
        self._memory = memory
        self._keys = {name: "count:" + json.dumps([*of, name]) for name in names}

    def add(self, name: str) -> None:
        """Count one more, in the background."""
        key, store = self._keys[name], self._memory.store
        self._memory.later(FEATURE, lambda: store.add(key, 1))

    async def read(self) -> dict[str, int]:
        """All counts.

        Raises:
            MemoryUnavailableError: The store does not answer.
        """
        store = self._memory.store
        return {
            name: int(await self._memory.required(FEATURE, store.add(key, 0)))
            for name, key in self._keys.items()
        }
