"""Where all that were asked fail, the others are tried."""

from __future__ import annotations

import pytest

from experts.errors import ExpertOverloadedError, InvalidRequestError
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.best_of import BestOfStrategy
from orchestrator.strategies.vote import VoteStrategy
from orchestrator.testing import StrategyRun, scripted

STRATEGIES: list[Strategy] = [
    VoteStrategy(type="vote", experts=2),
    BestOfStrategy(type="best_of", judge="judge", experts=2),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.type)
async def test_the_others_are_tried_where_all_that_were_asked_fail(strategy, stream):
    experts = [scripted("a", error="failed"), scripted("b", error="overloaded"),
               scripted("c", error="failed"), scripted("d")]  # fmt: skip
    run = StrategyRun(strategy, experts, stream=stream, helpers=[scripted("judge")])
    assert (await run.answer()).text == "d"
    assert run.context.path == ["a", "b", "c", "d"]
    assert run.context.expert == "d"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.type)
async def test_the_last_error_is_given_where_nobody_answers(strategy):
    errors = ("failed", "failed", "overloaded")
    experts = [scripted(name, error=error) for name, error in zip("abc", errors, strict=True)]
    run = StrategyRun(strategy, experts, helpers=[scripted("judge")])
    assert isinstance(await run.error(), ExpertOverloadedError)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.type)
async def test_a_request_that_is_wrong_for_all_is_not_tried_on(strategy):
    experts = [scripted(name, error="invalid") for name in "abc"]
    run = StrategyRun(strategy, experts, helpers=[scripted("judge")])
    assert isinstance(await run.error(), InvalidRequestError)
    assert not run.experts["c"].requests
