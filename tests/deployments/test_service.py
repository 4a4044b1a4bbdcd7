"""The whole service on scripted experts: real Ray Serve, real sockets, the real openai client."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.deployments.service import Service, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXPERTS = ("general", "maths", "intents", "docstrings", "extract")
SLOW = {"match": "^slow", "answer": "tick " * 50, "chunk_delay_s": 0.1}
TOOL = {"match": "weather", "tool_call": {"name": "weather", "arguments": {"city": "Rome"}}}


def _scripted(name: str, **options: Any) -> dict[str, Any]:
    rules = [SLOW, TOOL, {"answer": f"{name} says: {{text}}"}]
    return {"name": name, "engine": "scripted", "rules": rules, **options}


CONFIG = {
    "experts": [
        *(_scripted(name) for name in EXPERTS),
        _scripted("one-at-a-time", deployment={"max_ongoing_requests": 1}),
        {"name": "broken", "engine": "scripted", "rules": [{"error": "failed"}]},
        {
            "name": "busy",
            "engine": "scripted",
            "rules": [{"error": "overloaded"}],
        },
    ],
    "routers": {
        "coe": {"type": "artefact", "path": "package:routers/embedded/auto"},
        "fixed": {"type": "static", "quality": {"broken": 0.9, "general": 0.5, "maths": 0.4}},
    },
    "routes": {
        "auto": {"router": "coe"},
        "two": {"router": "fixed", "experts": ["general", "maths"]},
        "fallback": {"router": "fixed"},
    },
    "memory": {"type": "sqlite", "path": "memory.db"},
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(CONFIG, tmp_path_factory.mktemp("service")) as running_service:
        yield running_service


def _chat(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **options}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_gets_a_routed_answer(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=[{"role": "user", "content": "What is 13 + 29?"}]
    )
    answer = raw.parse()
    assert answer.model in EXPERTS
    assert answer.choices[0].message.content == f"{answer.model} says: What is 13 + 29?"
    assert raw.headers["x-collegium-model"] == answer.model
    assert raw.headers["x-collegium-category"]


def test_decisions_and_feedback_are_remembered(service: Service) -> None:
    with service.client() as http:
        answer = http.post("/v1/chat/completions", json=_chat("hello", model="fallback"))
        id = answer.headers["x-collegium-decision-id"]
        record = http.get(f"/v1/decisions/{id}").json()
        assert [call["expert"] for call in record["path"]] == ["broken", "general"]
        feedback = http.post("/v1/feedback", json={"decision_id": id, "rating": 0.5})
        assert feedback.json()["rating"] == 0.5
        assert "collegium_memory_errors_total{" not in http.get("/metrics").text
    with sqlite3.connect(service.log.parent / "memory.db") as database:
        # The ingress may still be busy with the last one.
        deadline = time.monotonic() + 5
        while id.encode() not in {row[0] for row in database.execute("SELECT id FROM records")}:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_openai_client_streams_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.endswith("says: hello")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


async def test_async_openai_client_calls_a_tool(service: Service) -> None:
    async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none") as client:
        answer = await client.chat.completions.create(
            model="general",
            messages=[{"role": "user", "content": "weather in Rome?"}],
            tools=[{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        )
    call = answer.choices[0].message.tool_calls[0]  # type: ignore[index]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Rome"}  # type: ignore[union-attr]


def test_openai_client_lists_models_and_meets_errors(client: openai.OpenAI) -> None:
    assert {"auto", "fallback", *EXPERTS} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("maths").id == "maths"
    message: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=message)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="auto", messages=[])
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="busy", messages=message)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="broken", messages=message)


def test_a_failing_expert_is_replaced_before_the_first_byte(service: Service) -> None:
    with service.client() as client:
        plain = client.post("/v1/chat/completions", json=_chat("hi", model="fallback"))
        streamed = client.post(
            "/v1/chat/completions", json=_chat("hi", model="fallback", stream=True)
        )
    assert plain.json()["model"] == "general"
    assert plain.headers["x-collegium-path"] == "broken>general"
    assert streamed.headers["x-collegium-path"] == "broken>general"
    assert streamed.text.endswith("data: [DONE]\n\n")


async def test_five_hundred_mixed_requests_are_all_answered(service: Service) -> None:
    queue = iter(range(500))
    bad: list[str] = []

    async def worker(client: httpx.AsyncClient) -> None:
        for number in queue:
            stream = number % 2 == 0
            body = _chat(f"question {number}", stream=stream)
            response = await client.post("/v1/chat/completions", json=body)
            if not _well_formed(response, f"says: question {number}", stream):
                bad.append(f"{number}: {response.status_code} {response.text[:200]}")

    async with service.async_client() as client:
        await asyncio.gather(*(worker(client) for _ in range(32)))
    assert not bad


def _well_formed(response: httpx.Response, ending: str, stream: bool) -> bool:
    if response.status_code != 200:
        return False
    if not stream:
        return bool(response.json()["choices"][0]["message"]["content"].endswith(ending))
    *events, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    return done == "[DONE]" and "".join(d.get("content") or "" for d in deltas).endswith(ending)


async def test_decisions_are_the_same_alone_and_under_load(service: Service) -> None:
    prompts = _prompts(200)
    async with service.async_client() as client:

        async def decide(text: str) -> tuple[str, str, float]:
            body = (await client.post("/v1/route", json=_chat(text))).json()
            return body["experts"][0], body["category"], body["confidence"]

        alone = {text: await decide(text) for text in prompts}
        noise = [
            asyncio.create_task(client.post("/v1/chat/completions", json=_chat(f"noise {i}")))
            for i in range(64)
        ]
        random.Random(0).shuffle(prompts)
        loaded = dict(zip(prompts, await asyncio.gather(*map(decide, prompts)), strict=True))
        await asyncio.gather(*noise)
    assert loaded == alone


def _prompts(count: int) -> list[str]:
    from evals.tasks import get_task, task_names

    texts = [s.text for name in task_names() for s in get_task(name).samples("test")]
    return random.Random(0).sample(texts, count)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_expert(service: Service, stream: bool) -> None:
    body = _chat("slow", model="one-at-a-time", stream=stream)
    async with service.async_client() as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await client.post("/v1/chat/completions", json=body)
        left = time.monotonic()
        quick = _chat("next", model="one-at-a-time")
        answer = await client.post("/v1/chat/completions", json=quick)
        waited_s = time.monotonic() - left
    assert answer.status_code == 200
    # The slow answer would have held the expert's only place for four more seconds.
    assert waited_s < 1.0


async def test_a_killed_replica_is_survived(service: Service) -> None:
    async with service.async_client() as client:
        streams = [asyncio.create_task(_stream_slowly(client, i)) for i in range(200)]
        await asyncio.sleep(1.5)
        (victim,) = service.replicas("expert-general")
        victim.kill()
        outcomes = await asyncio.wait_for(asyncio.gather(*streams), timeout=60)
        assert set(outcomes) <= {"whole", "broke off", "replaced"}
        assert outcomes.count("broke off") > 0
        assert outcomes.count("replaced") > 0
        await _until_ready(client)
        answer = await client.post("/v1/chat/completions", json=_chat("back?", model="general"))
    assert answer.json()["choices"][0]["message"]["content"] == "general says: back?"


async def _stream_slowly(client: httpx.AsyncClient, number: int) -> str:
    await asyncio.sleep(number * 0.015)
    body = _chat(f"slow {number}", model="two", stream=True)
    response = await client.post("/v1/chat/completions", json=body)
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    if response.status_code == 200 and events[-1] == "[DONE]":
        return "whole" if response.headers["x-collegium-path"] == "general" else "replaced"
    errors = [event for event in events if "error" in json.loads(event)]
    ends_with_one_error = response.status_code == 200 and errors == events[-1:]
    return "broke off" if ends_with_one_error else f"{response.status_code}: {response.text[-300:]}"


async def _until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(120):
        if (await client.get("/ready")).status_code == 200:
            return
        await asyncio.sleep(0.5)
    raise AssertionError("the replica did not return")


def test_prompts_are_not_logged(service: Service) -> None:
    secret = "xylophone-7331"
    with service.client() as client:
        client.post("/v1/chat/completions", json=_chat(secret))
        metrics = client.get("/metrics").text
    assert "collegium_requests_total" in metrics
    assert secret not in metrics
    assert secret.encode() not in service.log.read_bytes()
