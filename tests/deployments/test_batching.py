"""Chunks travel in batches, errors as the last item."""

from __future__ import annotations

import asyncio
import pickle

from deployments.batching import in_batches
from experts.errors import ExpertFailedError, ExpertOverloadedError
from experts.types import Chunk


async def _chunks(count, *, delay_s=0.0, error=None):
    for number in range(count):
        if delay_s:
            await asyncio.sleep(delay_s)
        yield Chunk(text=str(number))
    if error is not None:
        raise error


def _texts(batches):
    return [item.text for batch in batches for item in batch]


async def test_ready_chunks_share_a_batch():
    batches = [batch async for batch in in_batches(_chunks(50), "a")]
    assert len(batches) < 5
    assert _texts(batches) == [str(n) for n in range(50)]


async def test_the_first_chunk_is_not_held_back():
    stream = in_batches(_chunks(5, delay_s=0.01), "a", interval_s=10)
    assert _texts([await anext(stream)]) == ["0"]
    assert _texts([batch async for batch in stream]) == ["1", "2", "3", "4"]


async def test_an_expert_error_is_the_last_item():
    error = ExpertOverloadedError("a", 2.0)
    items = [item async for batch in in_batches(_chunks(2, error=error), "a") for item in batch]
    assert items[-1] is error
    assert str(pickle.loads(pickle.dumps(items[-1]))) == str(error)


async def test_other_errors_become_expert_errors():
    items = [i async for b in in_batches(_chunks(0, error=KeyError("x")), "a") for i in b]
    assert isinstance(items[-1], ExpertFailedError)


async def test_leaving_closes_the_stream():
    closed = asyncio.Event()

    async def endless():
        try:
            while True:
                yield Chunk(text="x")
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    stream = in_batches(endless(), "a")
    await anext(stream)
    await stream.aclose()
    assert closed.is_set()
