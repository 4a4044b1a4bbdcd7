"""The transport seam: an Expert whose engine lives in another Serve deployment.

Above it everything runs the same, with in-process experts in tests and with handles in service.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from experts.base import AnyRequest
from experts.errors import (
    ExpertError,
    ExpertFailedError,
    ExpertOverloadedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
)
from experts.types import Chunk, ExpertCard

__all__ = ["HandleExpert"]

HEALTH_TIMEOUT_S = 5.0
# How long a dead deployment is given to come back before it is asked again.
RECOVERY_TIMEOUT_S = 60.0


class HandleExpert:
    """Reaches an expert through its deployment's handle.

    Args:
        card: The expert's card.
        handle: Handle of the deployment that hosts its engine.
        multiplexed_model_id: Ray Serve's id of an adapter that is loaded on demand; it makes Serve
            prefer replicas that hold it. Never set for a base model: all its requests would go to
            one replica.
    """

    def __init__(
        self, card: ExpertCard, handle: DeploymentHandle, *, multiplexed_model_id: str | None = None
    ) -> None:
        self._card = card
        # Every .options() makes a handle with its own long poll and metrics, so it is done once.
        options = {"multiplexed_model_id": multiplexed_model_id} if multiplexed_model_id else {}
        self._stream = handle.options(method_name="stream", stream=True, **options)
        self._healthy = handle.options(method_name="healthy")
        self._recovery: asyncio.Task[None] | None = None

    @property
    def card(self) -> ExpertCard:
        """What is publicly known of this expert."""
        return self._card

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        """Stream the answer; see ``experts.base.Expert``."""
        name = self._card.name
        if self._recovery is not None and not self._recovery.done():
            # Serve would hold the request until a new replica is up; another expert is faster.
            raise ExpertUnavailableError(name, "its replica died and is being replaced")
        deadline = asyncio.get_running_loop().time() + timeout_s
        batches = self._stream.remote(name, request, timeout_s)
        finished = False
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    batch = await anext(batches, None)
                if batch is None:
                    finished = True
                    return
                for item in batch:
                    if isinstance(item, ExpertError):
                        finished = True
                        raise item
                    yield item
        except TimeoutError:
            raise ExpertTimeoutError(name, timeout_s) from None
        except (RayError, RayServeException, ConnectionError) as error:
            translated = _translated(name, error)
            if isinstance(translated, ExpertUnavailableError):
                self._await_recovery()
            raise translated from error
        finally:
            if not finished:
                batches.cancel()

    def _await_recovery(self) -> None:
        if self._recovery is None or self._recovery.done():
            self._recovery = asyncio.ensure_future(self._until_healthy())

    async def _until_healthy(self) -> None:
        # At once where another replica lives; else as soon as Serve has replaced the dead one.
        with suppress(Exception):
            async with asyncio.timeout(RECOVERY_TIMEOUT_S):
                await self._healthy.remote(self._card.name)

    async def check_health(self) -> None:
        """Ask the engine whether it can answer now."""
        name = self._card.name
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._healthy.remote(name)
        except TimeoutError:
            raise ExpertUnavailableError(name, "no answer to the health check") from None
        except (RayError, RayServeException) as error:
            raise _translated(name, error) from error

    async def aclose(self) -> None:
        """Nothing to free: the deployment lives on."""


def _translated(expert: str, error: Exception) -> ExpertError:
    """The expert error that a failure of Ray or Serve means."""
    if isinstance(error, BackPressureError):
        return ExpertOverloadedError(expert)
    cause = getattr(error, "cause", None)
    if isinstance(cause, ExpertError):
        return cause
    if isinstance(error, RayTaskError) and not isinstance(error, RayActorError):
        return ExpertFailedError(expert, f"{type(cause or error).__name__}: {cause or error}")
    return ExpertUnavailableError(expert, f"{type(error).__name__}: {error}")
