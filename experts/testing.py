"""Checks every expert must pass, for our own engines and for those others write.

    @pytest.mark.parametrize(("name", "check"), list(expert_checks()))
    async def test_my_expert(name, check):
        await check(my_expert)

They assume no particular text, so they hold for scripts and for models alike. A check that does not
apply to an expert's card returns at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from experts.base import Expert
from experts.errors import ExpertError, ExpertTimeoutError, InvalidRequestError
from experts.types import Capability, ChatRequest, Chunk, Completion, CompletionRequest, collect

__all__ = ["ExpertCheck", "expert_checks"]

ExpertCheck = Callable[[Expert], Awaitable[None]]

_TIMEOUT_S = 120.0
_LONG_PROMPT = "Count from one to one hundred in words, and name each number."
_LONG_TOKENS = 48
_ABANDONED_STREAMS = 20
# Shorter answers say nothing about who waited for whom.
_CONCLUSIVE_TOKENS = 8
_CONCLUSIVE_S = 0.2


def expert_checks() -> Iterator[tuple[str, ExpertCheck]]:
    """Yield name and check, in the order of their cost.

    Each check takes an open expert, leaves it open, and raises AssertionError if it misbehaves.
    """
    for check in (
        check_card_is_stable,
        check_is_healthy,
        check_streams_text_then_finish_reason_then_usage,
        check_streamed_answer_is_collected_answer,
        check_greedy_answers_are_deterministic,
        check_same_seed_gives_same_answer,
        check_gives_n_choices,
        check_stop_text_never_appears,
        check_max_tokens_is_respected,
        check_logprobs_cover_all_tokens,
        check_text_completion,
        check_choice_is_kept_to,
        check_unicode_survives,
        check_unsupported_features_are_refused,
        check_too_long_a_prompt_is_refused,
        check_concurrent_requests_all_finish,
        check_short_answer_does_not_wait_for_long_one,
        check_abandoned_streams_free_the_expert,
        check_timeout_raises_timeout_error,
    ):
        yield check.__name__.removeprefix("check_"), check


async def check_card_is_stable(expert: Expert) -> None:
    """The card is the same whenever one looks."""
    assert isinstance(expert, Expert)
    assert expert.card.name
    assert expert.card == expert.card


async def check_is_healthy(expert: Expert) -> None:
    """An expert that can answer says so, as often as asked."""
    await expert.check_health()
    await expert.check_health()


async def check_streams_text_then_finish_reason_then_usage(expert: Expert) -> None:
    """Text, then one finish reason as the answer's last chunk, usage in the last chunk of all."""
    chunks = [chunk async for chunk in _stream(expert)]
    finished = [at for at, chunk in enumerate(chunks) if chunk.finish_reason]
    assert len(finished) == 1, f"expected one finish_reason, got {len(finished)}"
    assert not any(chunk.text or chunk.tool_calls for chunk in chunks[finished[0] + 1 :])
    usage = chunks[-1].usage
    assert usage is not None, "the last chunk carries no usage"
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def check_streamed_answer_is_collected_answer(expert: Expert) -> None:
    """A streamed and a plain answer have the same text."""
    chunks = [chunk async for chunk in _stream(expert)]
    collected = await _ask(expert)
    assert "".join(chunk.text for chunk in chunks) == collected.text


async def check_greedy_answers_are_deterministic(expert: Expert) -> None:
    """Temperature 0 gives the same answer twice."""
    first, second = await _ask(expert), await _ask(expert)
    assert first.choices == second.choices


