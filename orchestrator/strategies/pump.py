"""Reading a stream while waiting for something else: a moment, or another stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Generic, TypeVar

from experts.types import Chunk
from orchestrator.strategies.calls import freed

__all__ = ["Pump", "ticking", "with_progress"]

Item = TypeVar("Item")


class Pump(Generic[Item]):
    """Consumes a stream in a task of its own, from its first item to its last.

    One task does all of it, because experts hold timeouts over several pieces. Whoever makes a pump
    must close it.

    Args:
        items: The stream; it is closed in any case.

    Attributes:
        begun: Done as soon as there is a first item, or the stream has ended without one.
        task: Done when the stream has ended.
    """

    def __init__(self, items: AsyncGenerator[Item, None]) -> None:
        self._ready: deque[Item] = deque()
        self._news = asyncio.Event()
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.ensure_future(self._consume(items))
        self.task.add_done_callback(lambda _: self._tell())

    async def _consume(self, items: AsyncGenerator[Item, None]) -> None:
        async with aclosing(items):
            async for item in items:
                self._ready.append(item)
                self._tell()

    def _tell(self) -> None:
        self._news.set()
        if not self.begun.done():
            self.begun.set_result(None)

    @property
    def error(self) -> BaseException | None:
        """What the stream has ended with, if it was an error."""
        ended = self.task.done() and not self.task.cancelled()
        return self.task.exception() if ended else None

    async def items(
        self, pause_s: Callable[[], float] | None = None
    ) -> AsyncGenerator[Item | None, None]:
        """The stream's items, and its error at the end.

        Args:
            pause_s: Seconds to wait for the next item; where none has come by then, there is a
                ``None`` instead.
        """
        while self._ready or not self.task.done():
            if self._ready:
                yield self._ready.popleft()
                continue
            self._news.clear()
            try:
                async with asyncio.timeout(pause_s() if pause_s else None):
                    await self._news.wait()
            except TimeoutError:
                yield None
        self.task.result()

    async def aclose(self) -> None:
        """Close the stream, and wait until its experts are free."""
        await freed([self.task])


async def ticking(
    items: AsyncGenerator[Item, None], pause_s: Callable[[], float]
) -> AsyncGenerator[Item | None, None]:
    """A stream's items, and ``None`` whenever none has come for as long as ``pause_s`` says.

    Closing it closes the stream, and waits until its experts are free.
    """
    pump = Pump(items)
    try:
        async with aclosing(pump.items(pause_s)) as found:
            async for item in found:
                yield item
    finally:
        await pump.aclose()


async def with_progress(
    chunks: AsyncGenerator[Chunk, None], progress: str, every_s: float
) -> AsyncGenerator[Chunk, None]:
    """An answer's chunks, with comments before the first of them as long as it does not come."""
    begun = False
    async with aclosing(ticking(chunks, lambda: every_s)) as pieces:
        async for piece in pieces:
            if piece is not None:
                begun = True
                yield piece
            elif not begun:
                yield Chunk(progress=progress)
