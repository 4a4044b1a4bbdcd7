"""Checks that every store must pass, for ours and for users' own.

A check takes a function that opens a store, and closes what it opened. Use it with pytest::

    @pytest.mark.parametrize("check", store_checks(), ids=lambda check: check.__name__)
    async def test_store(check):
        await check(lambda **options: MyStore(**options))

Every call for a check of ``shared_store_checks`` must open the same data, for other checks none.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from orchestrator.memory.base import Store, StoreError

__all__ = ["OpenStore", "StoreCheck", "shared_store_checks", "store_checks"]

ALL_BYTES = bytes(range(256))
STRANGE_TEXTS = ("", " ", "a b", "a:b", "{a}", "\x00", "a\x00b", "ünï", "\ud800", "*", "a%", "1")


class OpenStore(Protocol):
    """Opens a store whose logs keep so many records."""

    def __call__(self, *, max_records: int = ...) -> Store:
        """A store."""
        ...


StoreCheck = Callable[[OpenStore], Awaitable[None]]


@asynccontextmanager
async def _opened(open_store: OpenStore, max_records: int = 1000) -> AsyncIterator[Store]:
    store = open_store(max_records=max_records)
    try:
        yield store
    finally:
        await store.aclose()


async def check_values(open_store: OpenStore) -> None:
    """Values can be set, replaced and forgotten."""
    async with _opened(open_store) as store:
        assert await store.get("key") is None
        await store.delete("key")
        for value in (b"one", b"", b"three"):
            await store.put("key", value)
            assert await store.get("key") == value
        assert await store.get(b"key") == b"three"
        await store.delete("key")
        assert await store.get("key") is None


async def check_keys_and_values_are_any_bytes(open_store: OpenStore) -> None:
    """Keys, values and records may hold any bytes, keys' and ids' texts any characters."""
    keys: list[str | bytes] = [*STRANGE_TEXTS, ALL_BYTES, b"\xff\xfe", b"\x00" * 1000]
    async with _opened(open_store) as store:
        for number, key in enumerate(keys):
            await store.put(key, ALL_BYTES + bytes([number]))
            await store.add(key, number)
        for number, key in enumerate(keys):
            assert await store.get(key) == ALL_BYTES + bytes([number])
            assert await store.add(key, 0) == number
        for log in STRANGE_TEXTS:
            for id in STRANGE_TEXTS:
                assert await store.append(log, id, ALL_BYTES + repr((log, id)).encode())
        for log in STRANGE_TEXTS:
            found = await store.scan(log, limit=1000)
            assert found == [(id, ALL_BYTES + repr((log, id)).encode()) for id in STRANGE_TEXTS]
            for id, record in found:
                assert await store.read(log, id) == record
                rest = await store.scan(log, after=id, limit=1000)
                assert found[len(found) - len(rest) :] == rest


async def check_big_values(open_store: OpenStore) -> None:
    """Values and records of several MiB come back whole."""
    big = ALL_BYTES * (4 << 12)
    async with _opened(open_store) as store:
        await store.put("big", big)
        assert await store.append("log", "big", big)
        assert await store.get("big") == big
        assert await store.read("log", "big") == big


async def check_time_to_live(open_store: OpenStore) -> None:
    """A value is forgotten when its time is over, and a later put decides anew."""
    async with _opened(open_store) as store:
        await store.put("short", b"1", ttl_s=0.1)
        await store.put("long", b"2", ttl_s=60)
        await store.put("prolonged", b"3", ttl_s=0.1)
        await store.put("prolonged", b"4")
        await store.put("shortened", b"5", ttl_s=60)
        await store.put("shortened", b"6", ttl_s=0.1)
        assert await store.get("short") == b"1"
        await asyncio.sleep(0.15)
        assert await store.get("short") is None
        assert await store.get("shortened") is None
        assert await store.get("long") == b"2"
        assert await store.get("prolonged") == b"4"


async def check_counters(open_store: OpenStore) -> None:
    """Counters start at 0, add any amounts, and have keys of their own."""
    async with _opened(open_store) as store:
        assert await store.add("sum", 0) == 0
        assert await store.add("sum", 0.25) == 0.25
        assert await store.add("sum", -1) == -0.75
        assert math.isclose(await store.add("tiny", 1.5e-9), 1.5e-9, rel_tol=1e-6)
        assert await store.get("sum") is None
        await store.put("sum", b"a value")
        assert await store.add("sum", 0) == -0.75
        await store.delete("sum")
        assert await store.get("sum") is None
        assert await store.add("sum", 0) == 0


async def check_counters_live_from_their_first_addition(open_store: OpenStore) -> None:
    """Further additions do not prolong a counter's life, nor start one that has none."""
    async with _opened(open_store) as store:
        await store.add("endless", 1)
        await store.add("endless", 1, ttl_s=0.05)
        await store.add("day", 1, ttl_s=0.2)
        await asyncio.sleep(0.1)
        assert await store.add("day", 1, ttl_s=60) == 2
        await asyncio.sleep(0.15)
        assert await store.add("day", 1, ttl_s=60) == 1
        assert await store.add("endless", 0) == 2


