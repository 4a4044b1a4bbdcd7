"""Server-sent events, and noticing that a client has left. The only place that writes ``data:``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "ClientLeft", "EventStream", "event", "unless_client_leaves"]

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"


class ClientLeft(Exception):
    """The client closed its connection before the answer was complete."""


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work``, cancelling it as soon as the client closes its connection.

    The request's body must have been read.

    Raises:
        ClientLeft: The client was gone first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        await _cancel(watcher)
        await _cancel(task)


class EventStream(Response):
    """Sends events as they come, several in one write where they come faster than they leave.

    Args:
        events: Encoded events; closed when the client leaves.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str]) -> None:
        # Proxies must neither keep nor hold back events.
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._events = events
        self._ready: list[bytes] = []
        self._news = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        producer = asyncio.ensure_future(self._produce())
        watcher = asyncio.ensure_future(_left(receive))
        watcher.add_done_callback(lambda _: producer.cancel())
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            while not (producer.done() and not self._ready):
                await self._news.wait()
                self._news.clear()
                if self._ready:
                    body = b"".join(self._ready)
                    self._ready.clear()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            if not producer.cancelled():
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _cancel(watcher)
            await _cancel(producer)

    async def _produce(self) -> None:
        try:
            async for piece in self._events:
                self._ready.append(piece)
                self._news.set()
        finally:
            self._news.set()
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task
