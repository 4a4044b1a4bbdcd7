"""A closed-loop load generator: ``concurrency`` clients, each with one request in flight."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

__all__ = ["Sample", "measure"]


@dataclass(slots=True)
class Sample:
    """What one load run saw; times in milliseconds."""

    total_ms: list[float] = field(default_factory=list)
    first_chunk_ms: list[float] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0

    def row(self) -> dict[str, float]:
        """Percentiles and rate."""
        total = np.array(self.total_ms or [np.nan])
        first = np.array(self.first_chunk_ms or [np.nan])
        return {
            "p50_ms": round(float(np.percentile(total, 50)), 3),
            "p99_ms": round(float(np.percentile(total, 99)), 3),
            "first_chunk_p50_ms": round(float(np.percentile(first, 50)), 3),
            "requests_per_s": round(len(self.total_ms) / self.seconds, 1) if self.seconds else 0.0,
            "errors": self.errors,
        }


async def measure(
    url: str,
    bodies: list[dict[str, Any]],
    *,
    concurrency: int,
    headers: dict[str, str] | None = None,
) -> Sample:
    """Send every body once, ``concurrency`` at a time, and time each answer."""
    sample, queue = Sample(), iter(bodies)
    connector = aiohttp.TCPConnector(limit=concurrency)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout
    ) as session:

        async def client() -> None:
            for body in queue:
                await _one(session, url, body, sample)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        sample.seconds = time.perf_counter() - started
    return sample


async def _one(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], sample: Sample
) -> None:
    started = time.perf_counter()
    first = None
    try:
        async with session.post(url, json=body) as response:
            async for piece in response.content.iter_any():
                if first is None and b"word" in piece:
                    first = time.perf_counter()
            if response.status != 200:
                sample.errors += 1
                return
    except (aiohttp.ClientError, TimeoutError):
        sample.errors += 1
        return
    sample.total_ms.append((time.perf_counter() - started) * 1000)
    sample.first_chunk_ms.append(((first or time.perf_counter()) - started) * 1000)
