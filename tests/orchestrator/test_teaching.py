"""What one replica is told, all learn: once, and again after a restart."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.core import Orchestrator
from orchestrator.learning import teaching
from orchestrator.memory.guard import Memory
from orchestrator.memory.sqlite import SQLiteStore
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    client,
    config_with_rules,
    eventually,
)

LEARNING = {"encoder": "hashing", "exploration_share": 0.0}


def replica(path, **learning):
    """One of several that share a file; its memory is its own handle on it."""
    routes = {"auto": {"router": "table", "learning": {**LEARNING, **learning}}}
    config = config_with_rules({}, routes=routes)
    return build(config, memory=Memory(SQLiteStore(str(path))))


def observations(orchestrator: Orchestrator) -> float:
    learner = orchestrator.routes["auto"].learner
    assert learner is not None
    return learner.bandit.observations


async def asked(orchestrator) -> str:
    response = await client(orchestrator).post(CHAT, json=chat_body())
    assert response.status_code == 200
    await eventually(lambda: orchestrator.memory.idle)
    return response.headers["x-collegium-decision-id"]


async def rate(orchestrator, **feedback) -> int:
    return (await client(orchestrator).post("/v1/feedback", json=feedback)).status_code


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "LOOK_S", 0.01)
    return tmp_path / "memory.db"


async def looked(orchestrator, count: int) -> None:
    """Requests come until the replica has learnt so much."""
    async with asyncio.timeout(5):
        while observations(orchestrator) < count:
            await asked(orchestrator)
            await asyncio.sleep(0.02)


async def test_any_replica_may_be_told_and_all_learn_once(path):
    first, second = replica(path), replica(path)
    decision = await asked(first)
    assert await rate(second, decision_id=decision, rating=0.0) == 200
    assert observations(second) == 1
    await looked(first, 1)
    assert await rate(first, decision_id=decision, rating=0.0) == 200, "said again"
    for one in (first, second):
        await asked(one)
        await asyncio.sleep(0.05)
        assert observations(one) == 1
    for one in (first, second):
        await one.aclose()


async def test_what_was_learnt_outlives_a_restart(path):
    before = replica(path)
    better, worse, rated = [await asked(before) for _ in range(3)]
    assert await rate(before, decision_id=rated, rating=0.3) == 200
    # Both by the same expert: nothing is learnt of experts, and nothing breaks.
    assert await rate(before, decision_id=better, preferred_over=worse) == 200
    quality = (await client(before).post("/v1/route", json=chat_body())).json()["candidates"]
    await before.aclose()
    after = replica(path)
    await looked(after, 1)
    again = (await client(after).post("/v1/route", json=chat_body())).json()["candidates"]
    assert again == quality
    await after.aclose()


async def test_routes_that_do_not_learn_write_no_lessons(path):
    orchestrator = build(config_with_rules({}), memory=Memory(SQLiteStore(str(path))))
    decision = await asked(orchestrator)
    assert await orchestrator.memory.store.get(f"lesson:{decision}") is None
    assert await rate(orchestrator, decision_id=decision, rating=1.0) == 200
    assert await orchestrator.memory.store.scan("learning", limit=1) == []
    await orchestrator.aclose()


async def test_without_a_store_requests_are_answered_and_feedback_is_refused(path):
    orchestrator = replica(path)
    decision = await asked(orchestrator)
    await orchestrator.memory.store.aclose()
    assert (await client(orchestrator).post(CHAT, json=chat_body())).status_code == 200
    assert await rate(orchestrator, decision_id=decision, rating=1.0) == 503
    assert observations(orchestrator) == 0
