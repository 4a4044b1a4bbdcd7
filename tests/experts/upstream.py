"""An OpenAI-compatible server on loopback for tests: a scripted expert behind real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from experts.config import ScriptedExpertConfig, ScriptRule
from experts.errors import (
    ExpertAuthError,
    ExpertError,
    ExpertOverloadedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    InvalidRequestError,
)
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest, Choice, Chunk, CompletionRequest, collect

STATUS = {
    ExpertAuthError: 401,
    ExpertOverloadedError: 429,
    ExpertTimeoutError: 408,
    ExpertUnavailableError: 503,
}


@dataclass
class Upstream:
    """What the server saw, and how it is to misbehave."""

    expert: ScriptedExpert
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Answer the next requests with these statuses."""
    retry_after: str = "0"
    plain_answer: str | None = None
    """Answer plain requests with this text."""


def _refusal(status: int, upstream: Upstream, message: str = "refused", param: Any = None) -> Any:
    return JSONResponse(
        {"error": {"message": message, "param": param, "type": "error", "code": None}},
        status,
        headers={"retry-after": upstream.retry_after},
    )


def _event(chunk: Chunk, chat: bool) -> dict[str, Any]:
    if chunk.usage is not None:
        return {"choices": [], "usage": chunk.usage.model_dump()}
    choice = asdict(chunk)
    text, tool_calls = choice.pop("text"), choice.pop("tool_calls")
    choice.pop("usage")
    if chat:
        choice["delta"] = {"content": text, **({"tool_calls": tool_calls} if tool_calls else {})}
    else:
        choice["text"] = text
    return {"choices": [choice]}


def _choice(index: int, choice: Choice, chat: bool) -> dict[str, Any]:
    common = {
        "index": index, "finish_reason": choice.finish_reason, "logprobs": choice.logprobs
    }  # fmt: skip
    if not chat:
        return {**common, "text": choice.text}
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or None}
    if choice.tool_calls:
        # Only deltas number their calls.
        calls = [{k: v for k, v in call.items() if k != "index"} for call in choice.tool_calls]
        message["tool_calls"] = calls
    return {**common, "message": message}


def create_app(upstream: Upstream) -> FastAPI:
    app = FastAPI()

    async def answer(request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Any:
        body = await request.json()
        upstream.bodies.append(body)
        upstream.headers.append(dict(request.headers))
        if upstream.statuses:
            return _refusal(upstream.statuses.pop(0), upstream)
        parsed = kind.model_validate(body)
        chunks = aiter(upstream.expert.stream(parsed, timeout_s=30))
        try:
            if upstream.plain_answer is not None:
                return Response(upstream.plain_answer, media_type="application/json")
            if not parsed.stream:
                whole = await collect(chunks)
                choices = [_choice(i, c, kind is ChatRequest) for i, c in enumerate(whole.choices)]
                return {"choices": choices, "usage": whole.usage.model_dump()}
            first = await anext(chunks)
        except InvalidRequestError as error:
            return _refusal(400, upstream, error.message, error.param)
        except ExpertError as error:
            return _refusal(STATUS.get(type(error), 500), upstream)

        async def events() -> AsyncIterator[str]:
            yield f"data: {json.dumps(_event(first, kind is ChatRequest))}\n\n"
            async for chunk in chunks:
                yield f"data: {json.dumps(_event(chunk, kind is ChatRequest))}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        return await answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> Any:
        if upstream.statuses:
            return _refusal(upstream.statuses.pop(0), upstream)
        return {"object": "list", "data": []}

    return app


@contextmanager
def serving(*rules: ScriptRule, **options: Any) -> Iterator[Upstream]:
    """Serve a scripted expert in a thread; ``url`` is its base URL."""
    config = ScriptedExpertConfig(
        name="upstream", engine="scripted", rules=rules or (ScriptRule(),), **options
    )
    upstream = Upstream(ScriptedExpert(config))
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(upstream), host="127.0.0.1", port=0, log_level="critical", loop="asyncio"
        )
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    upstream.url = f"http://127.0.0.1:{port}/v1"
    try:
        yield upstream
    finally:
        server.should_exit = True
        thread.join()
