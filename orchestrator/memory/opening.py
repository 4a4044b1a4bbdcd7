"""From a config to memory."""

from __future__ import annotations

from orchestrator.config import ConfigError
from orchestrator.memory.base import Store, StoreError
from orchestrator.memory.config import MemoryConfig, RedisMemoryConfig
from orchestrator.memory.guard import Memory
from orchestrator.memory.redis import RedisStore
from orchestrator.memory.sqlite import SQLiteStore
from orchestrator.settings import redis_url

__all__ = ["open_memory"]


def open_memory(config: MemoryConfig) -> Memory:
    """Open the store a config asks for. Redis is not needed yet: it may come up later.

    Raises:
        ConfigError: The file or the address cannot be used.
    """
    try:
        return Memory(_open(config), timeout_s=config.timeout_s)
    except StoreError as error:
        raise ConfigError(f"memory: {error}") from error


def _open(config: MemoryConfig) -> Store:
    if isinstance(config, RedisMemoryConfig):
        return RedisStore(
            redis_url(config),
            prefix=config.prefix,
            max_records=config.max_records,
            timeout_s=config.timeout_s,
        )
    return SQLiteStore(config.path, max_records=config.max_records)
