"""A service over experts that fail, with every strategy that there is: for drills."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, get_args

from fastapi import FastAPI

from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from orchestrator.http.encoding import encode
from orchestrator.strategies.registry import AnyStrategy
from tests.orchestrator.support import CHAT, build, expert

NAMES = ("ann", "bob", "cid")
TYPES = [kind.model_fields["type"].annotation for kind in get_args(get_args(AnyStrategy)[0])]
STRATEGIES: list[str] = [get_args(annotation)[0] for annotation in TYPES]

# Settings without which a strategy would do little in a drill, or could not be made.
SETTINGS: dict[str, dict[str, Any]] = {
    "hedge": {"wait_s": 0.03, "max_extra_share": 1.0},
    "fusion": {"progress_s": 0.05},
    "chain": {"depth": 3, "progress_s": 0.05},
    "best_of": {"judge": "ann"},
    "mix": {"base": "cid"},
}


def orchestrator_of(
    strategy: str,
    *,
    timeout_s: float,
    faults: Mapping[str, Any],
    rule: Mapping[str, Any] | None = None,
) -> Orchestrator:
    """Three experts, each with its name in whatever it says, behind a route with the strategy."""
    entries = [
        {
            "name": name,
            "engine": "scripted",
            "faults": faults,
            "rules": [
                {"match": "as JSON", "answer": f'{{"by": "{name}", "well": true}}', **(rule or {})},
                {
                    "answer": f"{name} says all is well",
                    "tool_call": {"name": "report", "arguments": {"by": name}},
                    **(rule or {}),
                },
            ],
        }
        for name in NAMES
    ]
    quality = {name: 0.9 - 0.1 * place for place, name in enumerate(NAMES)}
    route = {"router": "table", "strategy": {"type": strategy, **SETTINGS.get(strategy, {})}}
    return build(
        parse_config(
            {
                "experts": entries,
                "routers": {"table": {"type": "static", "quality": quality}},
                "routes": {"auto": route},
                "server": {"limits": {"timeout_s": timeout_s}},
            }
        )
    )


def active(orchestrator: Orchestrator) -> int:
    """Answers that are being written."""
    return sum(expert(orchestrator, name).active for name in NAMES)


class Visitor:
    """A client that asks an application directly, and may leave.

    Args:
        app: Who answers.
        body: Of the request.

    Attributes:
        sent: What the application has sent.
        task: The application at work.
    """

    def __init__(self, app: FastAPI, body: Mapping[str, Any]) -> None:
        self.sent: list[Mapping[str, Any]] = []
        self._gone = asyncio.Event()
        self._unread = encode(body)
        self.task = asyncio.ensure_future(self._visit(app))

    async def _visit(self, app: FastAPI) -> None:
        headers = [(b"host", b"test"), (b"content-type", b"application/json")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1",
                 "method": "POST", "scheme": "http", "path": CHAT, "raw_path": CHAT.encode(),
                 "query_string": b"", "root_path": "", "headers": headers,
                 "client": ("127.0.0.1", 1), "server": ("test", 80)}  # fmt: skip
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._unread:
            body, self._unread = self._unread, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()
