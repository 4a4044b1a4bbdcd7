from __future__ import annotations

import asyncio
import json
import time

import openai
import pytest
from pydantic import ValidationError

from experts.errors import ExpertTimeoutError, ExpertUnavailableError
from orchestrator.errors import CostLimitError
from orchestrator.http.app import create_app
from orchestrator.strategies.hedge import KEPT_TIMES, HedgeStrategy
from tests.orchestrator.composing import CITY, TOOL, Run, battery, scripted
from tests.orchestrator.support import build, config_with_rules, eventually, running_server


def hedge(**fields):
    return HedgeStrategy.model_validate(
        {"type": "hedge", "wait_s": 0.02, "max_extra_share": 1, **fields}
    )


async def nothing_follows_a_late_error(strategy):
    # One that breaks at once has not begun before anybody could look: the second is asked then.
    slowly = {"answer": "a b c", "chunk_delay_s": 0.05, "error": "failed", "error_after_chunks": 1}
    run = Run(strategy, [scripted("first", slowly), scripted("second")])
    assert (await anext(run.chunks)).text == "a"
    await run.error()
    assert run.context.path == ["first"]


CHECKS = battery(check_nothing_follows_an_error_after_the_first_chunk=nothing_follows_a_late_error)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_hedge_passes_the_battery(check):
    await check(HedgeStrategy(type="hedge"))


SLOW = {"answer": "slow and late", "delay_s": 30}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_slow_expert_is_overtaken_cancelled_and_freed(stream):
    run = Run(hedge(), [scripted("a", SLOW), scripted("b")], stream=stream)
    assert (await run.answer()).text == "b"
    assert run.context.expert == "b"
    assert (run.calls("answer"), run.calls("hedge")) == (["a"], ["b"])
    assert run.context.calls[0].error == "cancelled"
    assert run.active == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_the_first_still_wins_if_it_begins_first(stream):
    experts = [scripted("a", {"answer": "a a a", "delay_s": 0.1}), scripted("b", SLOW)]
    run = Run(hedge(), experts, stream=stream)
    assert (await run.answer()).text == "a a a"
    assert run.context.expert == "a"
    assert run.context.path == ["a", "b"]
    assert run.active == 0


async def test_a_stream_is_won_by_its_first_chunk_and_a_plain_answer_by_its_last():
    def experts():
        crawls = scripted("a", {"answer": "1 2 3 4", "delay_s": 0.05, "chunk_delay_s": 0.1})
        return [crawls, scripted("b", {"answer": "b", "delay_s": 0.1})]

    assert (await Run(hedge(), experts()).answer()).text == "1 2 3 4"
    assert (await Run(hedge(), experts(), stream=False).answer()).text == "b"


async def test_nobody_else_is_asked_in_time():
    run = Run(hedge(wait_s=5), [scripted("a"), scripted("b")])
    await run.answer()
    assert run.context.path == ["a"]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_early_error_asks_the_second_at_once(stream):
    experts = [scripted("a", {"error": "unavailable"}), scripted("b")]
    run = Run(hedge(wait_s=30, max_extra_share=0), experts, stream=stream)
    assert (await run.answer()).text == "b"
    assert run.calls("answer") == ["a", "b"]


async def test_an_error_of_one_leaves_the_other():
    fails = scripted("b", {"error": "failed"})
    run = Run(hedge(), [scripted("a", {"answer": "a", "delay_s": 0.15}), fails])
    assert (await run.answer()).text == "a"
    late = scripted("a", {"error": "failed", "delay_s": 0.1})
    run = Run(hedge(), [late, scripted("b", {"answer": "b", "delay_s": 0.2})])
    assert (await run.answer()).text == "b"


async def test_the_last_error_is_raised_if_both_fail():
    slow = scripted("a", {"error": "failed", "delay_s": 0.05})
    error = await Run(hedge(), [slow, scripted("b", {"error": "unavailable"})]).error()
    assert not isinstance(error, ExpertUnavailableError)
    assert "'a'" in str(error)


async def test_two_at_most_are_asked():
    run = Run(hedge(), [scripted(name, {"error": "failed"}) for name in "abc"])
    await run.error()
    assert run.context.path == ["a", "b"]


async def test_a_stream_that_broke_before_anybody_looked_has_not_begun():
    breaks = scripted("a", {"answer": "1 2", "error": "failed", "error_after_chunks": 1})
    run = Run(hedge(), [breaks, scripted("b")])
    assert (await run.answer()).text == "b"


async def test_a_loser_that_is_too_dear_is_not_asked():
    dear = scripted("b", output_usd_per_mtok=1e6)
    run = Run(hedge(), [scripted("a", {"answer": "a", "delay_s": 0.1}), dear], max_cost=0.01)
    assert (await run.answer()).text == "a"
    assert not dear.requests
    run = Run(hedge(), [dear], max_cost=0.01)
    assert isinstance(await run.error(), CostLimitError)


