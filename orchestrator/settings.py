"""What comes from the environment: secrets, by the names the config gives.

Nothing is read at import.
"""

from __future__ import annotations

import os

from orchestrator.config import ConfigError
from orchestrator.memory.config import RedisMemoryConfig

__all__ = ["api_keys", "redis_url"]


def api_keys(variable: str | None) -> list[str]:
    """The accepted API keys; none if the config names no variable.

    Raises:
        ConfigError: The variable is named but not set: serving everybody would be worse.
    """
    if variable is None:
        return []
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(
            f"server.api_keys_env names {variable}, but this environment variable is empty; "
            "set it to the accepted keys, separated by commas"
        )
    return keys


def redis_url(config: RedisMemoryConfig) -> str:
    """The address of Redis.

    Raises:
        ConfigError: The variable that should hold it is not set.
    """
    if config.url is not None:
        return config.url
    variable = config.url_env or ""
    if not (url := os.environ.get(variable, "").strip()):
        raise ConfigError(
            f"memory.url_env names {variable}, but this environment variable is empty; "
            "set it to the address of Redis, such as redis://HOST:6379/0"
        )
    return url
