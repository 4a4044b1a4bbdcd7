"""Asking experts for strategies: within deadline and cost limit, noted, and freed in any case."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from experts.base import AnyRequest, Expert
from experts.errors import (
    ContextLengthError,
    ExpertError,
    ExpertFailedError,
    ExpertTimeoutError,
    InvalidRequestError,
    UnsupportedFeatureError,
)
from experts.types import ChatRequest, Chunk, Completion, Message, Usage, collect
from orchestrator.costs import ExpectedCosts
from orchestrator.decision import Call, RequestContext
from orchestrator.errors import CostLimitError
from orchestrator.pool import estimated_prompt_tokens, estimated_tokens
from orchestrator.strategies.answer_form import AnswerForm
from orchestrator.strategies.listening import Listening

__all__ = [
    "Answer",
    "Failure",
    "another_may_answer",
    "answer",
    "answers",
    "asking",
    "expected_usd",
    "freed",
    "held_back",
    "plain",
    "play",
    "stream_one",
]

Failure = ExpertError | CostLimitError


@dataclass(frozen=True, slots=True)
class Answer:
    """One expert's whole answer.

    Attributes:
        expert: Its name.
        completion: What it said.
        place: Position of the call among those made together.
    """

    expert: str
    completion: Completion
    place: int = 0

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.completion.text


def expected_usd(expert: Expert, request: AnyRequest) -> float:
    """What a call is expected to cost, by the card's prices and about as many tokens."""
    tokens = estimated_prompt_tokens(request)
    costs = ExpectedCosts.of([expert.card]).usd([tokens], token_limit=request.token_limit)
    return float(costs[0, 0])


async def stream_one(
    name: str,
    request: AnyRequest,
    experts: Mapping[str, Expert],
    context: RequestContext,
    *,
    purpose: str = "answer",
    check: bool = True,
) -> AsyncGenerator[Chunk, None]:
    """Stream one expert's answer.

    Which adapters it says it mixes is noted; whom it says it listens to is noted, and paid for.

    Args:
        name: Of the expert.
        request: What to answer.
        experts: By name.
        context: The request's deadline and cost limit.
        purpose: What the call is for.
        check: Whether an answer counts as failed if it has not the form that the request asks for:
            JSON, or arguments of a tool. Its last piece is not passed on then.

    Raises:
        ExpertError: It failed, or the deadline has passed.
        CostLimitError: The call is expected to cost more than is left; it was not made.
    """
    expert = experts[name]
    timeout_s = round(context.remaining_s, 3)  # whole milliseconds read better in errors
    if timeout_s <= 0:
        raise ExpertTimeoutError(name, 0.0)
    expected = 0.0
    if context.max_cost_usd is not None:
        expected = expected_usd(expert, request)
        if not context.affords(expected):
            raise CostLimitError(name, expected, context.max_cost_usd - context.cost_usd)
    call = Call(name, purpose, cost_usd=expected)
    context.calls.append(call)
    written, known, left = 0, False, False
    listening = Listening(call, request, experts, context)
    form = AnswerForm.of(request) if check else None
    try:
        async with aclosing(expert.stream(request, timeout_s=timeout_s)) as stream:
            async for chunk in stream:
                if chunk.peers is not None:
                    lost = listening.to(chunk.peers, written)
                    if lost and request.stream:
                        yield Chunk(progress=f"{name} goes on without {', '.join(lost)}")
                context.mixture = chunk.mixture or context.mixture
                written += len(chunk.text) + sum(map(_arguments, chunk.tool_calls or ()))
                if chunk.usage is not None:
                    call.usage, known = chunk.usage, True
                if form is not None and (fault := form.fault(chunk)):
                    raise ExpertFailedError(name, fault)
                yield chunk
    except BaseException as error:
        left = isinstance(error, asyncio.CancelledError | GeneratorExit)
        call.error = "cancelled" if left else type(error).__name__
        raise
    finally:
        call.seconds = time.monotonic() - call.started
        if not known and (written or left):
            # Whoever broke off has not said what it cost; whoever was stopped has read at least.
            read = estimated_prompt_tokens(request)
            call.usage = Usage.of(read, estimated_tokens("." * written))
        call.cost_usd = expert.card.usd(call.usage)
        listening.end()


def _arguments(tool_call: Mapping[str, Any]) -> int:
    """Characters of a piece of a tool call."""
    return len((tool_call.get("function") or {}).get("arguments") or "")


async def answer(
    name: str,
    request: AnyRequest,
    experts: Mapping[str, Expert],
    context: RequestContext,
    *,
    purpose: str = "answer",
) -> Answer:
    """One expert's whole answer; raises as ``stream_one`` does."""
    request = plain(request)
    async with aclosing(stream_one(name, request, experts, context, purpose=purpose)) as chunks:
        return Answer(name, await collect(chunks))


async def answers(
    calls: Sequence[tuple[str, AnyRequest]],
    experts: Mapping[str, Expert],
    context: RequestContext,
    *,
    purpose: str = "answer",
) -> AsyncGenerator[Answer | Failure, None]:
    """Ask several experts at the same time; answers and failures as they come.

    Closing the iterator cancels who has not answered yet, and waits until they are free.

    Args:
        calls: Names and requests; an answer's ``place`` is the position here.
        experts: By name.
        context: The request's deadline and cost limit.
        purpose: Of all calls.
    """
    tasks = {
        asyncio.ensure_future(answer(name, request, experts, context, purpose=purpose)): place
        for place, (name, request) in enumerate(calls)
    }
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                try:
                    found = task.result()
                except (ExpertError, CostLimitError) as error:
                    yield error
                else:
                    yield Answer(found.expert, found.completion, tasks[task])
    finally:
        await freed(tasks)


async def freed(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what still runs of the tasks, and wait until it has ended."""
    tasks = set(tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio would log it


async def held_back(
    chunks: AsyncGenerator[Chunk, None], request: AnyRequest, context: RequestContext
) -> AsyncGenerator[Chunk, None]:
    """A streamed answer as it comes, a plain one only when it is whole; its usage is that of all.

    So an error before the first chunk that is no progress means that nothing has left yet.
    """
    held: list[Chunk] = []
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.usage is not None:
                chunk.usage = context.usage
            if request.stream or chunk.progress is not None:
                yield chunk
            else:
                held.append(chunk)
    for chunk in held:
        yield chunk


def plain(request: AnyRequest) -> AnyRequest:
    """The request for a whole answer instead of a stream."""
    if not request.stream:
        return request
    return request.model_copy(update={"stream": False, "stream_options": None})


def asking(
    text: str, *, max_tokens: int | None = None, temperature: float | None = 0.0
) -> ChatRequest:
    """A request of a strategy's own: one user message."""
    return ChatRequest(
        messages=[Message(role="user", content=text)],
        max_tokens=max_tokens,
        temperature=temperature,
    )


def play(completion: Completion, usage: Usage) -> Iterable[Chunk]:
    """A whole answer as chunks, the last one with the usage."""
    for index, choice in enumerate(completion.choices):
        calls = [{"index": place, **call} for place, call in enumerate(choice.tool_calls)]
        yield Chunk(
            index,
            choice.text,
            calls or None,
            choice.finish_reason or "stop",
            choice.logprobs,
            sources=choice.sources,
        )
    yield Chunk(usage=usage)


def another_may_answer(error: Failure) -> bool:
    """Whether the error is the expert's: its engine, key, setup, context, abilities or price."""
    own_limits = (ContextLengthError, UnsupportedFeatureError)
    return isinstance(error, own_limits) or not isinstance(error, InvalidRequestError)
