"""What is remembered of requests: decisions, feedback, budgets, over HTTP."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.core import Orchestrator, load_routers
from orchestrator.http.app import create_app
from orchestrator.memory.config import MemoryConfig, RedisMemoryConfig, SQLiteMemoryConfig
from orchestrator.memory.decisions import DecisionRecord
from orchestrator.memory.feedback import Feedback
from orchestrator.memory.opening import open_memory
from tests.orchestrator.support import (
    CHAT,
    ROUTE,
    TEXT,
    build,
    chat_body,
    client,
    config_with_rules,
    events,
    eventually,
    eventually_sync,
    metric,
    running_server,
)
from tests.redis_server import running_redis

FEEDBACK = "/v1/feedback"
ID = "x-collegium-decision-id"

BREAKS = {"answer": "a b c", "error": "failed", "error_after_chunks": 2}


def orchestrator_with(
    memory: MemoryConfig | None = None, server: dict[str, Any] | None = None, **rules: Any
) -> Orchestrator:
    config = config_with_rules(rules, server=server or {})
    experts = build(config).experts
    opened = open_memory(memory) if memory is not None else None
    return Orchestrator(config, experts, load_routers(config), opened)


async def written(orchestrator: Orchestrator) -> None:
    """Wait until everything is written."""
    await eventually(lambda: not orchestrator.memory._pending, 20)


async def records(orchestrator: Orchestrator) -> list[DecisionRecord]:
    """All records, once they are written."""
    await written(orchestrator)
    found = await orchestrator.memory.store.scan("decisions", limit=1000)
    return [DecisionRecord.model_validate_json(content) for _, content in found]


async def asked(http: httpx.AsyncClient, **fields: Any) -> str:
    """The decision id of a question."""
    response = await http.post(CHAT, json=chat_body(**fields))
    assert response.status_code == 200
    return response.headers[ID]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_an_answer_leaves_one_record(path, stream):
    orchestrator = orchestrator_with(large={"error": "unavailable"})
    http = client(orchestrator)
    body = {"prompt": "hello"} if path == TEXT else chat_body()
    response = await http.post(path, json={**body, "stream": stream, "session_id": "s-1"})
    shown = (await http.get(f"/v1/decisions/{response.headers[ID]}")).json()
    (record,) = await records(orchestrator)
    assert record == DecisionRecord.model_validate(shown)
    assert record.id == response.headers[ID]
    assert (record.model, record.route, record.policy) == ("auto", "auto", "utility")
    assert (record.status, record.strategy, record.scope) == (200, "fallback", "public")
    assert record.experts == ["large", "medium", "small"]
    assert record.expert == "medium"
    assert record.session_id == "s-1"
    failed, answered = record.path
    assert (failed.expert, failed.error, failed.cost_usd) == ("large", "ExpertUnavailableError", 0)
    assert (answered.expert, answered.error, answered.purpose) == ("medium", None, "answer")
    assert answered.completion_tokens == 5
    assert record.cost_usd == pytest.approx(answered.cost_usd)
    assert record.cost_usd > 0
    assert 0 <= (answered.seconds or -1) <= record.seconds < 5
    assert abs(record.created - time.time()) < 5


@pytest.mark.parametrize(
    ("rule", "fields", "status"),
    [
        ({"error": "failed"}, {}, 502),
        ({"error": "invalid"}, {}, 400),
        ({"delay_s": 30}, {"deadline_ms": 50}, 504),
        (BREAKS, {"stream": True}, 502),
    ],
)
async def test_what_fails_after_the_decision_leaves_one_record(rule, fields, status):
    orchestrator = orchestrator_with(small=rule)
    await client(orchestrator).post(CHAT, json=chat_body(model="small", **fields))
    (record,) = await records(orchestrator)
    assert (record.status, record.policy, record.model) == (status, "named", "small")
    assert record.path[0].error


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_leaves_one_record(stream):
    rule = {"answer": "a b c", "delay_s": 0 if stream else 30, "chunk_delay_s": 30}
    orchestrator = orchestrator_with(small=rule)
    body = chat_body(model="small", stream=stream)
    with running_server(create_app(orchestrator)) as address:
        try:
            with httpx.stream("POST", address + CHAT, json=body, timeout=0.5) as response:
                next(response.iter_text())
        except httpx.ReadTimeout:
            assert not stream
        left = 'collegium_requests_total{expert="small",model="small",status="499"}'
        eventually_sync(lambda: metric(httpx.get(f"{address}/metrics").text, left) == 1)
        (record,) = asyncio.run(records(orchestrator))
    assert record.status == 499
    assert record.path[0].error == "cancelled"


async def test_what_is_refused_before_the_decision_leaves_none():
    orchestrator = orchestrator_with(server={"limits": {"max_body_bytes": 1024}})
    http = client(orchestrator)
    keyed = client(create_app(orchestrator, api_keys=["key"]))
    for sent, body in [
        (keyed, chat_body()),
        (http, {}),
        (http, chat_body("x" * 2000)),
        (http, chat_body(model="nobody")),
        (http, chat_body(max_cost=0)),
    ]:
        assert (await sent.post(CHAT, json=body)).status_code >= 400
    assert (await http.post(ROUTE, json=chat_body())).status_code == 200
    assert await records(orchestrator) == []


async def test_many_requests_leave_one_record_each():
    orchestrator = orchestrator_with()
    http = client(orchestrator)
    ids = await asyncio.gather(
        *(asked(http, stream=number % 2 == 0) for number in range(60)),
    )
    assert sorted(record.id for record in await records(orchestrator)) == sorted(ids)


async def test_no_text_is_kept(tmp_path: Path):
    file = tmp_path / "memory.db"
    orchestrator = orchestrator_with(SQLiteMemoryConfig(path=str(file)))
    http = client(orchestrator)
    id = await asked(http, text="my secret question", user="a person", stop="a stop word")
    assert (await http.post(FEEDBACK, json={"decision_id": id, "rating": 1})).status_code == 200
    await orchestrator.aclose()
    with sqlite3.connect(file) as database:
        kept = "".join(database.iterdump()).lower()
    assert id.encode().hex() in kept
    for text in ("secret", "person", "stop word", "says hello"):
        assert text not in kept
        assert text.encode().hex() not in kept


async def test_records_are_found_before_they_are_written():
    orchestrator = orchestrator_with()
    http = client(orchestrator)
    orchestrator.memory.later("log", lambda: asyncio.sleep(0.2))
    id = await asked(http)
    assert id in orchestrator.decisions._waiting
    assert (await http.get(f"/v1/decisions/{id}")).json()["id"] == id


async def test_decisions_and_feedback_belong_to_a_key():
    http = client(create_app(orchestrator_with(), api_keys=["one", "two"]))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    id = (await http.post(CHAT, json=chat_body(), headers=one)).headers[ID]
    other = (await http.post(CHAT, json=chat_body(), headers=two)).headers[ID]
    path, rating = f"/v1/decisions/{id}", {"decision_id": id, "rating": 1}
    better = {"decision_id": id, "preferred_over": other}
    assert (await http.get(path)).status_code == 401
    assert (await http.post(FEEDBACK, json=rating)).status_code == 401
    for response in (
        await http.get(path, headers=two),
        await http.post(FEEDBACK, json=rating, headers=two),
        await http.post(FEEDBACK, json=better, headers=one),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "decision_not_found"
    shown = await http.get(path, headers=one)
    assert shown.status_code == 200
    assert "one" not in shown.json()["scope"]
    assert (await http.post(FEEDBACK, json=rating, headers=one)).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, "body"),
        ({"rating": 1, "preferred_over": "dec_" + "0" * 32}, "body"),
        ({"rating": 1.01}, "rating"),
        ({"rating": -1}, "rating"),
        ({"rating": "1"}, "rating"),
        ({"rating": True}, "rating"),
        ({"rating": 1, "comment": "very good"}, "comment"),
        ({"decision_id": "dec_1", "rating": 1}, "decision_id"),
        ({"preferred_over": "dec_" + "1" * 32}, "body"),
    ],
)
async def test_feedback_is_one_statement_without_texts(change, param):
    body = {"decision_id": "dec_" + "1" * 32, **change}
    response = await client(orchestrator_with()).post(FEEDBACK, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_feedback_is_taken_once():
    orchestrator = orchestrator_with()
    http = client(orchestrator)
    taken: list[tuple[str, Feedback]] = []

    async def note(decision: DecisionRecord, feedback: Feedback) -> None:
        taken.append((decision.id, feedback))

    async def break_down(decision: DecisionRecord, feedback: Feedback) -> None:
        raise ZeroDivisionError

    orchestrator.feedback.on_feedback += [break_down, note]
    one, two = await asked(http), await asked(http)
    rating = {"decision_id": one, "rating": 0.5}
    better = {"decision_id": one, "preferred_over": two}
    for body in (rating, better):
        first = await http.post(FEEDBACK, json=body)
        again = await http.post(FEEDBACK, json=body)
        assert (first.status_code, again.status_code) == (200, 200)
        assert first.json() == again.json()
        assert first.json() | body == first.json()
    for body in ({**rating, "rating": 0.6}, {"decision_id": two, "preferred_over": one}):
        response = await http.post(FEEDBACK, json=body)
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "feedback_exists"
    # Whoever listens hears of a repeat too, and may have missed the first.
    assert [(id, f.rating, f.preferred_over) for id, f in taken] == [
        *[(one, 0.5, None)] * 2,
        *[(one, None, two)] * 2,
    ]
    kept = await orchestrator.feedback.since()
    assert [record.feedback for _, record in kept] == [feedback for _, feedback in taken[::2]]
    assert [record.decision.id for _, record in kept] == [one, one]
    assert await orchestrator.feedback.since(kept[0][0]) == kept[1:]


async def test_unknown_decisions_have_no_feedback():
    http = client(orchestrator_with())
    known, unknown = await asked(http), "dec_" + "0" * 32
    for body in (
        {"decision_id": unknown, "rating": 1},
        {"decision_id": unknown, "preferred_over": known},
        {"decision_id": known, "preferred_over": unknown},
    ):
        assert (await http.post(FEEDBACK, json=body)).status_code == 404


async def test_memory_outlives_the_service(tmp_path: Path):
    memory = SQLiteMemoryConfig(path=str(tmp_path / "memory.db"))
    app = create_app(orchestrator_with(memory))
    async with app.router.lifespan_context(app):
        ids = [await asked(client(app)) for _ in range(20)]
    http = client(create_app(orchestrator_with(memory)))
    for id in ids:
        assert (await http.get(f"/v1/decisions/{id}")).status_code == 200


@pytest.fixture(params=["sqlite", "redis"])
def memory(request, tmp_path: Path):
    if request.param == "sqlite":
        yield SQLiteMemoryConfig(timeout_s=10)
        return
    with running_redis(tmp_path) as server:
        yield RedisMemoryConfig(type="redis", url=server.url, timeout_s=10)


def budget(usd_per_day: float) -> dict[str, Any]:
    return {"budget": {"usd_per_day": usd_per_day}}


async def test_a_spent_budget_refuses_its_key_until_midnight(memory: MemoryConfig):
    # An answer of the large one costs 5 tokens of 1e-5 dollars and its prompt.
    orchestrator = orchestrator_with(memory, budget(1.2e-4))
    http = client(create_app(orchestrator, api_keys=["one", "two"]))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    costs = []
    while True:
        response = await http.post(CHAT, json=chat_body(), headers=one)
        if response.status_code != 200:
            break
        costs.append(float(response.headers["x-collegium-cost"]))
        assert len(await records(orchestrator)) == len(costs)
    assert sum(costs) >= 1.2e-4 > sum(costs[:-1])
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "budget_exhausted"
    assert response.json()["error"]["type"] == "insufficient_quota"
    now = datetime.now(UTC)
    left_s = 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
    assert abs(int(response.headers["retry-after"]) - left_s) <= 5
    assert len(await records(orchestrator)) == len(costs)
    assert (await http.post(CHAT, json=chat_body(), headers=two)).status_code == 200
    await orchestrator.aclose()


async def test_a_budget_starts_anew_at_midnight(monkeypatch):
    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 1, cls.day, 23, 59, 59, tzinfo=tz)

    monkeypatch.setattr("orchestrator.memory.budget.datetime", Clock)
    orchestrator = orchestrator_with(server=budget(1e-9))
    http = client(orchestrator)
    await asked(http)
    await written(orchestrator)
    refused = await http.post(CHAT, json=chat_body())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    Clock.day = 2
    await asked(http)


async def test_streams_and_failures_spend_too():
    for body in (chat_body(stream=True), chat_body(model="small", stream=True)):
        orchestrator = orchestrator_with(server=budget(1e-9), small=BREAKS)
        http = client(orchestrator)
        assert events((await http.post(CHAT, json=body)).text)
        await written(orchestrator)
        assert (await http.post(CHAT, json=body)).status_code == 429


async def test_without_memory_everything_is_answered(tmp_path: Path):
    with running_redis(tmp_path) as server:
        memory = RedisMemoryConfig(type="redis", url=server.url, timeout_s=10)
        orchestrator = orchestrator_with(memory, budget(100))
        http = client(orchestrator)
        statuses: list[int] = []
        ending = asyncio.Event()

        async def keep_asking(stream: bool) -> None:
            while not ending.is_set():
                response = await http.post(CHAT, json=chat_body(stream=stream))
                statuses.append(response.status_code)
                assert "says hello" in response.text or "data: [DONE]" in response.text
                await asyncio.sleep(0.002)

        async def failures() -> dict[str, float]:
            page = (await http.get("/metrics")).text
            series = "collegium_memory_errors_total"
            return {f: metric(page, f'{series}{{feature="{f}"}}') for f in ("decisions", "budget")}

        before = await asked(http)
        await records(orchestrator)

        async def more_answers(number: int) -> None:
            wanted = len(statuses) + number
            await eventually(lambda: len(statuses) >= wanted, 20)

        asking = [asyncio.create_task(keep_asking(number % 2 == 0)) for number in range(8)]
        await more_answers(20)
        assert await failures() == {"decisions": 0, "budget": 0}
        server.kill()
        await more_answers(40)
        assert min((await failures()).values()) > 0
        for response in (
            await http.get(f"/v1/decisions/{before}"),
            await http.post(FEEDBACK, json={"decision_id": before, "rating": 1}),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "memory_unavailable"
        server.start()
        await more_answers(20)
        ending.set()
        await asyncio.gather(*asking)
        assert set(statuses) == {200}

        after = await asked(http)
        assert after in {record.id for record in await records(orchestrator)}
        rating = {"decision_id": after, "rating": 1}
        assert (await http.post(FEEDBACK, json=rating)).status_code == 200
        assert (await http.get(f"/v1/decisions/{before}")).status_code == 404
        seen = await failures()
        await asked(http)
        await records(orchestrator)
        assert await failures() == seen
        await orchestrator.aclose()
