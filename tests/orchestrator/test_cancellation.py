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


async def one_after_another(strategy: str, seed: int, trials: int) -> int:
    """Clients of a service with random delays and failures; returns how many left early."""
    chance = random.Random(f"{strategy} {seed}")
    rule = {"delay_s": chance.choice([0, 0.02, 0.1, 30]), "chunk_delay_s": chance.uniform(0, 0.1)}
    faults = {"share": 0.3, "seed": seed}
    orchestrator = orchestrator_of(strategy, timeout_s=DEADLINE_S, faults=faults, rule=rule)
    app, left = create_app(orchestrator), 0
    for _ in range(trials):
        visitor = Visitor(app, chat_body(stream=chance.random() < 0.5))
        leaves = chance.random() < 0.7
        await asyncio.wait({visitor.task}, timeout=chance.uniform(0, 0.3) if leaves else None)
        left += not visitor.task.done()
        visitor.leave()
        await eventually(lambda: active(orchestrator) == 0)
        await visitor.task
    return left


async def test_a_second_after_a_client_has_left_no_expert_is_active():
    pools = [(name, seed) for name in STRATEGIES for seed in range(POOLS_PER_STRATEGY)]
    trials = math.ceil(TRIALS / len(pools))
    left = await asyncio.gather(*(one_after_another(*pool, trials) for pool in pools))
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
