"""The interface of stores. Nothing above it knows which one there is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Store", "StoreError"]


class StoreError(Exception):
    """A store did not do what it was asked for. The message says why."""


class Store(Protocol):
    """Keeps bytes: values and counters by key, and append-once logs.

    Keys are bytes, or text in their place, which counts as its UTF-8. One instance serves many
    tasks of one event loop. An operation that is cancelled may have been done. Every method raises
    ``StoreError`` and nothing else if it cannot do its work, and after ``aclose``.
    """

    async def get(self, key: str | bytes) -> bytes | None:
        """The value of a key; none if there is none, or if its time is over."""
        ...

    async def put(self, key: str | bytes, value: bytes, *, ttl_s: float | None = None) -> None:
        """Set the value of a key, and for how long.

        Args:
            key: The key; counters have keys of their own.
            value: Replaces what was there.
            ttl_s: Seconds until it is forgotten, more than 0; none keeps it.
        """
        ...

    async def delete(self, key: str | bytes) -> None:
        """Forget a key's value and its counter; it is fine if there is neither."""
        ...

    async def add(self, key: str | bytes, amount: float, *, ttl_s: float | None = None) -> float:
        """Add to a counter, which starts at 0. Nothing is lost however many add at once.

        Args:
            key: The counter's key; values have keys of their own.
            amount: What to add; 0 reads.
            ttl_s: Seconds from its first addition until the counter is forgotten; has no effect on
                one that is there. None keeps it.

        Returns:
            The sum.
        """
        ...

    async def append(self, log: str, id: str, record: bytes) -> bool:
        """Put a record at the end of a log, exactly once however many try.

        A log keeps a bounded number of records and drops the oldest.

        Returns:
            Whether it was appended; false if the log has a record of this id, which stays.
        """
        ...

    async def read(self, log: str, id: str) -> bytes | None:
        """One record of a log; none if it is not there (any more)."""
        ...

    async def scan(
        self, log: str, *, after: str | None = None, limit: int
    ) -> list[tuple[str, bytes]]:
        """Records with their ids, in the order in which they were appended.

        Args:
            log: Name of the log.
            after: Start behind the record of this id. If it is not there (any more), as without:
                at the oldest record, since what was dropped is older than all that are kept.
            limit: How many at most.
        """
        ...

    async def aclose(self) -> None:
        """Free what the store holds; a second time is fine."""
        ...