async def check_same_seed_gives_same_answer(expert: Expert) -> None:
    """A seed fixes what is drawn."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7}
    first, second = await _ask(expert, **options), await _ask(expert, **options)
    assert first.choices == second.choices


async def check_gives_n_choices(expert: Expert) -> None:
    """``n`` answers, each with its own finish reason."""
    chunks = [chunk async for chunk in _stream(expert, n=3, temperature=1.0)]
    assert {chunk.index for chunk in chunks} == {0, 1, 2}
    finished = sorted(chunk.index for chunk in chunks if chunk.finish_reason)
    assert finished == [0, 1, 2]


async def check_stop_text_never_appears(expert: Expert) -> None:
    """The answer ends just before the stop text, of which no part is sent."""
    whole = (await _ask(expert)).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    if not stop:
        return
    stopped = await _ask(expert, stop=[stop])
    assert stopped.text == whole[: whole.find(stop)]
    assert stopped.choices[0].finish_reason == "stop"


async def check_max_tokens_is_respected(expert: Expert) -> None:
    """No more tokens than asked for; an answer cut short says ``length``."""
    answer = await _ask(expert, _LONG_PROMPT, max_tokens=2)
    assert answer.usage.completion_tokens <= 2
    if answer.usage.completion_tokens == 2 and answer.choices[0].finish_reason != "length":
        longer = await _ask(expert, _LONG_PROMPT, max_tokens=8)
        assert longer.usage.completion_tokens <= 2, "cut short, but finish_reason is not 'length'"


async def check_logprobs_cover_all_tokens(expert: Expert) -> None:
    """One log-probability per token; the token that ends an answer may be left out."""
    if "logprobs" not in expert.card.capabilities:
        return
    answer = await _ask(expert, max_tokens=6, logprobs=True, top_logprobs=1)
    logprobs, tokens = answer.choices[0].logprobs, answer.usage.completion_tokens
    if tokens == 0:
        return
    assert logprobs is not None, "the card promises logprobs, but none came"
    entries = logprobs["content"]
    allowed = {tokens} if answer.choices[0].finish_reason == "length" else {tokens - 1, tokens}
    assert len(entries) in allowed, f"{len(entries)} log-probabilities for {tokens} tokens"
    for entry in entries:
        assert math.isfinite(entry["logprob"])
        assert entry["logprob"] <= 1e-6


async def check_text_completion(expert: Expert) -> None:
    """Text completions answer each prompt of a list."""
    if "completion" not in expert.card.capabilities:
        return
    request = CompletionRequest(prompt=["One, two,", "Red, green,"], max_tokens=4, temperature=0)
    answer = await collect(expert.stream(request, timeout_s=_TIMEOUT_S))
    assert len(answer.choices) == 2
    assert all(choice.finish_reason for choice in answer.choices)


async def check_choice_is_kept_to(expert: Expert) -> None:
    """An answer restricted to some texts is one of them."""
    if "choice" not in expert.card.capabilities:
        return
    choices = ["crimson", "ultramarine"]
    answer = await _ask(expert, structured_outputs={"choice": choices})
    assert answer.text in choices


async def check_unicode_survives(expert: Expert) -> None:
    """Characters of several bytes go in and come out whole."""
    prompt = "Repeat: naïve 日本語 🎉 Ωμέγα"
    chunks = [chunk async for chunk in _stream(expert, prompt)]
    for chunk in chunks:
        chunk.text.encode()
    assert "".join(chunk.text for chunk in chunks) == (await _ask(expert, prompt)).text


async def check_unsupported_features_are_refused(expert: Expert) -> None:
    """What the card does not promise is refused with an error that names it, never ignored."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asking: dict[Capability, dict[str, Any]] = {
        "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "json_schema": {"response_format": {"type": "json_object"}},
        "logprobs": {"logprobs": True},
        "images": {"messages": [{"role": "user", "content": [picture]}]},
    }
    for capability, fields in asking.items():
        if capability in expert.card.capabilities:
            continue
        try:
            await _ask(expert, **fields)
        except InvalidRequestError:
            continue
        raise AssertionError(f"the card does not promise {capability!r}, yet it was accepted")


async def check_too_long_a_prompt_is_refused(expert: Expert) -> None:
    """A prompt beyond the context is refused before it costs anything."""
    limit = expert.card.context_length
    if limit is None:
        return
    try:
        await _ask(expert, "word " * (limit + 1))
    except InvalidRequestError:
        return
    raise AssertionError(f"a prompt of more than {limit} tokens was accepted")


async def check_concurrent_requests_all_finish(expert: Expert) -> None:
    """Eight at a time, each with an answer of its own."""
    prompts = [f"Say the number {number}." for number in range(8)]
    answers = await asyncio.gather(*(_ask(expert, prompt) for prompt in prompts))
    assert all(answer.choices[0].finish_reason for answer in answers)


async def check_short_answer_does_not_wait_for_long_one(expert: Expert) -> None:
    """A short answer asked for later is done before a long one that is being written."""
    began = asyncio.Event()

    async def long_answer() -> tuple[Completion, float]:
        async def watched() -> AsyncIterator[Chunk]:
            async for chunk in _stream(expert, _LONG_PROMPT, max_tokens=_LONG_TOKENS):
                began.set()
                yield chunk

        return await collect(watched()), time.monotonic()

    task = asyncio.create_task(long_answer())
    waiting = asyncio.create_task(began.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    started = time.monotonic()
    await _ask(expert, "Hi", max_tokens=1)
    short_done = time.monotonic()
    long, long_done = await task
    waiting.cancel()
    if long.usage.completion_tokens < _CONCLUSIVE_TOKENS or long_done - started < _CONCLUSIVE_S:
        return
    assert short_done < long_done, "the short answer waited for the long one"


async def check_abandoned_streams_free_the_expert(expert: Expert) -> None:
    """Streams closed after their first chunk hold no place: later requests are answered."""

    async def abandon() -> None:
        stream = _stream(expert, _LONG_PROMPT, max_tokens=_LONG_TOKENS)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # async generators have it

    await asyncio.gather(*(abandon() for _ in range(_ABANDONED_STREAMS)))
    answer = await _ask(expert)
    assert answer.choices[0].finish_reason


async def check_timeout_raises_timeout_error(expert: Expert) -> None:
    """Past the deadline there is an ExpertTimeoutError and nothing else; then it goes on working.

    An expert that answers within a millisecond has kept its deadline.
    """
    request = _chat(_LONG_PROMPT, max_tokens=_LONG_TOKENS)
    try:
        await collect(expert.stream(request, timeout_s=0.001))
    except ExpertTimeoutError:
        pass
    except Exception as error:
        kind = "an expert error" if isinstance(error, ExpertError) else "no expert error at all"
        raise AssertionError(f"expected ExpertTimeoutError, got {error!r}, {kind}") from error
    assert (await _ask(expert)).choices[0].finish_reason


def _chat(prompt: str = "Name two colours.", **fields: Any) -> ChatRequest:
    defaults = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 12,
        "temperature": 0,
    }
    return ChatRequest.model_validate({**defaults, **fields})


def _stream(
    expert: Expert, prompt: str = "Name two colours.", **fields: Any
) -> AsyncIterator[Chunk]:
    return expert.stream(_chat(prompt, stream=True, **fields), timeout_s=_TIMEOUT_S)


async def _ask(expert: Expert, prompt: str = "Name two colours.", **fields: Any) -> Completion:
    return await collect(expert.stream(_chat(prompt, **fields), timeout_s=_TIMEOUT_S))
