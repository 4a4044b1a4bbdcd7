"""A store that several ingress replicas share: Redis, or what speaks its protocol (Valkey)."""

from __future__ import annotations

from typing import Any

from orchestrator.memory.base import StoreError

__all__ = ["RedisStore"]

CONNECTIONS = 32

_ADD = """
local fresh = redis.call('EXISTS', KEYS[1]) == 0
local sum = redis.call('INCRBYFLOAT', KEYS[1], ARGV[1])
if fresh and ARGV[2] ~= '' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return sum
"""

# A log is a hash from id to record, a sorted set of ids by number, and the last number.
_APPEND = """
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[1])
local excess = redis.call('ZCARD', KEYS[2]) - tonumber(ARGV[3])
if excess > 0 then
  local dropped = redis.call('ZPOPMIN', KEYS[2], excess)
  for i = 1, #dropped, 2 do redis.call('HDEL', KEYS[1], dropped[i]) end
end
return 1
"""

_SCAN = """
local number = ARGV[1] ~= '' and redis.call('ZSCORE', KEYS[2], string.sub(ARGV[1], 2))
local from = number and '(' .. number or '-inf'
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], from, '+inf', 'LIMIT', 0, ARGV[2])) do
  local record = redis.call('HGET', KEYS[1], id)
  if record then table.insert(found, {id, record}) end
end
return found
"""


class RedisStore:
    """Keeps everything in Redis. Connects when it is first needed.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://`` address, with user and password if need be.
        prefix: What all keys start with.
        max_records: Records that each log keeps.
        timeout_s: Seconds that connecting may take, and each answer.

    Raises:
        StoreError: The address cannot be understood, or the package redis is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "collegium:",
        max_records: int = 20_000,
        timeout_s: float = 1.0,
    ) -> None:
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ImportError as error:
            raise StoreError("Redis needs a package: pip install 'collegium[redis]'") from error
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # Whoever adds twice after a lost answer has counted twice.
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise StoreError(f"the address of Redis cannot be used: {error}") from error
        self._client = Redis.from_pool(pool)
        self._failures = (RedisError, OSError, OverflowError)
        self._prefix = prefix.encode()
        self._max_records = max_records
        self._closed = False
        self._add = self._client.register_script(_ADD)
        self._append = self._client.register_script(_APPEND)
        self._scan = self._client.register_script(_SCAN)

    async def get(self, key: str | bytes) -> bytes | None:
        """The value of a key."""
        value: bytes | None = await self._do("GET", self._key(b"value:", key))
        return value

    async def put(self, key: str | bytes, value: bytes, *, ttl_s: float | None = None) -> None:
        """Set the value of a key."""
        time_to_live = () if ttl_s is None else ("PX", _milliseconds(ttl_s))
        await self._do("SET", self._key(b"value:", key), value, *time_to_live)

    async def delete(self, key: str | bytes) -> None:
        """Forget a key's value and its counter."""
        for kind in (b"value:", b"counter:"):
            await self._do("DEL", self._key(kind, key))

    async def add(self, key: str | bytes, amount: float, *, ttl_s: float | None = None) -> float:
        """Add to a counter."""
        arguments = [repr(float(amount)), "" if ttl_s is None else _milliseconds(ttl_s)]
        return float(await self._run(self._add, [self._key(b"counter:", key)], arguments))

    async def append(self, log: str, id: str, record: bytes) -> bool:
        """Put a record at the end of a log, once."""
        arguments = [_bytes(id), record, self._max_records]
        return bool(await self._run(self._append, self._log(log), arguments))

    async def read(self, log: str, id: str) -> bytes | None:
        """One record of a log."""
        record: bytes | None = await self._do("HGET", self._log(log)[0], _bytes(id))
        return record

    async def scan(
        self, log: str, *, after: str | None = None, limit: int
    ) -> list[tuple[str, bytes]]:
        """Records in the order in which they were appended."""
        arguments = [b"" if after is None else b"=" + _bytes(after), limit]
        found = await self._run(self._scan, self._log(log)[:2], arguments)
        return [(id.decode(errors="surrogatepass"), record) for id, record in found]

    async def aclose(self) -> None:
        """Close the connections."""
        if not self._closed:
            self._closed = True
            try:
                await self._client.aclose()
                await self._client.connection_pool.disconnect()
            except self._failures as error:
                raise StoreError(f"Redis failed: {error}") from error

    async def _do(self, *command: Any) -> Any:
        self._check_open()
        try:
            return await self._client.execute_command(*command)
        except self._failures as error:
            raise StoreError(f"Redis failed: {error}") from error

    async def _run(self, script: Any, keys: list[bytes], arguments: list[Any]) -> Any:
        self._check_open()
        try:
            return await script(keys, arguments)
        except self._failures as error:
            raise StoreError(f"Redis failed: {error}") from error

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store is closed")

    def _key(self, kind: bytes, key: str | bytes) -> bytes:
        return self._prefix + kind + _bytes(key)

    def _log(self, log: str) -> list[bytes]:
        # Behind a proxy, braces put the three on the same server, as scripts need it.
        name = self._prefix + b"log:{" + _bytes(log) + b"}:"
        return [name + part for part in (b"records", b"order", b"last")]


def _bytes(text: str | bytes) -> bytes:
    # Text from JSON may hold lone surrogates; all that matters is that keys stay apart.
    return text.encode(errors="surrogatepass") if isinstance(text, str) else text


def _milliseconds(ttl_s: float) -> int:
    return max(1, round(min(ttl_s, 1e12) * 1000))
