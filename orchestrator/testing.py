"""Checks that every strategy must pass, for ours and for users' own.

They run a strategy over scripted experts, so they need no model, no network and no clock tricks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from experts.config import ScriptedExpertConfig
from experts.errors import ExpertError, ExpertTimeoutError, InvalidRequestError
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest, Chunk, Completion, Usage, collect
from orchestrator.decision import Decision, RequestContext
from orchestrator.strategies.base import Strategy

__all__ = ["StrategyCheck", "StrategyRun", "scripted", "several_checks", "strategy_checks"]

StrategyCheck = Callable[[Strategy], Awaitable[None]]


def scripted(name: str, **rule: Any) -> ScriptedExpert:
    """A scripted expert with one rule for all requests; its answer is its name unless given."""
    rule = {"answer": name, **rule}
    return ScriptedExpert(
        ScriptedExpertConfig.model_validate({"name": name, "engine": "scripted", "rules": [rule]})
    )


class StrategyRun:
    """One request to a strategy, with experts in the decision's order.

    Args:
        strategy: The strategy to run.
        experts: Whom it may ask, best first.
        stream: Whether the client wants a stream.
        timeout_s: Seconds for the request.
        max_cost_usd: Its cost limit.
        fields: Further fields of the request.
        decided: Further facts of the decision.
        helpers: Experts that the strategy names itself, such as a judge; those that are not given
            stand by and say their name.
    """

    def __init__(
        self,
        strategy: Strategy,
        experts: Sequence[ScriptedExpert],
        *,
        stream: bool = True,
        timeout_s: float = 5.0,
        max_cost_usd: float | None = None,
        fields: Mapping[str, Any] | None = None,
        decided: Mapping[str, Any] | None = None,
        helpers: Sequence[ScriptedExpert] = (),
    ) -> None:
        names = tuple(expert.card.name for expert in experts)
        self.experts = {expert.card.name: expert for expert in (*experts, *helpers)}
        for name in strategy.named_experts:
            self.experts.setdefault(name, scripted(name))
        self.context = RequestContext(time.monotonic() + timeout_s, max_cost_usd)
        request = ChatRequest.model_validate(
            {"messages": [{"role": "user", "content": "hello"}], "stream": stream, **(fields or {})}
        )
        decision = Decision(experts=names, strategy=strategy.type, **(decided or {}))
        self.chunks: AsyncGenerator[Chunk, None] = strategy.run(
            request, decision, self.experts, self.context
        )

    async def answer(self) -> Completion:
        """The whole answer."""
        return await collect(self.chunks)

    async def error(self) -> ExpertError:
        """The error it ends with; fails if it ends with none."""
        try:
            await self.answer()
        except ExpertError as error:
            return error
        raise AssertionError("the strategy ended without an error")


async def check_first_expert_answers(strategy: Strategy) -> None:
    """If nothing fails, the decision's first expert is the one that answers."""
    run = StrategyRun(strategy, [scripted("first"), scripted("second")])
    assert (await run.answer()).text == "first"
    assert run.context.path[-1] == "first"


async def check_path_is_known_with_first_chunk(strategy: Strategy) -> None:
    """Headers are sent with the first chunk, so the path must be complete by then."""
    run = StrategyRun(strategy, [scripted("first", answer="a b c"), scripted("second")])
    await anext(run.chunks)
    path = list(run.context.path)
    await run.answer()
    assert run.context.path == path == ["first"]


async def check_nothing_follows_an_error_after_the_first_chunk(strategy: Strategy) -> None:
    """What has left cannot be taken back: a later error is raised, nobody else is asked."""
    broken = scripted("first", answer="a b c", error="failed", error_after_chunks=1)
    run = StrategyRun(strategy, [broken, scripted("second")])
    assert (await anext(run.chunks)).text == "a"
    await run.error()
    assert run.context.path == ["first"]
    assert not run.experts["second"].requests


async def check_wrong_requests_are_refused_at_once(strategy: Strategy) -> None:
    """A wrong request would meet every expert: the others are not asked."""
    run = StrategyRun(strategy, [scripted("first", error="invalid"), scripted("second")])
    assert isinstance(await run.error(), InvalidRequestError)
    assert not run.experts["second"].requests


async def check_errors_are_raised_when_nobody_answers(strategy: Strategy) -> None:
    """The last error is raised, and the path names everybody who was asked."""
    experts = [scripted(name, error="unavailable") for name in ("first", "second")]
    for stream in (True, False):
        run = StrategyRun(strategy, experts, stream=stream)
        error = await run.error()
        assert error.retryable
        assert run.context.path[-1] in str(error)


async def check_deadline_is_shared(strategy: Strategy) -> None:
    """However many experts are asked, the request ends at its own deadline."""
    slow = [scripted(name, delay_s=30) for name in ("first", "second", "third")]
    started = time.monotonic()
    assert isinstance(await StrategyRun(strategy, slow, timeout_s=0.1).error(), ExpertTimeoutError)
    assert time.monotonic() - started < 1


async def check_nobody_is_asked_after_the_deadline(strategy: Strategy) -> None:
    """A request that comes too late costs nothing."""
    run = StrategyRun(strategy, [scripted("first")], timeout_s=0)
    assert isinstance(await run.error(), ExpertTimeoutError)
    assert not run.experts["first"].requests


async def check_closing_frees_the_expert(strategy: Strategy) -> None:
    """A client that leaves cancels its experts."""
    run = StrategyRun(strategy, [scripted("first", answer="a b c", chunk_delay_s=30)])
    await anext(run.chunks)
    assert run.experts["first"].active == 1
    await run.chunks.aclose()
    assert run.experts["first"].active == 0