async def check_nothing_is_lost_when_many_add(open_store: OpenStore) -> None:
    """Every addition counts, and each one sees another sum."""
    async with _opened(open_store) as store:
        sums = await asyncio.gather(*(store.add("sum", 0.5) for _ in range(200)))
        assert sorted(sums) == [(number + 1) / 2 for number in range(200)]


async def check_only_finite_amounts_are_added(open_store: OpenStore) -> None:
    """What is no number is refused, and the counter stays."""
    async with _opened(open_store) as store:
        await store.add("sum", 1)
        for amount in (math.nan, math.inf, -math.inf):
            assert await _fails(store.add("sum", amount))
        assert await store.add("sum", 0) == 1


async def check_append_is_exactly_once(open_store: OpenStore) -> None:
    """Of many who append under one id one succeeds, and its record stays."""
    async with _opened(open_store) as store:
        records = [f"{number}".encode() for number in range(50)]
        done = await asyncio.gather(*(store.append("log", "id", record) for record in records))
        assert sum(done) == 1
        assert await store.read("log", "id") == records[done.index(True)]
        assert not await store.append("log", "id", b"later")
        assert await store.append("other log", "id", b"other")
        assert await store.scan("log", limit=10) == [("id", records[done.index(True)])]


async def check_scan_is_in_order(open_store: OpenStore) -> None:
    """Records come in the order of appending, in pages of any size, without gaps."""
    ids = [f"{number * 7919 % 100}" for number in range(100)]
    async with _opened(open_store) as store:
        assert await store.scan("log", limit=10) == []
        assert await store.scan("log", after="nobody", limit=10) == []
        for id in ids:
            await store.append("log", id, id.encode())
            await store.append("log", ids[0], b"refused ones leave no gap")
        for limit in (1, 7, 100, 1000):
            seen: list[str] = []
            while page := await store.scan("log", after=seen[-1] if seen else None, limit=limit):
                assert len(page) <= limit
                assert all(record == id.encode() for id, record in page)
                seen += [id for id, _ in page]
            assert seen == ids


async def check_logs_are_bounded(open_store: OpenStore) -> None:
    """A log drops its oldest records, and goes on from the oldest for who read one of those."""
    async with _opened(open_store, max_records=5) as store:
        for number in range(12):
            await store.append("log", f"{number}", b"")
        await store.append("other", "0", b"")
        kept = [id for id, _ in await store.scan("log", limit=100)]
        assert kept == ["7", "8", "9", "10", "11"]
        assert await store.read("log", "6") is None
        assert await store.read("other", "0") == b""
        assert await store.scan("log", after="9", limit=1) == [("10", b"")]
        assert await store.scan("log", after="2", limit=1) == [("7", b"")]
        assert await store.append("log", "2", b"anew")
        assert (await store.scan("log", after="11", limit=9)) == [("2", b"anew")]


