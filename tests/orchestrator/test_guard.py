from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from functools import partial

import pytest

from orchestrator.errors import MemoryUnavailableError
from orchestrator.memory import guard
from orchestrator.memory.guard import Memory
from orchestrator.memory.sqlite import SQLiteStore


class StuckStore(SQLiteStore):
    """Answers nothing while it is stuck."""

    stuck = True

    async def get(self, key: str | bytes) -> bytes | None:
        await asyncio.sleep(30 if self.stuck else 0)
        return await super().get(key)


def watched(store: SQLiteStore, timeout_s: float = 0.05) -> tuple[Memory, Counter[str]]:
    memory, errors = Memory(store, timeout_s=timeout_s), Counter[str]()
    memory.on_error = lambda feature: errors.update([feature])
    return memory, errors


async def closed_store() -> SQLiteStore:
    store = SQLiteStore()
    await store.aclose()
    return store


async def test_what_works_is_passed_on():
    memory, errors = watched(SQLiteStore())
    await memory.store.put("key", b"value")
    assert await memory.guarded("cache", memory.store.get("key"), None) == b"value"
    assert await memory.required("cache", memory.store.get("key")) == b"value"
    assert not errors
    await memory.aclose()


async def test_what_fails_is_counted_and_gone_on_without():
    memory, errors = watched(await closed_store())
    assert await memory.guarded("cache", memory.store.get("key"), b"default") == b"default"
    assert await memory.guarded("budget", memory.store.add("key", 1), 0.5) == 0.5
    with pytest.raises(MemoryUnavailableError):
        await memory.required("cache", memory.store.get("key"))
    assert errors == {"cache": 2, "budget": 1}


async def test_failures_are_logged_once_a_minute_per_feature(caplog, monkeypatch):
    memory, _ = watched(await closed_store())
    for feature in ("cache", "budget", "cache", "cache"):
        await memory.guarded(feature, memory.store.get("key"), None)
    assert len(caplog.records) == 2
    monkeypatch.setattr(guard, "LOG_EVERY_S", 0.0)
    await memory.guarded("cache", memory.store.get("key"), None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert "cache, which goes on without: the store is closed" in caplog.text


async def test_nobody_waits_for_a_store_that_has_just_taken_too_long(monkeypatch):
    monkeypatch.setattr(guard, "PAUSE_S", 3.0)
    store = StuckStore()
    memory, errors = watched(store)
    started = time.monotonic()
    for _ in range(100):
        assert await memory.guarded("cache", store.get("key"), b"default") == b"default"
    assert time.monotonic() - started < 2.5, "half of what waiting each time takes"
    assert errors["cache"] == 100
    store.stuck = False
    await asyncio.sleep(3.1)
    assert await memory.guarded("cache", store.get("key"), b"default") is None
    await memory.aclose()


async def test_mistakes_of_a_feature_are_not_swallowed():
    memory, errors = watched(SQLiteStore())

    async def mistake() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await memory.guarded("cache", mistake(), None)
    assert not errors
    await memory.aclose()


async def test_work_in_the_background_is_done_in_order_and_before_the_end():
    memory, errors = watched(SQLiteStore())
    store, done = memory.store, []

    async def append(number: int) -> None:
        assert await store.append("log", f"{number}", b"")
        done.append(number)

    for number in range(100):
        assert memory.later("log", partial(append, number))
    assert not done
    await memory.aclose()
    assert done == list(range(100))
    assert not errors


async def test_work_that_fails_does_not_stop_the_rest(caplog):
    memory, errors = watched(SQLiteStore())

    async def mistake() -> None:
        raise ZeroDivisionError("by a mistake")

    memory.later("log", mistake)
    memory.later("log", lambda: memory.store.add("key", 1e400))
    memory.later("other", lambda: memory.store.add("key", 2))
    while memory._pending:
        await asyncio.sleep(0)
    assert await memory.store.add("key", 0) == 2
    assert errors == {"log": 2}
    assert "by a mistake" in caplog.text
    await memory.aclose()


async def test_what_finds_no_place_or_no_time_is_counted(monkeypatch):
    monkeypatch.setattr(guard, "MAX_PENDING", 10)
    monkeypatch.setattr(guard, "CLOSE_S", 0.1)
    store = StuckStore()
    memory, errors = watched(store, timeout_s=10)
    taken = [memory.later("log", lambda: store.get("key")) for _ in range(15)]
    assert taken == [True] * 10 + [False] * 5
    assert errors == {"log": 5}
    started = time.monotonic()
    await memory.aclose()
    assert time.monotonic() - started < 5
    assert errors == {"log": 15}


async def test_closing_twice_is_fine():
    memory, errors = watched(SQLiteStore())
    await memory.aclose()
    await memory.aclose()
    assert not errors
    memory.later("log", lambda: memory.store.get("key"))
    await memory.aclose()
    assert errors == {"log": 1}
