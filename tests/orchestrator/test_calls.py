from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from experts.config import ScriptedExpertConfig
from experts.errors import ExpertError, ExpertTimeoutError
from experts.scripted import ScriptedExpert
from experts.types import Chunk, Usage, collect
from orchestrator.config import parse_config
from orchestrator.decision import RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.strategies.calls import Answer, answer, answers, play, stream_one
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.testing import StrategyRun, scripted
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    chat_request,
    client,
    config_content,
    eventually,
)


def priced(name: str, usd_per_mtok: float, **rule: object) -> ScriptedExpert:
    return ScriptedExpert(
        ScriptedExpertConfig.model_validate(
            {
                "name": name,
                "engine": "scripted",
                "output_usd_per_mtok": usd_per_mtok,
                "rules": [{"answer": f"{name} has four words", **rule}],
            }
        )
    )


def context(timeout_s: float = 5.0, max_cost_usd: float | None = None) -> RequestContext:
    return RequestContext(time.monotonic() + timeout_s, max_cost_usd)


async def test_a_call_is_noted_with_tokens_cost_and_time():
    experts = {"a": priced("a", 2.0)}
    seen = context()
    found = await answer("a", chat_request(), experts, seen, purpose="judge")
    assert found.text == "a has four words"
    (call,) = seen.calls
    assert (call.expert, call.purpose, call.error) == ("a", "judge", None)
    assert call.usage == Usage.of(1, 4)
    assert call.cost_usd == pytest.approx(4 * 2e-6)
    assert call.seconds is not None
    assert seen.usage == call.usage
    assert seen.cost_usd == call.cost_usd


async def test_what_was_broken_off_is_counted_by_what_was_written():
    experts = {"a": priced("a", 2.0, answer="x" * 400 + " y", chunk_delay_s=30)}
    seen = context()
    async with aclosing(stream_one("a", chat_request(), experts, seen)) as chunks:
        await anext(chunks)
        assert seen.calls[0].seconds is None
    (call,) = seen.calls
    assert call.error == "cancelled"
    assert call.usage.completion_tokens == 100
    assert call.cost_usd == pytest.approx(100 * 2e-6)


async def test_a_tool_call_that_breaks_off_is_counted_by_what_was_written():
    tools = [{"type": "function", "function": {"name": "weather"}}]
    content = {
        "name": "a",
        "engine": "scripted",
        "rules": [{"tool_call": {"name": "weather", "arguments": {"city": "x" * 400}}}],
        "faults": {"share": 1.0, "kinds": ["broken"]},
    }
    experts = {"a": ScriptedExpert(ScriptedExpertConfig.model_validate(content))}
    seen = context()
    with pytest.raises(ExpertError):
        await answer("a", chat_request(tools=tools), experts, seen)
    assert seen.calls[0].usage.completion_tokens == pytest.approx(50, abs=3)


async def test_a_call_that_is_cancelled_has_read_the_prompt():
    experts = {"a": scripted("a", delay_s=30)}
    seen = context()
    task = asyncio.ensure_future(answer("a", chat_request("word " * 80), experts, seen))
    await eventually(lambda: experts["a"].active == 1)
    task.cancel()
    await asyncio.wait({task})
    (call,) = seen.calls
    assert call.error == "cancelled"
    assert call.usage == Usage.of(100, 0)


async def test_errors_are_noted_by_name():
    experts = {"a": scripted("a", error="overloaded")}
    seen = context()
    with pytest.raises(ExpertError):
        await answer("a", chat_request(), experts, seen)
    assert seen.calls[0].error == "ExpertOverloadedError"


async def test_a_call_beyond_the_cost_limit_is_not_made():
    # Nobody has seen an answer of it: 256 tokens are expected, a twentieth of the price comes.
    experts = {"a": priced("a", 1000.0)}
    seen = context(max_cost_usd=0.3)
    await answer("a", chat_request(), experts, seen)
    await answer("a", chat_request(), experts, seen)
    assert seen.cost_usd == pytest.approx(0.008)
    tight = context(max_cost_usd=0.2)
    with pytest.raises(CostLimitError, match=r"'a' is expected to cost 0\.256 US dollars"):
        await answer("a", chat_request(), experts, tight)
    assert not tight.calls
    await answer("a", chat_request(max_tokens=10), experts, tight)
    assert tight.path == ["a"]


