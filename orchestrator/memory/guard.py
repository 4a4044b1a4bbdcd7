"""Between features and the store: whatever happens to the store, requests are answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from orchestrator.errors import MemoryUnavailableError
from orchestrator.memory.base import Store, StoreError

__all__ = ["Memory"]

logger = logging.getLogger("collegium.memory")

Result = TypeVar("Result")
Default = TypeVar("Default")
Operation = Coroutine[Any, Any, Result]

_EXPECTED = (StoreError, TimeoutError)

# After an operation took too long, requests do not wait for the store for this long.
PAUSE_S = 1.0

LOG_EVERY_S = 60.0

# Operations that may wait to be done in the background.
MAX_PENDING = 10_000

# What is still to be done at shutdown has this long.
CLOSE_S = 5.0


class Memory:
    """A store that may fail. Every failure is counted, and logged once a minute per feature.

    Args:
        store: What keeps things; closed with this.
        timeout_s: Seconds an operation may take.

    Attributes:
        on_error: Is called with the feature's name whenever the store did not do something.
    """

    def __init__(self, store: Store, *, timeout_s: float = 0.25) -> None:
        self.store = store
        self.on_error: Callable[[str], None] = lambda feature: None
        self._timeout_s = timeout_s
        self._paused_until = 0.0
        self._logged: dict[str, float] = {}
        self._pending: deque[tuple[str, Callable[[], Operation[Any]]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def guarded(
        self, feature: str, operation: Operation[Result], default: Default
    ) -> Result | Default:
        """The result of one of the store's operations, or a default where that fails.

        Args:
            feature: Name of what needs it; few, since each is a label value of a counter.
            operation: The operation, as its method returns it.
            default: What to go on with if it fails or takes too long.
        """
        if time.monotonic() < self._paused_until:
            operation.close()
            self._failed(feature, "it took too long a moment ago")
            return default
        try:
            return await self._timely(operation)
        except _EXPECTED as error:
            self._failed(feature, error)
            return default

    async def required(self, feature: str, operation: Operation[Result]) -> Result:
        """The result of an operation that is all a request asks for.

        Raises:
            MemoryUnavailableError: It failed or took too long.
        """
        try:
            return await self._timely(operation)
        except _EXPECTED as error:
            self._failed(feature, error)
            raise MemoryUnavailableError from error

    def later(self, feature: str, begin: Callable[[], Operation[Any]]) -> bool:
        """Have an operation done in the background, after those that wait already.

        Args:
            feature: Name of what needs it.
            begin: Starts the operation, by calling its method.

        Returns:
            Whether it will be tried; false, and counted as an error, if too many wait.
        """
        if len(self._pending) >= MAX_PENDING:
            self._failed(feature, f"{MAX_PENDING} operations wait for it already")
            return False
        self._pending.append((feature, begin))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return True

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be done in the background."""
        return not self._pending and (self._worker is None or self._worker.done())

    async def aclose(self) -> None:
        """Do what is still to be done, for a few seconds at most, and close the store."""
        try:
            async with asyncio.timeout(CLOSE_S):
                while self._pending or (self._worker and not self._worker.done()):
                    if self._worker is None or self._worker.done():
                        self._worker = asyncio.create_task(self._work())
                    await asyncio.wait({self._worker})
        except TimeoutError:
            if self._worker is not None:
                self._worker.cancel()
                await asyncio.wait({self._worker})
        for feature, _ in self._pending:
            self._failed(feature, "the service ends, and this was not done in time")
        self._pending.clear()
        try:
            await self._timely(self.store.aclose())
        except _EXPECTED as error:
            self._failed("close", error)

    async def _work(self) -> None:
        while self._pending:
            feature, begin = self._pending[0]
            try:
                await self._timely(begin())
            except Exception as error:
                # A feature's own mistake must not end the work for the others.
                self._failed(feature, error if isinstance(error, _EXPECTED) else repr(error))
            # What is cancelled midway stays, for aclose to count it.
            self._pending.popleft()

    async def _timely(self, operation: Operation[Result]) -> Result:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await operation
        except TimeoutError:
            self._paused_until = time.monotonic() + PAUSE_S
            raise TimeoutError(f"it took more than {self._timeout_s:g} s") from None

    def _failed(self, feature: str, why: object) -> None:
        self.on_error(feature)
        now = time.monotonic()
        if now - self._logged.get(feature, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged[feature] = now
            logger.warning("memory does not work for %s, which goes on without: %s", feature, why)
