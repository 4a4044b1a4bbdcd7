from __future__ import annotations

import pytest

from experts.errors import ExpertOverloadedError, ExpertUnavailableError
from orchestrator.config import ConfigError, parse_config
from orchestrator.strategies.base import Strategy
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.latent import LatentStrategy
from orchestrator.strategies.mix import MixStrategy
from orchestrator.strategies.single import SingleStrategy
from orchestrator.testing import StrategyCheck, StrategyRun, scripted, strategy_checks
from tests.orchestrator.support import config_content

STRATEGIES: list[Strategy] = [
    SingleStrategy(),
    FallbackStrategy(),
    LatentStrategy(type="latent"),
    MixStrategy(type="mix", base="first"),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.type)
@pytest.mark.parametrize("check", strategy_checks(), ids=lambda check: check.__name__)
async def test_strategy_passes_the_battery(strategy: Strategy, check: StrategyCheck):
    await check(strategy)


async def test_single_never_asks_a_second_expert():
    run = StrategyRun(SingleStrategy(), [scripted("a", error="unavailable"), scripted("b")])
    assert isinstance(await run.error(), ExpertUnavailableError)
    assert run.context.path == ["a"]


@pytest.mark.parametrize("error", ["unavailable", "timeout", "overloaded", "failed", "auth"])
@pytest.mark.parametrize("stream", [True, False])
async def test_fallback_asks_the_next_after_an_experts_own_error(error: str, stream: bool):
    experts = [scripted("a", error=error), scripted("b", error=error), scripted("c")]
    run = StrategyRun(FallbackStrategy(), experts, stream=stream)
    assert (await run.answer()).text == "c"
    assert run.context.path == ["a", "b", "c"]


async def test_fallback_raises_the_last_error_after_its_attempts():
    experts = [scripted("a", error="failed"), scripted("b", error="overloaded"), scripted("c")]
    run = StrategyRun(FallbackStrategy(max_attempts=2), experts)
    assert isinstance(await run.error(), ExpertOverloadedError)
    assert run.context.path == ["a", "b"]


@pytest.mark.parametrize("pieces", [1, 3, 5])
async def test_plain_answers_fall_back_up_to_their_end(pieces: int):
    broken = scripted("a", answer="1 2 3 4 5 6", error="failed", error_after_chunks=pieces)
    run = StrategyRun(FallbackStrategy(), [broken, scripted("b")], stream=False)
    assert (await run.answer()).text == "b"
    assert run.context.path == ["a", "b"]


async def test_what_was_broken_off_before_counts_too():
    broken = scripted("a", answer="1 2 3 4 5 6", error="failed", error_after_chunks=3)
    run = StrategyRun(FallbackStrategy(), [broken, scripted("b")], stream=False)
    usage = (await run.answer()).usage
    first, second = (call.usage for call in run.context.calls)
    assert first.completion_tokens > 0
    assert usage == run.context.usage
    assert usage.completion_tokens == first.completion_tokens + second.completion_tokens


async def test_fallback_does_not_start_an_attempt_after_the_deadline():
    experts = [scripted("a", delay_s=30), scripted("b")]
    run = StrategyRun(FallbackStrategy(), experts, timeout_s=0.05)
    assert "'a'" in str(await run.error())
    assert not run.experts["b"].requests


async def test_attempts_share_the_time_that_is_left():
    experts = [scripted("a", delay_s=0.15, error="failed"), scripted("b", delay_s=0.15)]
    run = StrategyRun(FallbackStrategy(), experts, timeout_s=0.25)
    assert "'b'" in str(await run.error())


@pytest.mark.parametrize(
    ("chosen", "path"),
    [("a", ["a", "c"]), ("b", ["b"]), ("c", ["c", "a", "b"])],
)
async def test_who_stands_in_depends_on_who_was_chosen(chosen: str, path: list[str]):
    strategy = FallbackStrategy(fallbacks={"a": ("gone", "c"), "b": ()})
    order = [chosen, *(name for name in "abc" if name != chosen)]
    run = StrategyRun(strategy, [scripted(name, error="failed") for name in order])
    await run.error()
    assert run.context.path == path


def test_a_stand_in_must_exist():
    content = config_content()
    content["routes"]["auto"]["strategy"] = {"fallbacks": {"large": ["medum"]}}
    with pytest.raises(
        ConfigError, match="strategy of route 'auto' names the unknown expert 'medum'"
    ):
        parse_config(content)