async def test_calls_made_together_share_the_cost_limit():
    experts = {name: priced(name, 1000.0, delay_s=0.02) for name in "abc"}
    seen = context(max_cost_usd=0.6)
    calls = [(name, chat_request()) for name in experts]
    found = [one async for one in answers(calls, experts, seen)]
    assert sorted(type(one).__name__ for one in found) == ["Answer", "Answer", "CostLimitError"]


async def test_fallback_goes_on_to_an_expert_that_is_cheap_enough():
    run = StrategyRun(FallbackStrategy(), [priced("dear", 1000.0), priced("cheap", 1.0)])
    run.context.max_cost_usd = 0.1
    assert (await run.answer()).text == "cheap has four words"
    assert run.context.path == ["cheap"]


async def test_answers_come_as_they_are_ready_and_failures_with_them():
    experts = {
        "slow": scripted("slow", delay_s=0.05),
        "quick": scripted("quick"),
        "broken": scripted("broken", error="failed", delay_s=0.02),
    }
    calls = [(name, chat_request(stream=True)) for name in experts]
    found = [one async for one in answers(calls, experts, context())]
    assert isinstance(found[1], ExpertError)
    assert [(one.expert, one.place) for one in found if isinstance(one, Answer)] == [
        ("quick", 1),
        ("slow", 0),
    ]
    assert not any(request.stream for one in experts.values() for request in one.requests)


async def test_closing_frees_those_who_have_not_answered():
    experts = {"quick": scripted("quick"), "slow": scripted("slow", delay_s=30)}
    seen = context()
    async with aclosing(
        answers([(name, chat_request()) for name in experts], experts, seen)
    ) as found:
        await anext(found)
        assert experts["slow"].active == 1
    assert experts["slow"].active == 0
    assert {call.expert: call.error for call in seen.calls} == {"quick": None, "slow": "cancelled"}


async def test_the_deadline_holds_for_calls_made_together():
    experts = {name: scripted(name, delay_s=30) for name in "ab"}
    calls = [(name, chat_request()) for name in experts]
    started = time.monotonic()
    found = [one async for one in answers(calls, experts, context(0.05))]
    assert all(isinstance(one, ExpertTimeoutError) for one in found)
    assert time.monotonic() - started < 5


async def test_a_played_answer_is_the_answer():
    expert = scripted("a", tool_call={"name": "weather", "arguments": {"city": "Rome"}})
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for request in (chat_request(n=2), chat_request(tools=tools)):
        found = await answer("a", request, {"a": expert}, context())

        async def chunks(found: Answer = found):
            for chunk in play(found.completion, found.completion.usage):
                yield chunk

        assert await collect(chunks()) == found.completion


class WaitingStrategy(FallbackStrategy):
    """Says that it waits, then answers."""

    async def run(self, request, decision, experts, context):
        """Stream progress, then the answer."""
        yield Chunk(progress="one of two\nis there")
        async with aclosing(super().run(request, decision, experts, context)) as chunks:
            async for chunk in chunks:
                yield chunk


def waiting_service(**rule: object):
    content = config_content()
    content["experts"] = [content["experts"][0] | {"rules": [{"answer": "at last", **rule}]}]
    content["routers"]["table"]["quality"] = {"small": 0.5}
    config = parse_config(content)
    route = config.routes["auto"].model_copy(update={"strategy": WaitingStrategy()})
    return client(build(config.model_copy(update={"routes": {"auto": route}})))


async def test_progress_is_a_comment_in_streams_and_nothing_in_plain_answers():
    streamed = await waiting_service().post(CHAT, json=chat_body(stream=True))
    assert streamed.text.startswith(": one of two is there\n\ndata: ")
    assert "at last" not in streamed.text.split("\n\n")[0]
    assert streamed.text.endswith("data: [DONE]\n\n")
    plain = (await waiting_service().post(CHAT, json=chat_body())).json()
    assert plain["choices"][0]["message"]["content"] == "at last"


async def test_an_error_after_progress_is_one_event():
    streamed = await waiting_service(error="failed").post(CHAT, json=chat_body(stream=True))
    assert streamed.status_code == 200
    comment, event, end = streamed.text.split("\n\n")
    assert comment.startswith(": ")
    assert '"code":"expert_failed"' in event.replace(" ", "")
    assert end == ""
    plain = await waiting_service(error="failed").post(CHAT, json=chat_body())
    assert plain.status_code == 502


async def test_a_client_that_leaves_while_it_waits_frees_everybody():
    experts = {"slow": scripted("slow", delay_s=30)}
    task = asyncio.ensure_future(answer("slow", chat_request(), experts, context()))
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait({task})
    assert experts["slow"].active == 0
