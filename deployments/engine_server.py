"""The deployment that hosts one in-process engine: all but vLLM's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import TypeAdapter

from deployments.batching import Batch, in_batches
from experts.base import AnyRequest, Expert
from experts.config import ExpertConfig
from experts.errors import ExpertConfigError, ExpertError

__all__ = ["EngineServer"]


class EngineServer:
    """Answers for all experts of one config entry.

    Args:
        entry: The config entry as JSON-able data; names in it are resolved in this process.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        from experts.registry import experts_of, open_engine

        config: ExpertConfig = TypeAdapter(ExpertConfig).validate_python(entry)
        self._engine = open_engine(config)
        self._experts: dict[str, Expert] = experts_of(self._engine)
        # A remote API that is down is no reason to replace the replica that calls it.
        self._watched = [] if config.engine == "openai" else list(self._experts.values())

    def stream(
        self, expert: str, request: AnyRequest, timeout_s: float
    ) -> AsyncGenerator[Batch, None]:
        """Stream one expert's answer in batches."""
        return in_batches(self._experts[expert].stream(request, timeout_s=timeout_s), expert)

    async def healthy(self, expert: str) -> None:
        """Return if the expert can answer now, raise if not."""
        await self._experts[expert].check_health()

    async def check_health(self) -> None:
        """Ray Serve's own question; a replica that fails it is replaced.

        One whose other experts can answer is not: that would break off what they are writing.
        """
        failure: Exception | None = None
        for expert in self._watched:
            try:
                return await expert.check_health()
            except ExpertError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def drop(self, expert: str) -> None:
        """Have an engine of several members go on without one, as if it had failed: for drills.

        Raises:
            ExpertConfigError: The engine's experts do not listen to each other.
        """
        if not hasattr(self._engine, "drop"):
            raise ExpertConfigError(f"the engine of {expert!r} has no members to drop")
        # It waits for the running decode step.
        await asyncio.to_thread(self._engine.drop, expert)

    async def __del__(self) -> None:
        for expert in getattr(self, "_experts", {}).values():
            await expert.aclose()
