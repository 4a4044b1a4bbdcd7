"""Latent collaboration in the real service: a peer is taken out while 20 clients are answered."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.deployments.latent_pool import latent_entry
from tests.deployments.service import ROOT, Service, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

pytest.importorskip("experts.latent.engine")

REQUESTS, AT_ONCE = 200, 20
TOKENS = 48
PEERS = "x-collegium-peers"

# Connects to the service's own Ray, and takes the expert out when it gets a line.
DROP = """
import sys, ray
from ray import serve
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
handle = serve.get_deployment_handle(sys.argv[2], "collegium")
print("connected", flush=True)
sys.stdin.readline()
handle.drop.remote(sys.argv[3]).result(timeout_s=30)
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("latent")
    config = {
        "experts": [latent_entry(folder)],
        "routers": {
            "fixed": {"type": "static", "quality": {"general": 0.8, "maths": 0.7, "extract": 0.6}}
        },
        "routes": {
            "auto": {"router": "fixed", "strategy": {"type": "latent", "active": 3}},
        },
    }
    with running(config, folder) as running_service:
        yield running_service


@contextmanager
def peer_taker(service: Service, deployment: str, expert: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready to take an expert out of a deployment."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    commands = " ".join(part for process in family for part in process.cmdline())
    found = re.search(r"--gcs-address=(\S+)", commands)
    assert found is not None
    with subprocess.Popen(
        [sys.executable, "-c", DROP, found.group(1), deployment, expert],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "connected"
            yield process
        finally:
            process.kill()


async def test_a_peer_taken_out_half_way_costs_nobody_an_answer(service: Service) -> None:
    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    (before,) = service.replicas("expert-thoughts")
    with peer_taker(service, "expert-thoughts", "maths") as taker:
        assert taker.stdin is not None
        command, queue = taker.stdin, iter(range(REQUESTS))

        async def worker(http: httpx.AsyncClient) -> None:
            for number in queue:
                if number == REQUESTS // 2:
                    command.write("now\n")
                    command.flush()
                response = await http.post("/v1/chat/completions", json=_body(number))
                outcome = _outcome(response, stream=number % 2 == 0)
                outcomes[outcome] += 1
                if outcome.startswith("bad"):
                    bad.append(f"{number}: {response.status_code} {response.text[:300]}")

        async with service.async_client() as http:
            workers = [worker(http) for _ in range(AT_ONCE)]
            await asyncio.wait_for(asyncio.gather(*workers), timeout=300)
            page = (await http.get("/metrics")).text
            late = await http.post("/v1/chat/completions", json=_body(1))
        assert taker.stdout is not None
        assert taker.stdout.readline().strip() == "done"
    assert not bad
    assert sum(outcomes.values()) == REQUESTS
    assert outcomes["all peers"] > 0
    assert outcomes["lost midway"] > 0
    assert outcomes["without it"] > 0
    assert _names(late) == ["extract"]
    assert re.search(r'collegium_peers_lost_total\{expert="maths"\} [1-9]', page)
    assert "collegium_in_flight_requests 0.0" in page
    # Nobody was restarted under the others' feet.
    assert service.replicas("expert-thoughts") == [before]


def _body(number: int) -> dict[str, Any]:
    """Streams and plain ones, by routing and by name, greedy and not, with and without peers."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"question {number}: what is {number} + 1?"}],
        "max_tokens": TOKENS,
        "stream": number % 2 == 0,
        "temperature": 0 if number % 3 else 1,
        "seed": number,
    }
    if number % 7 == 3:
        return {**body, "model": "general"}
    if number % 7 == 5:
        return {**body, "top_k": 2}
    return body


def _names(response: httpx.Response) -> list[str]:
    listed = response.headers.get(PEERS, "none")
    return [] if listed == "none" else [part.partition("=")[0] for part in listed.split(",")]


def _outcome(response: httpx.Response, *, stream: bool) -> str:
    if response.status_code != 200:
        return "bad status"
    if response.headers["x-collegium-model"] != "general":
        return "bad writer"
    if not stream:
        (choice,) = response.json()["choices"]
        if choice["finish_reason"] not in ("stop", "length") or not choice["message"]["content"]:
            return "bad answer"
    else:
        blocks = [block for block in response.text.split("\n\n") if block]
        comments = [block for block in blocks if block.startswith(": ")]
        *chunks, done = [b.removeprefix("data: ") for b in blocks if b.startswith("data: ")]
        pieces = [json.loads(chunk) for chunk in chunks]
        if done != "[DONE]" or any("error" in piece for piece in pieces):
            return "bad end"
        reasons = [piece["choices"][0]["finish_reason"] for piece in pieces]
        text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
        if reasons[-1] not in ("stop", "length") or any(reasons[:-1]) or not text:
            return "bad answer"
        if comments:
            expected = comments == [": general goes on without maths"]
            return "lost midway" if expected and "maths" in _names(response) else "bad comment"
    names = _names(response)
    if not names:
        return "alone"
    return "all peers" if "maths" in names else "without it"