async def check_who_gives_up_disturbs_nobody(open_store: OpenStore) -> None:
    """After operations were cancelled midway, everyone still gets their own answer."""
    async with _opened(open_store) as store:
        for number in range(20):
            await store.put(f"{number}", b"%d" % number)
        for wait_s in (0, 0.0001, 0.0005):
            tasks = [asyncio.create_task(store.get(f"{number}")) for number in range(20)]
            await asyncio.sleep(wait_s)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert found[1::2] == [b"%d" % number for number in range(1, 20, 2)]
        assert await store.get("7") == b"7"


async def check_close(open_store: OpenStore) -> None:
    """Closing twice is fine; afterwards every method fails with a StoreError."""
    store = open_store(max_records=10)
    await store.put("key", b"value")
    await store.aclose()
    await store.aclose()
    assert await _fails(store.get("key"))
    assert await _fails(store.put("key", b""))
    assert await _fails(store.delete("key"))
    assert await _fails(store.add("key", 1))
    assert await _fails(store.append("log", "id", b""))
    assert await _fails(store.read("log", "id"))
    assert await _fails(store.scan("log", limit=1))


async def _fails(operation: Awaitable[object]) -> bool:
    try:
        await operation
    except StoreError as error:
        return bool(str(error))
    return False


async def check_everything_survives_a_restart(open_store: OpenStore) -> None:
    """Whoever opens the store again finds what was there, and goes on with it."""
    async with _opened(open_store, max_records=3) as store:
        await store.put("kept", b"value", ttl_s=60)
        await store.put("short", b"value", ttl_s=0.05)
        await store.add("sum", 2.5)
        for number in range(3):
            await store.append("log", f"{number}", b"%d" % number)
    await asyncio.sleep(0.1)
    async with _opened(open_store, max_records=2) as store:
        assert await store.get("kept") == b"value"
        assert await store.get("short") is None
        assert await store.add("sum", 0.5) == 3
        assert not await store.append("log", "2", b"again")
        assert await store.append("log", "3", b"3")
        assert await store.scan("log", limit=10) == [("2", b"2"), ("3", b"3")]


async def check_several_share_one_store(open_store: OpenStore) -> None:
    """What several stores do to the same data at the same time is as if one had done it."""
    async with _opened(open_store) as one, _opened(open_store) as two:
        stores = [one, two] * 50
        sums = await asyncio.gather(*(store.add("sum", 1) for store in stores))
        assert sorted(sums) == [number + 1.0 for number in range(100)]
        done = await asyncio.gather(*(store.append("log", "id", b"") for store in stores))
        assert sum(done) == 1
        ids = [f"{number}" for number in range(100)]
        both = zip(stores, ids, strict=True)
        assert all(await asyncio.gather(*(store.append("log", id, b"") for store, id in both)))
        seen = [id for id, _ in await one.scan("log", limit=1000)]
        assert sorted(seen) == sorted(["id", *ids])
        assert seen == [id for id, _ in await two.scan("log", limit=1000)]
        await one.put("key", b"value")
        assert await two.get("key") == b"value"


def store_checks() -> list[StoreCheck]:
    """All checks of one store by itself; use with ``pytest.mark.parametrize``."""
    return [
        check_values,
        check_keys_and_values_are_any_bytes,
        check_big_values,
        check_time_to_live,
        check_counters,
        check_counters_live_from_their_first_addition,
        check_nothing_is_lost_when_many_add,
        check_only_finite_amounts_are_added,
        check_append_is_exactly_once,
        check_scan_is_in_order,
        check_logs_are_bounded,
        check_who_gives_up_disturbs_nobody,
        check_close,
    ]


def shared_store_checks() -> list[StoreCheck]:
    """All checks of stores that are opened several times on the same data."""
    return [check_everything_survives_a_restart, check_several_share_one_store]
