from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.config import ConfigError, load_config, parse_config
from orchestrator.memory.base import StoreError
from orchestrator.memory.checks import OpenStore, StoreCheck, shared_store_checks, store_checks
from orchestrator.memory.config import RedisMemoryConfig, SQLiteMemoryConfig
from orchestrator.memory.opening import open_memory
from orchestrator.memory.redis import RedisStore
from orchestrator.memory.sqlite import SQLiteStore
from tests.orchestrator.support import config_content
from tests.redis_server import RedisServer, running_redis


@pytest.fixture(scope="module")
def redis(tmp_path_factory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", "redis"])
def open_store(request, tmp_path: Path) -> OpenStore:
    if request.param == "memory":
        return lambda **options: SQLiteStore(**options)
    if request.param == "file":
        return lambda **options: SQLiteStore(str(tmp_path / "memory.db"), **options)
    url, prefix = request.getfixturevalue("redis").url, uuid.uuid4().hex
    return lambda **options: RedisStore(url, prefix=prefix, timeout_s=10, **options)


@pytest.mark.parametrize("check", store_checks(), ids=lambda check: check.__name__)
async def test_store_passes_the_battery(open_store: OpenStore, check: StoreCheck):
    await check(open_store)


@pytest.mark.parametrize("open_store", ["file", "redis"], indirect=True)
@pytest.mark.parametrize("check", shared_store_checks(), ids=lambda check: check.__name__)
async def test_shared_store_passes_the_battery(open_store: OpenStore, check: StoreCheck):
    await check(open_store)


@pytest.mark.parametrize("content", [b"", b"not a database, whatever its name says" * 100])
def test_sqlite_says_which_file_it_cannot_use(tmp_path: Path, content: bytes):
    path = tmp_path / "folder" / "memory.db"
    if content:
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"memory\.db cannot be used"):
        SQLiteStore(str(path))


async def test_sqlite_forgets_what_has_expired(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("orchestrator.memory.sqlite.PURGE_EVERY_S", 0)
    store = SQLiteStore()
    await store.put("short", b"", ttl_s=1e-6)
    await store.put("long", b"", ttl_s=60)
    await store.add("counter", 1, ttl_s=1e-6)
    await store.get("")
    rows = store._database.execute("SELECT key FROM entries").fetchall()
    assert rows == [(b"long",)]
    await store.aclose()


async def test_sqlite_forgets_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr("orchestrator.memory.sqlite.PURGE_EVERY_S", 0.0)
    monkeypatch.setattr("orchestrator.memory.sqlite.PURGE_ROWS", 2)
    store = SQLiteStore()
    for number in range(5):
        store._database.execute("INSERT INTO entries VALUES ('value', ?, '', 1)", (number,))
    left = []
    for _ in range(3):
        await store.get("")
        left.append(store._database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])
    assert left == [3, 1, 0]
    await store.aclose()


async def test_sqlite_keeps_no_more_values_than_it_may(monkeypatch):
    monkeypatch.setattr("orchestrator.memory.sqlite.PURGE_EVERY_S", 0)
    monkeypatch.setattr("orchestrator.memory.sqlite.MAX_VALUES", 2)
    store = SQLiteStore()
    await store.put("forever", b"")
    await store.add("counter", 1, ttl_s=5)
    for ttl_s in (50, 10, 40, 30):
        await store.put(str(ttl_s), b"", ttl_s=ttl_s)
    await store.get("")
    rows = store._database.execute("SELECT key FROM entries ORDER BY key").fetchall()
    assert rows == [(b"30",), (b"40",), (b"counter",), (b"forever",)]
    await store.aclose()


def test_sqlite_waits_for_another_replica_that_makes_the_file(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("orchestrator.memory.sqlite.BUSY_S", 0.0)
    path = str(tmp_path / "memory.db")
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.2, other.close).start()
    asyncio.run(SQLiteStore(path).aclose())


async def test_redis_says_what_is_wrong_with_its_address():
    with pytest.raises(StoreError, match="must specify one of the following schemes"):
        RedisStore("http://127.0.0.1")
    store = RedisStore("redis://127.0.0.1:1")
    with pytest.raises(StoreError, match="connect"):
        await store.get("key")
    await store.aclose()


async def test_redis_works_again_after_a_restart(tmp_path: Path):
    with running_redis(tmp_path) as server:
        store = RedisStore(server.url)
        assert await store.append("log", "id", b"")
        assert await store.add("sum", 1) == 1
        server.kill()
        for _ in range(3):
            with pytest.raises(StoreError):
                await store.add("sum", 1)
        server.start()
        assert await store.add("sum", 1) == 1
        assert await store.append("log", "id", b"")
        await store.aclose()


@pytest.mark.parametrize(
    ("memory", "problem"),
    [
        ({"type": "redis"}, "give either url_env or url"),
        ({"type": "redis", "url": "redis://a", "url_env": "A"}, "give either url_env or url"),
        ({"type": "redis", "url": "redis://:secret@a"}, "memory.redis.url: holds a password"),
        ({"type": "redis", "url": "redis://a?password=b"}, "holds a password"),
        ({"type": "sqlite", "url": "redis://a"}, "memory.sqlite.url: Extra inputs"),
        ({"url_env": "A"}, "memory.sqlite.url_env: Extra inputs"),
        ({"type": "sqlite", "max_records": 0}, "memory.sqlite.max_records"),
        ({"type": "sqlite", "timeout_s": 0}, "memory.sqlite.timeout_s"),
    ],
)
def test_config_says_what_is_wrong(memory, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_config(config_content(memory=memory))


def test_the_file_lies_beside_the_config(tmp_path: Path):
    text = "{experts: [{name: a, engine: scripted}], memory: {type: sqlite, path: memory.db}}"
    (tmp_path / "config.yaml").write_text(text)
    memory = load_config(tmp_path / "config.yaml").memory
    assert isinstance(memory, SQLiteMemoryConfig)
    assert memory.path == str(tmp_path / "memory.db")


async def test_the_address_comes_from_the_environment(redis, monkeypatch):
    config = RedisMemoryConfig(type="redis", url_env="REDIS_ADDRESS", prefix=uuid.uuid4().hex)
    with pytest.raises(ConfigError, match=r"memory\.url_env names REDIS_ADDRESS"):
        open_memory(config)
    monkeypatch.setenv("REDIS_ADDRESS", "nonsense")
    with pytest.raises(ConfigError, match="the address of Redis cannot be used"):
        open_memory(config)
    monkeypatch.setenv("REDIS_ADDRESS", redis.url)
    memory = open_memory(config)
    assert await memory.store.add("sum", 1) == 1
    await memory.aclose()


def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"memory: the database .*memory\.db cannot be used"):
        open_memory(SQLiteMemoryConfig(path=str(tmp_path / "folder" / "memory.db")))
