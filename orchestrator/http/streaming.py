"""Server-sent events, and noticing that a client has left. The only place that writes ``data:``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "ClientLeft", "EventStream", "Feed", "comment", "event", "unless_client_leaves"]

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """The client closed its connection before the answer was complete."""


def event(json: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + json + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients skip and that keeps proxies from giving up."""
    return b": " + " ".join(text.split()).encode() + b"\n\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work``, cancelling it as soon as the client closes its connection.

    The request's body must have been read.

    Raises:
        ClientLeft: The client was gone first.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    # Like asyncio.timeout: cancels this very task, which saves a task for the work.
    def cancel(_: object) -> None:
        nonlocal left
        left = True
        task.cancel()

    watcher = asyncio.ensure_future(_left(request.receive))
    watcher.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientLeft from None
        raise
    finally:
        watcher.remove_done_callback(cancel)
        watcher.cancel()


class Feed:
    """Runs a stream of events in a task of its own until it ends or the client leaves.

    One task consumes the stream from its first piece to its last, so experts may hold timeouts
    over several pieces. The stream is closed in any case.

    Args:
        events: Encoded events.
        receive: The request's channel; its body must have been read.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], receive: Receive) -> None:
        self._ready: list[bytes] = []
        self._news = asyncio.Event()
        self.task = asyncio.ensure_future(self._consume(events))
        self.task.add_done_callback(lambda _: self._news.set())
        self._watcher = asyncio.ensure_future(_left(receive))
        self._watcher.add_done_callback(lambda _: self.task.cancel())

    async def _consume(self, events: AsyncGenerator[bytes, None]) -> None:
        async with aclosing(events):
            async for piece in events:
                self._ready.append(piece)
                self._news.set()

    async def begin(self) -> None:
        """Wait for the first piece.

        Raises:
            ClientLeft: The client was gone first.
            Exception: The stream's own error before its first piece.
        """
        await self._news.wait()
        if self._ready:
            return
        if self.task.cancelled():
            raise ClientLeft
        self.task.result()

    async def batches(self) -> AsyncGenerator[bytes, None]:
        """The pieces, several at once where they come faster than they leave."""
        while self._ready or not self.task.done():
            if self._ready:
                batch = b"".join(self._ready)
                self._ready.clear()
                yield batch
            else:
                self._news.clear()
                await self._news.wait()

    @property
    def complete(self) -> bool:
        """Whether the stream came to its own end."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None

    async def aclose(self) -> None:
        """Stop it, if it still runs, and wait until its expert is free."""
        self._watcher.cancel()
        if not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})
        if not self.task.cancelled():
            self.task.exception()  # whoever wanted it has asked; else asyncio would log it


class EventStream(Response):
    """Sends a feed's events as they come."""

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, headers: Mapping[str, str]) -> None:
        # Proxies must neither keep nor hold back events.
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for batch in self._feed.batches():
                await send({"type": "http.response.body", "body": batch, "more_body": True})
            if self._feed.complete:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._feed.aclose()
