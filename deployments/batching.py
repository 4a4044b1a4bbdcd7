"""Several chunks of a stream in one message between replicas.

A message between two replicas costs far more than a chunk in it, so chunks that are ready at the
same time travel together, and fast engines send at most every few milliseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress

from experts.errors import ExpertError, ExpertFailedError
from experts.types import Chunk

__all__ = ["INTERVAL_S", "Batch", "in_batches"]

# Readers do not notice 20 ms; the first chunk is never held back.
INTERVAL_S = 0.02

# An error travels as the last item: raised across processes it would be wrapped and logged with a
# traceback, though a refused request is no failure of the replica.
Batch = list[Chunk | ExpertError]


async def in_batches(
    chunks: AsyncIterator[Chunk], expert: str, *, interval_s: float = INTERVAL_S
) -> AsyncGenerator[Batch, None]:
    """Yield what has come since the last time, the first chunk at once.

    Args:
        chunks: A stream of an expert; closed when the consumer stops.
        expert: Its name, for errors that are not yet ExpertErrors.
        interval_s: Least time between two batches, in seconds.
    """
    ready: Batch = []
    news = asyncio.Event()

    async def produce() -> None:
        try:
            async with aclosing(chunks) as stream:  # type: ignore[type-var]
                async for chunk in stream:
                    ready.append(chunk)
                    news.set()
        except ExpertError as error:
            ready.append(error)
        except Exception as error:
            ready.append(ExpertFailedError(expert, f"{type(error).__name__}: {error}"))
        finally:
            news.set()

    producer = asyncio.ensure_future(produce())
    try:
        sent = 0.0
        while not (producer.done() and not ready):
            await news.wait()
            wait_s = sent + interval_s - time.monotonic()
            if wait_s > 0 and not producer.done():
                await asyncio.wait({producer}, timeout=wait_s)
            news.clear()
            if ready:
                batch, ready[:] = list(ready), []
                sent = time.monotonic()
                yield batch
    finally:
        producer.cancel()
        with suppress(asyncio.CancelledError):
            await producer
