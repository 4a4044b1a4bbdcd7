"""What the tests here share: a config, an orchestrator over scripted experts, a server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from experts.config import ScriptedExpertConfig
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest, CompletionRequest
from orchestrator.config import CollegiumConfig, parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.http.app import create_app
from orchestrator.memory.guard import Memory

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ROUTE = "/v1/route"


def config_content(**changes: Any) -> dict[str, Any]:
    """Three experts from cheap and weak to dear and good, and two routes over them."""
    content: dict[str, Any] = {
        "experts": [
            {"name": "small", "engine": "scripted", "input_usd_per_mtok": 0.1,
             "output_usd_per_mtok": 0.2, "rules": [{"answer": "small says hello to you"}]},
            {"name": "medium", "engine": "scripted", "input_usd_per_mtok": 1,
             "output_usd_per_mtok": 2, "rules": [{"answer": "medium says hello to you"}]},
            {"name": "large", "engine": "scripted", "input_usd_per_mtok": 5,
             "output_usd_per_mtok": 10, "rules": [{"answer": "large says hello to you"}]},
        ],
        "routers": {
            "table": {"type": "static", "quality": {"small": 0.5, "medium": 0.7, "large": 0.9}}
        },
        "routes": {
            "auto": {"router": "table", "description": "the best"},
            "auto-cheap": {"router": "table", "policy": {"cost_quality": 0}},
        },
    }  # fmt: skip
    return {**content, **changes}


def config_with_rules(rules: Mapping[str, Any], **changes: Any) -> CollegiumConfig:
    """The config with the one rule of some experts replaced."""
    content = config_content(**changes)
    for expert in content["experts"]:
        if expert["name"] in rules:
            expert["rules"] = [rules[expert["name"]]]
    return parse_config(content)


def build(config: CollegiumConfig, memory: Memory | None = None) -> Orchestrator:
    """An orchestrator over scripted experts."""
    experts = {
        entry.name: ScriptedExpert(entry)
        for entry in config.experts
        if isinstance(entry, ScriptedExpertConfig)
    }
    return Orchestrator(config, experts, load_routers(config), memory)


def expert(orchestrator: Orchestrator, name: str) -> ScriptedExpert:
    """One of its scripted experts."""
    found = orchestrator.experts[name]
    assert isinstance(found, ScriptedExpert)
    return found


def chat_request(text: str = "hello", **fields: Any) -> ChatRequest:
    """A chat request with one user message."""
    return ChatRequest.model_validate({**chat_body(text), **fields})


def text_request(prompt: str | list[str] = "hello", **fields: Any) -> CompletionRequest:
    """A text completion request."""
    return CompletionRequest.model_validate({"prompt": prompt, **fields})


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request with one user message."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def client(app: FastAPI | Orchestrator) -> httpx.AsyncClient:
    """A client that calls an application without a network."""
    app = create_app(app) if isinstance(app, Orchestrator) else app
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )


def events(text: str) -> list[Any]:
    """The data of server-sent events; the end mark stays a text."""
    assert text.endswith("\n\n")
    data = [block.removeprefix("data: ") for block in text.split("\n\n")[:-1]]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


def metric(text: str, series: str) -> float:
    """The value of one series of a Prometheus page; 0 if it is not there."""
    lines = [line for line in text.splitlines() if line.startswith(series + " ")]
    return float(lines[0].split()[-1]) if lines else 0.0


async def written(orchestrator: Orchestrator) -> None:
    """Wait until memory has nothing left to write."""
    await eventually(lambda: orchestrator.memory.idle)


# Between two looks at a condition, in seconds.
LOOK_S = 0.005


async def eventually(condition: Callable[[], bool], within_s: float = 1.0) -> None:
    """Wait until a condition holds; fail if it does not in time.

    Time is counted in turns of the event loop, so that a machine that stands still (a full garbage
    collection after a thousand tests takes half a second) is not taken for an expert that does.
    """
    for _ in range(round(within_s / LOOK_S)):
        if condition():
            return
        await asyncio.sleep(LOOK_S)
    assert condition(), "it did not happen in time"


class LoopClock:
    """Counts seconds as ``eventually`` does, while its block runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def __aenter__(self) -> LoopClock:
        self._task = asyncio.ensure_future(self._count())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.seconds += LOOK_S


def eventually_sync(condition: Callable[[], bool], within_s: float = 1.0) -> None:
    """Wait until a condition holds in another thread; fail if it does not in time."""
    asyncio.run(eventually(condition, within_s))


@contextmanager
def running_server(app: FastAPI) -> Iterator[str]:
    """A real server in a thread; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        eventually_sync(lambda: server.started, 10)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
