"""What one replica is told, all learn: once, and again after a restart."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from orchestrator.core import Orchestrator
from orchestrator.learning import teaching
from orchestrator.learning.learner import Lesson
from orchestrator.memory.base import StoreError
from orchestrator.memory.guard import Memory
from orchestrator.memory.sqlite import SQLiteStore
from routers.encoders import DEFAULT_ENCODER
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


async def asked(orchestrator, **fields) -> str:
    response = await client(orchestrator).post(CHAT, json=chat_body(**fields))
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


@pytest.mark.parametrize("other", [{"dimensions": 8}, {"encoder": DEFAULT_ENCODER}])
async def test_what_another_config_wrote_down_stops_nothing(path, other):
    before, after = replica(path), replica(path, **other)
    lesson = Lesson("auto", "gone", {"gone": 0.5, "large": 0.9}, np.ones(33, np.float16))
    for number, rating in enumerate((0.5, None)):
        lessons = [[f"{number} {name}", lesson.to_json()] for name in ("one", "other")]
        content = json.dumps({"rating": rating, "lessons": lessons}).encode()
        assert await after.memory.store.append("learning", str(number), content)
    assert await after.memory.store.append("learning", "no record", b"?")
    assert await rate(after, decision_id=await asked(before), rating=0.0) == 200
    assert observations(after) == 0
    assert await rate(after, decision_id=await asked(after), rating=0.0) == 200
    assert observations(after) == 1
    await before._teaching.read()
    assert observations(before) == 1
    for one in (before, after):
        await one.aclose()


class ForgetfulStore(SQLiteStore):
    """A store that fails when something is first written into the log of lessons."""

    failed = False

    async def append(self, log, id, record):
        if log == "learning" and not self.failed:
            self.failed = True
            raise StoreError("gone")
        return await super().append(log, id, record)


async def test_what_is_said_again_after_an_error_is_learnt_once():
    config = config_with_rules({}, routes={"auto": {"router": "table", "learning": LEARNING}})
    orchestrator = build(config, memory=Memory(ForgetfulStore()))
    decision = await asked(orchestrator)
    answers = [await rate(orchestrator, decision_id=decision, rating=0.0) for _ in range(3)]
    assert answers == [503, 200, 200]
    assert observations(orchestrator) == 1


def split(path, **experiment):
    """A replica with an experiment over two routes."""
    experiment = {"a": "auto", "b": "auto-cheap", "by": "request", **experiment}
    config = config_with_rules({}, experiments={"try": experiment})
    return build(config, memory=Memory(SQLiteStore(str(path))))


async def listed(orchestrator) -> list[tuple[int, int]]:
    """Requests and ratings of each arm."""
    (one,) = (await client(orchestrator).get("/v1/experiments")).json()["data"]
    return [(arm["requests"], arm["outcomes"]) for arm in one["arms"]]


async def test_an_experiment_goes_on_after_a_restart_and_on_all_replicas(path):
    first, second = split(path), split(path)
    wanted = {"a": [0, 0], "b": [0, 0]}
    for orchestrator in [first, second] * 10:
        decision = await asked(orchestrator, model="try")
        lesson = orchestrator.learning.lessons.get(decision)
        assert lesson is not None
        arm = lesson.arm
        rated = wanted[arm][0] % 2
        if rated:
            assert await rate(orchestrator, decision_id=decision, rating=0.5) == 200
        wanted[arm][0] += 1
        wanted[arm][1] += rated
    after = split(path)
    for one in (first, second, after):
        assert await listed(one) == [tuple(wanted[arm]) for arm in "ab"]
    # The other way round they are other arms.
    swapped = split(path, a="auto-cheap", b="auto")
    assert await listed(swapped) == [(0, 0), (0, 0)]
    for one in (first, second, after, swapped):
        await one.aclose()
