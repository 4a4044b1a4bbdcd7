"""What lies between an expert's first piece and the client's, in process and without a network.

    python -m benchmarks.first_byte [--requests 2000] [--out docs/results/first_byte]

A scripted expert answers at once. It is asked directly, through the orchestrator (static router,
strategy ``single``), and through the HTTP application without sockets, in turn, so that whatever
else the machine does meets all three. Compare rows; absolute times belong to the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from tqdm import tqdm

from benchmarks.pages import command_line, with_interval, write
from experts.config import ScriptedExpertConfig
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import RequestContext
from orchestrator.http.app import create_app
from orchestrator.http.encoding import encode

WARM_UP = 100
RESAMPLES = 1000
GOAL_MS = 3.0
DIRECT, CORE, HTTP = "expert alone", "orchestrator", "orchestrator and HTTP"
BODY = {"messages": [{"role": "user", "content": "What is 12 times 13?"}], "stream": True}
CONFIG = {
    "experts": [
        {"name": name, "engine": "scripted", "output_usd_per_mtok": 1.0 + place}
        for place, name in enumerate(("small", "medium", "large"))
    ],
    "routers": {
        "guess": {"type": "static", "quality": {"small": 0.5, "medium": 0.7, "large": 0.9}}
    },
    "routes": {"auto": {"router": "guess", "strategy": {"type": "single"}}},
    "server": {"log_level": "warning"},
}


def build() -> Orchestrator:
    """Three scripted experts behind a route."""
    config = parse_config(CONFIG)
    experts = {e.name: ScriptedExpert(e) for e in config.experts
               if isinstance(e, ScriptedExpertConfig)}  # fmt: skip
    return Orchestrator(config, experts, load_routers(config))


async def alone_s(orchestrator: Orchestrator) -> float:
    """Seconds to the first piece of the expert itself."""
    request = ChatRequest.model_validate(BODY)
    started = time.perf_counter()
    stream = orchestrator.experts["large"].stream(request, timeout_s=60)
    await anext(stream)
    took_s = time.perf_counter() - started
    await stream.aclose()
    return took_s


async def core_s(orchestrator: Orchestrator) -> float:
    """Seconds to the first piece through decision and strategy."""
    request = ChatRequest.model_validate(BODY)
    started = time.perf_counter()
    context = RequestContext(deadline=time.monotonic() + 60)
    decision = await orchestrator.decide(request, context=context)
    stream = orchestrator.run(request, decision, context)
    await anext(stream)
    took_s = time.perf_counter() - started
    await stream.aclose()
    return took_s


async def http_s(app: FastAPI) -> float:
    """Seconds to the first event through the whole application."""
    first_s = 0.0
    unread = [encode(BODY)]
    started = time.perf_counter()

    async def receive() -> dict[str, Any]:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")

    async def send(message: Any) -> None:
        nonlocal first_s
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        if message["type"] == "http.response.body" and not first_s:
            first_s = time.perf_counter() - started

    path = "/v1/chat/completions"
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return first_s


async def measure(requests: int) -> dict[str, list[float]]:
    """Seconds of each request by way."""
    orchestrator = build()
    app = create_app(orchestrator)
    ways: dict[str, Callable[[], Awaitable[float]]] = {
        DIRECT: lambda: alone_s(orchestrator),
        CORE: lambda: core_s(orchestrator),
        HTTP: lambda: http_s(app),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in tqdm(range(WARM_UP + requests), "requests", delay=2):
        for way, ask in ways.items():
            took_s = await ask()
            if number >= WARM_UP:
                times[way].append(took_s)
    return times


def summary(times_s: list[float]) -> dict[str, float]:
    """Median with a bootstrap interval of 95 %, and the 99th percentile, in ms."""
    times = np.array(times_s) * 1000
    drawn = np.random.default_rng(0).choice(times, (RESAMPLES, len(times)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return {
        "mean": float(np.median(times)),
        "low": float(low),
        "high": float(high),
        "p99": float(np.percentile(times, 99)),
    }


def report(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = result["rows"]
    lines = [
        "# First byte",
        "",
        f"`{result['command']}`, {result['machine']}: {result['requests']} streamed requests each, "
        "in turn, in one process and without sockets. A scripted expert, a static router over "
        "three experts, the strategy `single`. Medians with bootstrap intervals of 95 %.",
        "",
        "| first piece through | ms | more than the expert alone, ms | p99 ms |",
        "|---|--:|--:|--:|",
    ]
    for way, found in rows.items():
        more = "" if way == DIRECT else with_interval(result["added"][way])
        lines.append(f"| {way} | {with_interval(found)} | {more} | {found['p99']:.2f} |")
    kept = "kept" if result["added"][HTTP]["high"] <= GOAL_MS else "missed"
    lines += ["", f"Goal: at most {GOAL_MS:g} ms more than the expert alone; {kept}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write its page where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="measured, of each way")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    gc.freeze()
    times = asyncio.run(measure(arguments.requests))
    alone = np.array(times[DIRECT])
    result = {
        "command": command_line(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "requests": arguments.requests,
        "rows": {way: summary(found) for way, found in times.items()},
        "added": {
            way: summary((np.array(found) - alone).tolist())
            for way, found in times.items()
            if way != DIRECT
        },
    }
    page = report(result)
    write(arguments.out, page, result)
    print(page)


if __name__ == "__main__":
    main()
