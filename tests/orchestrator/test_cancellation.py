"""Whoever leaves, and whoever wins: experts that nobody wants any more stop."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from orchestrator.http.app import create_app
from orchestrator.strategies.hedge import HedgeStrategy
from tests.orchestrator.composing import Run, scripted
from tests.orchestrator.drill import STRATEGIES, Visitor, active, orchestrator_of
from tests.orchestrator.support import chat_body, eventually

TRIALS = 200
POOLS_PER_STRATEGY = 6
DEADLINE_S = 0.4
AT_ONCE = 16


class Pool:
    """A service with random delays and failures, and clients of random patience."""

    def __init__(self, strategy: str, seed: int) -> None:
        self.chance = random.Random(f"{strategy} {seed}")
        delay_s = self.chance.choice([0, 0.02, 0.1, 30])
        rule = {"delay_s": delay_s, "chunk_delay_s": self.chance.uniform(0, 0.1)}
        faults = {"share": 0.3, "seed": seed}
        self.orchestrator = orchestrator_of(
            strategy, timeout_s=DEADLINE_S, faults=faults, rule=rule
        )
        self.app = create_app(self.orchestrator)

    async def visit(self, times: int) -> int:
        """Have so many clients come one after another; returns how many left early."""
        left = 0
        for _ in range(times):
            visitor = Visitor(self.app, chat_body(stream=self.chance.random() < 0.5))
            patience_s = self.chance.uniform(0, 0.3) if self.chance.random() < 0.7 else None
            await asyncio.wait({visitor.task}, timeout=patience_s)
            left += not visitor.task.done()
            visitor.leave()
            await eventually(lambda: active(self.orchestrator) == 0)
            await visitor.task
        return left


async def test_a_second_after_a_client_has_left_no_expert_is_active():
    # All are made first: making one takes long enough to keep the clients of others waiting.
    pools = [Pool(name, seed) for name in STRATEGIES for seed in range(POOLS_PER_STRATEGY)]
    times = math.ceil(TRIALS / len(pools))
    places = asyncio.Semaphore(AT_ONCE)

    async def visited(pool: Pool) -> int:
        async with places:
            return await pool.visit(times)

    left = await asyncio.gather(*map(visited, pools))
    assert sum(left) > TRIALS / 4


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_all_are_silent_frees_all(strategy, stream):
    orchestrator = orchestrator_of(
        strategy, timeout_s=30, faults={"share": 0}, rule={"delay_s": 30}
    )
    visitor = Visitor(create_app(orchestrator), chat_body(stream=stream))
    await eventually(lambda: active(orchestrator) > 0)
    visitor.leave()
    await eventually(lambda: active(orchestrator) == 0 and visitor.task.done())
    visitor.task.result()


async def test_losers_are_free_while_the_winner_still_speaks():
    hedge = HedgeStrategy(type="hedge", wait_s=0.02, max_extra_share=1)
    slow = scripted("a", {"delay_s": 30})
    run = Run(hedge, [slow, scripted("b", {"answer": "1 2 3", "chunk_delay_s": 30})])
    assert (await anext(run.chunks)).text == "1"
    await eventually(lambda: slow.active == 0)
    assert run.active == 1
    await run.chunks.aclose()
    assert run.active == 0
