"""The least a Ray Serve user would write to forward chat requests: what we are held against."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse


class Forwarder:
    """Sends a request on and returns what comes back, chunks in batches."""

    def __init__(self, url: str) -> None:
        import httpx

        self._url = url
        self._client = httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=256))

    async def plain(self, body: bytes) -> bytes:
        """A whole answer."""
        response = await self._client.post(self._url, content=body, headers=_JSON)
        return response.content

    async def stream(self, body: bytes) -> AsyncIterator[bytes]:
        """The pieces of a streamed answer."""
        async with self._client.stream("POST", self._url, content=body, headers=_JSON) as response:
            async for piece in response.aiter_raw():
                yield piece


_JSON = {"content-type": "application/json"}


class BareIngress:
    """A FastAPI application that passes requests to the forwarder."""

    def __init__(self, forwarder: Any) -> None:
        self._plain = forwarder.options(method_name="plain")
        self._stream = forwarder.options(method_name="stream", stream=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve once per replica."""
        app = FastAPI()

        @app.post("/chat")
        async def chat(request: Request) -> Response:
            body = await request.json()
            raw = await request.body()
            if body.get("stream"):
                return StreamingResponse(self._stream.remote(raw), media_type="text/event-stream")
            return Response(await self._plain.remote(raw), media_type="application/json")

        return app
