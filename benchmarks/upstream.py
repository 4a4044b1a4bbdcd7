"""A scripted upstream: answers any chat request at once, or streams 50 chunks. Pure ASGI.

python -m benchmarks.upstream PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

CHUNKS = 50
USAGE = {"prompt_tokens": 20, "completion_tokens": CHUNKS, "total_tokens": 20 + CHUNKS}
ENVELOPE = {"id": "chatcmpl-bench", "created": 1700000000, "model": "upstream"}


def _event(choice: dict[str, Any] | None, usage: dict[str, int] | None = None) -> bytes:
    body = {
        **ENVELOPE,
        "object": "chat.completion.chunk",
        "choices": [choice] if choice else [],
        "usage": usage,
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


PLAIN = json.dumps(
    {
        **ENVELOPE,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * CHUNKS},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
).encode()
EVENTS = [
    *[_event({"index": 0, "delta": {"content": "word "}, "finish_reason": None})] * CHUNKS,
    _event({"index": 0, "delta": {}, "finish_reason": "stop"}),
    _event(None, USAGE),
    b"data: [DONE]\n\n",
]


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer one request."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    stream = b'"stream":true' in body.replace(b" ", b"")
    kind = b"text/event-stream" if stream else b"application/json"
    headers = [(b"content-type", kind)]
    if not stream:
        headers.append((b"content-length", str(len(PLAIN)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not stream:
        await send({"type": "http.response.body", "body": PLAIN})
        return
    for event in EVENTS:
        await send({"type": "http.response.body", "body": event, "more_body": True})
        # As a model would, let other requests in between two chunks.
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