async def test_the_same_expert_may_be_asked_again():
    run = Run(hedge(again=True), [scripted("a", {"answer": "a", "delay_s": 0.1}), scripted("b")])
    assert (await run.answer()).text == "a"
    assert run.context.path == ["a", "a"]


async def test_usage_counts_the_loser_too():
    crawls = scripted("a", {"answer": "1 2 3", "chunk_delay_s": 0.3, "delay_s": 0.1})
    run = Run(hedge(), [crawls, scripted("b", {"answer": "b", "delay_s": 30})])
    *_, last = await run.pieces()
    assert last.usage == run.context.usage
    assert all(call.seconds is not None for call in run.context.calls)


async def test_tool_calls_are_one_experts():
    rules = [
        {"tool_call": {"name": "weather", "arguments": {"by": n}}, "delay_s": 0.05} for n in "ab"
    ]
    run = Run(hedge(wait_s=0), [scripted("a", rules[0]), scripted("b", rules[1])], tools=[TOOL])
    calls = (await run.answer()).choices[0].tool_calls
    assert [c["function"]["arguments"] for c in calls] == [f'{{"by": "{run.context.expert}"}}']


async def test_no_more_than_the_extra_share_is_hedged():
    strategy = hedge(wait_s=0.001, max_extra_share=0.1)
    asked = 0
    for _ in range(30):
        run = Run(strategy, [scripted("a", {"delay_s": 0.005}), scripted("b")])
        await run.answer()
        asked += len(run.calls("hedge"))
    assert asked == 3


async def test_the_wait_is_the_95th_percentile_of_what_was_seen():
    strategy = hedge(wait_s=None, first_wait_s=7)
    request = Run(strategy, [scripted("a")]).request
    seen = strategy._seen
    for time_s in range(19):
        seen.note("a", True, time_s)
    assert strategy._wait_s("a", request) == 7
    seen.note("a", True, 100.0)
    assert strategy._wait_s("a", request) == 18
    assert strategy._wait_s("a", request.model_copy(update={"stream": False})) == 7
    for _ in range(KEPT_TIMES):
        seen.note("a", True, 1.0)
    assert strategy._wait_s("a", request) == 1
    assert len(seen.times_s["a", True]) == KEPT_TIMES


async def test_times_are_noted_of_winners_and_of_losers():
    strategy = hedge()
    await Run(strategy, [scripted("a", SLOW), scripted("b")]).answer()
    times = strategy._seen.times_s
    assert times["a", True][0] >= 0.02
    assert times["b", True][0] < 5


async def test_what_was_seen_is_no_part_of_the_config():
    strategy = hedge()
    await Run(strategy, [scripted("a")]).answer()
    assert strategy == hedge()
    assert hash(strategy) == hash(hedge())
    assert strategy.model_dump() == hedge().model_dump()


async def test_a_deadline_ends_both():
    run = Run(hedge(), [scripted("a", SLOW), scripted("b", SLOW)], timeout_s=0.1)
    assert isinstance(await run.error(), ExpertTimeoutError)
    assert run.active == 0


async def test_a_client_that_leaves_frees_both():
    run = Run(hedge(), [scripted("a", SLOW), scripted("b", SLOW)])
    task = asyncio.ensure_future(run.answer())
    await eventually(lambda: run.active == 2)
    started = time.monotonic()
    task.cancel()
    await asyncio.wait({task})
    assert run.active == 0
    assert time.monotonic() - started < 5


def test_shares_are_shares():
    with pytest.raises(ValidationError, match="max_extra_share"):
        hedge(max_extra_share=1.5)


ROUTES = {
    "hedge": {
        "router": "table",
        "strategy": {"type": "hedge", "wait_s": 0.02, "max_extra_share": 1},
    }
}
RULES = {
    "large": {"delay_s": 30},
    "medium": {
        "answer": '{"city": "Graz"}',
        "tool_call": {"name": "weather", "arguments": {"city": "Graz"}},
    },
}
ASK = {"model": "hedge", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def openai_client():
    with (
        running_server(create_app(build(config_with_rules(RULES, routes=ROUTES)))) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_openai_clients_get_a_hedges_json_and_see_who_won(openai_client):
    raw = openai_client.chat.completions.with_raw_response.create(**ASK, response_format=CITY)
    assert json.loads(raw.parse().choices[0].message.content) == {"city": "Graz"}
    assert raw.headers["x-collegium-path"] == "large>medium"
    assert raw.headers["x-collegium-model"] == "medium"


def test_streams_say_who_won_before_their_first_chunk(openai_client):
    create = openai_client.chat.completions.with_streaming_response.create
    with create(**ASK, stream=True) as response:
        assert response.headers["x-collegium-model"] == "medium"
