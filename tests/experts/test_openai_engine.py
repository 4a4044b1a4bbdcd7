from __future__ import annotations

import asyncio
import socket
import time

import pytest

from experts import errors
from experts.config import OpenAIExpertConfig, ScriptedToolCall, ScriptRule
from experts.openai_engine import OpenAIExpert
from experts.types import ChatRequest, CompletionRequest, collect
from tests.experts.upstream import serving


@pytest.fixture(scope="module")
def upstream():
    rules = (
        ScriptRule(match="slow", answer="one two three", chunk_delay_s=0.2),
        ScriptRule(match="late", delay_s=1),
        ScriptRule(match="break", answer="a b c d", error="failed", error_after_chunks=2),
        ScriptRule(match="invalid", error="invalid"),
        ScriptRule(match="tool", tool_call=ScriptedToolCall(name="f", arguments={"x": 1})),
        ScriptRule(answer="Answer to {text}"),
    )
    with serving(*rules) as server:
        yield server


@pytest.fixture
async def expert(upstream):
    upstream.bodies.clear()
    upstream.headers.clear()
    upstream.statuses.clear()
    upstream.retry_after = "0"
    await _until(lambda: upstream.expert.active == 0)
    opened = _open(upstream)
    yield opened
    await opened.aclose()


def _open(upstream, **options):
    return OpenAIExpert(
        OpenAIExpertConfig(
            name="remote", engine="openai", base_url=upstream.url, model="their-name", **options
        )
    )


def _chat(text="hello", **fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], **fields})


async def _ask(expert, request=None, timeout_s=20.0):
    return await collect(expert.stream(request or _chat(), timeout_s=timeout_s))


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_and_completion_answers_arrive(expert, stream):
    chat = await _ask(expert, _chat("x", logprobs=True, n=2, stream=stream))
    assert [choice.text for choice in chat.choices] == ["Answer to x"] * 2
    assert len(chat.choices[0].logprobs["content"]) == 3
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (1, 6)
    plain = await _ask(expert, CompletionRequest(prompt="y", logprobs=1, stream=stream))
    assert plain.text == "Answer to y"
    assert plain.choices[0].logprobs["tokens"] == ["Answer", " to", " y"]


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls_arrive(expert, stream):
    tools = [{"type": "function", "function": {"name": "f"}}]
    choice = (await _ask(expert, _chat("use the tool", tools=tools, stream=stream))).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.tool_calls[0]["function"] == {"name": "f", "arguments": '{"x": 1}'}


async def test_forwards_given_and_unknown_fields_and_nothing_else(expert, upstream):
    fields = {"model": "auto", "top_p": 0.5, "min_p": 0.1}
    await _ask(expert, _chat("x", **fields, stream_options={"include_usage": False}))
    await _ask(expert, _chat("x", **fields, stream=True))
    wanted = {
        "model": "their-name",
        "messages": [{"role": "user", "content": "x"}],
        "top_p": 0.5,
        "min_p": 0.1,
    }
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert upstream.bodies == [wanted, wanted | streamed]


async def test_default_max_tokens_is_sent_if_configured(upstream, expert):
    limited = _open(upstream, default_max_tokens=2)
    assert (await _ask(limited)).choices[0].finish_reason == "length"
    await limited.aclose()


async def test_key_and_headers_are_sent(upstream, expert, monkeypatch):
    monkeypatch.setenv("REMOTE_KEY", "secret")
    keyed = _open(upstream, api_key_env="REMOTE_KEY", headers={"x-team": "blue"})
    await _ask(keyed)
    assert upstream.headers[0]["authorization"] == "Bearer secret"
    assert upstream.headers[0]["x-team"] == "blue"
    await keyed.aclose()


def test_missing_key_is_a_config_error(upstream):
    with pytest.raises(errors.ExpertConfigError, match="NO_SUCH_KEY, which is not set"):
        _open(upstream, api_key_env="NO_SUCH_KEY")


