"""Where memory is kept: its part of the config."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator, model_validator

from experts.config import EnvironmentName
from orchestrator.strict import StrictModel, default_type

__all__ = ["MemoryConfig", "RedisMemoryConfig", "SQLiteMemoryConfig"]


class _MemoryConfig(StrictModel):
    timeout_s: float = Field(default=0.25, gt=0)
    """Seconds an operation may take; a request goes on without what takes longer."""
    max_records: int = Field(default=20_000, ge=1)
    """Records that each log keeps, such as decisions; the oldest are dropped."""


class SQLiteMemoryConfig(_MemoryConfig):
    """Kept by each ingress replica for itself, or in a file that those of one machine share."""

    type: Literal["sqlite"] = "sqlite"
    """Which kind of store."""
    path: str | None = Field(default=None, min_length=1)
    """The file, relative to the config file; none forgets everything when the replica ends."""


class RedisMemoryConfig(_MemoryConfig):
    """Kept in Redis 6.2 or later, or in Valkey, for all ingress replicas together."""

    type: Literal["redis"]
    """Which kind of store."""
    url_env: EnvironmentName | None = None
    """Environment variable with the address, such as ``rediss://:PASSWORD@HOST:6379/0``."""
    url: str | None = None
    """The address itself, if it needs no password."""
    prefix: str = "collegium:"
    """What all keys start with, for services that share one Redis."""

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "")
        if parts.password or "password" in parse_qs(parts.query):
            raise ValueError(
                "holds a password; put the address into an environment variable and its name into "
                "url_env"
            )
        return url

    @model_validator(mode="after")
    def _one_address(self) -> RedisMemoryConfig:
        if (self.url is None) == (self.url_env is None):
            raise ValueError("give either url_env or url: where Redis listens")
        return self


MemoryConfig = Annotated[
    SQLiteMemoryConfig | RedisMemoryConfig,
    Field(discriminator="type"),
    default_type("sqlite"),
]
