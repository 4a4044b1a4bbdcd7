"""A store in this process: SQLite, in memory or in a file."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from orchestrator.memory.base import StoreError

__all__ = ["SQLiteStore"]

Result = TypeVar("Result")

# How long another process' write may keep ours waiting.
BUSY_S = 1.0

# How long replicas that start at the same time may keep each other from opening a new file.
OPEN_S = 10.0

# Expired rows are not seen, so it does not matter much when they go.
PURGE_EVERY_S = 30.0

# Expired rows that go at once; requests may wait meanwhile.
PURGE_ROWS = 2_000

# Writes after which a value with a time to live goes, even if its time is not over.
MAX_VALUES = 100_000

# By rowid, which grows with each write: sorting by time would take longer than requests wait.
_BOUND = """
DELETE FROM entries WHERE rowid <= (SELECT MAX(rowid) FROM entries) - ?
AND +kind = 'value' AND expires < 9e999
"""

_PURGE = """
DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries WHERE expires <= ? LIMIT ?)
"""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    kind TEXT NOT NULL, key BLOB NOT NULL, value NOT NULL, expires REAL NOT NULL,
    PRIMARY KEY (kind, key)
);
CREATE INDEX IF NOT EXISTS entries_expires ON entries (expires);
CREATE TABLE IF NOT EXISTS records (
    log BLOB NOT NULL, number INTEGER NOT NULL, id BLOB NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (log, number)
);
CREATE UNIQUE INDEX IF NOT EXISTS records_id ON records (log, id);
"""

# Replaced, not updated: what is written again counts as new.
_PUT = "INSERT OR REPLACE INTO entries VALUES ('value', ?, ?, ?)"

# The right sides see the old row.
_ADD = """
INSERT INTO entries VALUES ('counter', :key, :amount, :expires)
ON CONFLICT DO UPDATE SET
    value = IIF(expires > :now, value, 0.0) + excluded.value,
    expires = IIF(expires > :now, expires, excluded.expires)
RETURNING value
"""

# Numbers have no gaps, so that the bound needs no counting.
_APPEND = """
INSERT INTO records
SELECT :log, COALESCE(MAX(number), 0) + 1, :id, :record FROM records WHERE log = :log
ON CONFLICT DO NOTHING
RETURNING number
"""

_SCAN = """
SELECT id, record FROM records WHERE log = :log
AND number > COALESCE((SELECT number FROM records WHERE log = :log AND id = :after), 0)
ORDER BY number LIMIT :limit
"""


class SQLiteStore:
    """Keeps everything in one SQLite database.

    Several processes of one machine may share a file, which a thread of its own reads and writes.
    What is in memory takes a tenth of the time that going to a thread and back would.

    Args:
        path: The file; none keeps everything in memory, for as long as this object lives.
        max_records: Records that each log keeps.

    Raises:
        StoreError: The file cannot be opened, or is no database.
    """

    def __init__(self, path: str | None = None, *, max_records: int = 20_000) -> None:
        self._max_records = max_records
        self._closed = False
        self._purged = time.monotonic()
        try:
            self._database = sqlite3.connect(
                path or ":memory:", timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            if path:
                # Readers do not wait for the writer, and a crash of ours loses nothing.
                _switch_to_wal(self._database)
                self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StoreError(
                f"the database {path or ':memory:'} cannot be used: {error}"
            ) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="memory") if path else None

    async def get(self, key: str | bytes) -> bytes | None:
        """The value of a key."""
        value: bytes | None = await self._one(
            "SELECT value FROM entries WHERE kind = 'value' AND key = ? AND expires > ?",
            (_bytes(key), time.time()),
        )
        return value

    async def put(self, key: str | bytes, value: bytes, *, ttl_s: float | None = None) -> None:
        """Set the value of a key."""
        await self._one(_PUT, (_bytes(key), value, _expires(ttl_s)))

    async def delete(self, key: str | bytes) -> None:
        """Forget a key's value and its counter."""
        await self._one("DELETE FROM entries WHERE key = ?", (_bytes(key),))

    async def add(self, key: str | bytes, amount: float, *, ttl_s: float | None = None) -> float:
        """Add to a counter."""
        if not math.isfinite(amount):
            raise StoreError(f"{amount} cannot be added to a counter")
        values = {
            "key": _bytes(key),
            "amount": float(amount),
            "expires": _expires(ttl_s),
            "now": time.time(),
        }
        return float(await self._one(_ADD, values))

    async def append(self, log: str, id: str, record: bytes) -> bool:
        """Put a record at the end of a log, once."""

        def work() -> bool:
            values = {"log": _bytes(log), "id": _bytes(id), "record": record}
            rows = self._database.execute(_APPEND, values).fetchall()
            if rows:
                self._database.execute(
                    "DELETE FROM records WHERE log = ? AND number <= ?",
                    (_bytes(log), rows[0][0] - self._max_records),
                )
            return bool(rows)

        return await self._run(work)

    async def read(self, log: str, id: str) -> bytes | None:
        """One record of a log."""
        record: bytes | None = await self._one(
            "SELECT record FROM records WHERE log = ? AND id = ?", (_bytes(log), _bytes(id))
        )
        return record

    async def scan(
        self, log: str, *, after: str | None = None, limit: int
    ) -> list[tuple[str, bytes]]:
        """Records in the order in which they were appended."""
        last = None if after is None else _bytes(after)
        values = {"log": _bytes(log), "after": last, "limit": limit}
        rows = await self._run(lambda: self._database.execute(_SCAN, values).fetchall())
        return [(id.decode(errors="surrogatepass"), record) for id, record in rows]

    async def aclose(self) -> None:
        """Close the database."""
        if not self._closed:
            self._closed = True
            if self._thread is None:
                self._database.close()
                return
            closing = self._thread.submit(self._database.close)
            self._thread.shutdown(wait=False)
            await asyncio.wrap_future(closing)

    async def _one(self, statement: str, values: Any) -> Any:
        """The one value a statement gives, or none."""
        # A statement that is not read to its end has not committed.
        rows = await self._run(lambda: self._database.execute(statement, values).fetchall())
        return rows[0][0] if rows else None

    async def _run(self, work: Callable[[], Result]) -> Result:
        if self._closed:
            raise StoreError("the store is closed")
        try:
            if self._thread is None:
                return self._timely(work)
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._timely, work
            )
        except (sqlite3.Error, OverflowError) as error:
            raise StoreError(f"the database failed: {error}") from error

    def _timely(self, work: Callable[[], Result]) -> Result:
        """Do some work, and now and then forget what has expired."""
        if time.monotonic() - self._purged > PURGE_EVERY_S:
            gone = self._database.execute(_PURGE, (time.time(), PURGE_ROWS)).rowcount
            if gone < PURGE_ROWS:
                self._purged = time.monotonic()
                self._database.execute(_BOUND, (MAX_VALUES,))
        return work()


def _switch_to_wal(database: sqlite3.Connection) -> None:
    # Of several that switch a new file at once all but one may fail, without having waited.
    deadline = time.monotonic() + OPEN_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _bytes(key: str | bytes) -> bytes:
    # Text from JSON may hold lone surrogates; all that matters is that keys stay apart.
    return key.encode(errors="surrogatepass") if isinstance(key, str) else key


def _expires(ttl_s: float | None) -> float:
    return math.inf if ttl_s is None else time.time() + ttl_s