async def check_experts_are_free_at_the_end(strategy: Strategy) -> None:
    """Neither an answer nor an error leaves anybody busy."""
    for rule in ({}, {"error": "invalid"}, {"error": "failed", "error_after_chunks": 1}):
        run = StrategyRun(strategy, [scripted("first", **rule), scripted("second")])
        try:
            await run.answer()
        except ExpertError:
            pass
        assert all(expert.active == 0 for expert in run.experts.values())


async def check_plain_and_streamed_answers_are_equal(strategy: Strategy) -> None:
    """A plain answer is the collected stream."""
    experts = [scripted("first", answer="one two three"), scripted("second")]
    streamed = await StrategyRun(strategy, experts).answer()
    plain = await StrategyRun(strategy, experts, stream=False).answer()
    assert streamed == plain


def strategy_checks() -> list[StrategyCheck]:
    """All checks; use with ``pytest.mark.parametrize``."""
    return [
        check_first_expert_answers,
        check_path_is_known_with_first_chunk,
        check_nothing_follows_an_error_after_the_first_chunk,
        check_wrong_requests_are_refused_at_once,
        check_errors_are_raised_when_nobody_answers,
        check_deadline_is_shared,
        check_nobody_is_asked_after_the_deadline,
        check_closing_frees_the_expert,
        check_experts_are_free_at_the_end,
        check_plain_and_streamed_answers_are_equal,
    ]


async def check_the_first_wins_where_nothing_speaks_against_it(strategy: Strategy) -> None:
    """Answers of which none is known to be better: the decision's first expert's is given."""
    run = StrategyRun(strategy, [scripted("first"), scripted("second")])
    assert (await run.answer()).text == "first"
    assert run.context.expert == "first"


async def check_whose_answer_it_is_is_known_with_its_first_chunk(strategy: Strategy) -> None:
    """Headers are sent with the first chunk: who is asked and who answers is settled by then."""
    run = StrategyRun(strategy, [scripted("first", answer="a b c"), scripted("second")])
    while (await anext(run.chunks)).progress is not None:
        assert run.context.expert is None
    path, expert = list(run.context.path), run.context.expert
    await run.answer()
    assert (run.context.path, run.context.expert) == (path, expert)
    assert expert == "first"


async def check_an_answer_that_breaks_off_is_none(strategy: Strategy) -> None:
    """Nothing of an answer leaves before it is whole, so that others can take its place."""
    broken = scripted("first", answer="a b c", error="failed", error_after_chunks=1)
    for stream in (True, False):
        run = StrategyRun(strategy, [broken, scripted("second")], stream=stream)
        assert (await run.answer()).text == "second"
        assert run.context.expert == "second"


async def check_wrong_requests_are_refused_while_others_are_busy(strategy: Strategy) -> None:
    """A wrong request would meet every expert: who was asked with it is freed."""
    experts = [scripted("first", error="invalid"), scripted("second", delay_s=30)]
    run = StrategyRun(strategy, experts)
    assert isinstance(await run.error(), InvalidRequestError)
    assert all(expert.active == 0 for expert in run.experts.values())


async def check_closing_frees_all_experts(strategy: Strategy) -> None:
    """A client that leaves cancels everybody who was asked."""
    run = StrategyRun(strategy, [scripted("first", delay_s=30), scripted("second", delay_s=30)])
    waiting = asyncio.ensure_future(anext(run.chunks))
    await asyncio.sleep(0.05)
    assert all(run.experts[name].active for name in ("first", "second"))
    waiting.cancel()
    await asyncio.wait({waiting})
    await run.chunks.aclose()
    assert all(expert.active == 0 for expert in run.experts.values())
    assert all(call.seconds is not None for call in run.context.calls)


async def check_usage_is_that_of_all_calls(strategy: Strategy) -> None:
    """What is paid for is the sum, and the last chunk says so."""
    run = StrategyRun(strategy, [scripted("first"), scripted("second")])
    usage = (await run.answer()).usage
    assert usage == run.context.usage == sum((c.usage for c in run.context.calls), Usage())
    assert len(run.context.calls) > 1


async def check_requests_for_several_answers_fall_back(strategy: Strategy) -> None:
    """Several answers are not composed: one expert gives them all."""
    experts = [scripted("first", error="unavailable"), scripted("second"), scripted("third")]
    run = StrategyRun(strategy, experts, fields={"n": 2})
    assert [choice.text for choice in (await run.answer()).choices] == ["second"] * 2
    assert run.context.path == ["first", "second"]


def several_checks() -> list[StrategyCheck]:
    """All checks of strategies that ask several before the first byte leaves.

    They have several experts in the path, free all of them, and can still replace an answer that
    breaks off; the checks that say otherwise have others in their place.
    """
    replaced = {
        check_first_expert_answers,
        check_path_is_known_with_first_chunk,
        check_nothing_follows_an_error_after_the_first_chunk,
        check_wrong_requests_are_refused_at_once,
        check_closing_frees_the_expert,
    }
    return [
        *(check for check in strategy_checks() if check not in replaced),
        check_the_first_wins_where_nothing_speaks_against_it,
        check_whose_answer_it_is_is_known_with_its_first_chunk,
        check_an_answer_that_breaks_off_is_none,
        check_wrong_requests_are_refused_while_others_are_busy,
        check_closing_frees_all_experts,
        check_usage_is_that_of_all_calls,
        check_requests_for_several_answers_fall_back,
    ]