@pytest.mark.parametrize("status", [429, 500, 503, 408])
async def test_retryable_refusals_are_tried_again(expert, upstream, status):
    upstream.statuses = [status, status]
    assert (await _ask(expert)).text == "Answer to hello"
    assert len(upstream.bodies) == 3


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, errors.InvalidRequestError),
        (401, errors.ExpertAuthError),
        (403, errors.ExpertAuthError),
        (404, errors.ExpertConfigError),
        (422, errors.InvalidRequestError),
    ],
)
async def test_final_refusals_are_not_tried_again(expert, upstream, status, error):
    upstream.statuses = [status]
    with pytest.raises(error):
        await _ask(expert)
    assert len(upstream.bodies) == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (408, errors.ExpertTimeoutError),
        (429, errors.ExpertOverloadedError),
        (500, errors.ExpertUnavailableError),
        (502, errors.ExpertUnavailableError),
        (504, errors.ExpertTimeoutError),
    ],
)
async def test_retries_end(upstream, expert, status, error):
    upstream.statuses = [status, status]
    once = _open(upstream, max_retries=1)
    with pytest.raises(error):
        await _ask(once)
    assert len(upstream.bodies) == 2
    await once.aclose()


async def test_overload_tells_when_to_come_back(expert, upstream):
    upstream.statuses, upstream.retry_after = [429], "30"
    with pytest.raises(errors.ExpertOverloadedError) as caught:
        await _ask(expert, timeout_s=2)  # 30 s do not fit into the deadline: no waiting
    assert caught.value.retry_after_s == 30


async def test_invalid_request_names_the_field(expert):
    with pytest.raises(errors.InvalidRequestError, match="its script says so") as caught:
        await _ask(expert, _chat("invalid"))
    assert caught.value.param == "messages"


async def test_broken_stream_fails_without_another_try(expert, upstream):
    pieces = []

    async def read():
        async for chunk in expert.stream(_chat("break", stream=True), timeout_s=10):
            pieces.append(chunk.text)

    with pytest.raises(errors.ExpertFailedError):
        await read()
    assert "".join(pieces) == "a b"
    assert len(upstream.bodies) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["late", "slow"])
async def test_deadline_holds_before_and_within_the_answer(expert, text, stream):
    started = time.monotonic()
    with pytest.raises(errors.ExpertTimeoutError):
        await _ask(expert, _chat(text, stream=stream), timeout_s=0.3)
    assert time.monotonic() - started < 0.9


async def test_refused_connection_is_unavailable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        config = OpenAIExpertConfig(
            name="gone", engine="openai", base_url=url, model="m", max_retries=0
        )
        expert = OpenAIExpert(config)
        with pytest.raises(errors.ExpertUnavailableError):
            await _ask(expert)
        with pytest.raises(errors.ExpertUnavailableError):
            await expert.check_health()
        await expert.aclose()


async def test_leaving_early_closes_the_upstreams_connection(expert, upstream):
    stream = expert.stream(_chat("slow", stream=True), timeout_s=20)
    await anext(stream)
    assert upstream.expert.active == 1
    await stream.aclose()
    await _until(lambda: upstream.expert.active == 0)


async def test_cancelling_closes_the_upstreams_connection(expert, upstream):
    task = asyncio.create_task(_ask(expert, _chat("slow", stream=True)))
    await _until(lambda: upstream.expert.active == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until(lambda: upstream.expert.active == 0)


async def test_an_answer_that_is_no_completion_fails(upstream):
    for body in ("[]", '"text"', "{}", "not JSON", '{"choices": [5]}'):
        upstream.plain_answer = body
        expert = _open(upstream)
        with pytest.raises(errors.ExpertFailedError):
            await _ask(expert)
        await expert.aclose()
    upstream.plain_answer = None


async def test_connections_are_used_again(expert):
    for number in range(6):
        await _ask(expert, _chat(stream=number % 2 == 0))
    pool = expert._session.connector._conns
    assert sum(len(connections) for connections in pool.values()) == 1


async def test_health_is_the_upstreams(expert, upstream):
    await expert.check_health()
    upstream.statuses = [401]
    with pytest.raises(errors.ExpertAuthError):
        await expert.check_health()


async def test_closed_expert_is_unavailable(expert):
    await expert.aclose()
    await expert.aclose()
    with pytest.raises(errors.ExpertUnavailableError):
        await _ask(expert, timeout_s=0.2)


async def _until(condition):
    async with asyncio.timeout(3.0):
        while not condition():
            await asyncio.sleep(0.01)
