"""The real openai client, and bare sockets, against a real server."""

from __future__ import annotations

import json
import socket
import time

import httpx
import openai
import pytest

from orchestrator.config import parse_config
from orchestrator.http.app import create_app
from tests.orchestrator.support import (
    CHAT,
    TEXT,
    build,
    chat_body,
    config_with_rules,
    eventually_sync,
    expert,
    metric,
    running_server,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"name": "weather", "arguments": {"city": "Graz"}}
HELLO = [{"role": "user", "content": "hello"}]

RULES = {
    "small": {"answer": "a b c d", "chunk_delay_s": 30},
    "medium": {"answer": "late", "delay_s": 30},
    "large": {"answer": "large says hello", "tool_call": CALL},
}
MORE = [
    {"name": "overloaded", "engine": "scripted", "rules": [{"error": "overloaded"}]},
    {"name": "down", "engine": "scripted", "rules": [{"error": "unavailable"}]},
    {"name": "floods", "engine": "scripted",
     "rules": [{"answer": "x" * 40_000_000, "chunks": 400, "chunk_delay_s": 0.01}]},
    {"name": "breaks", "engine": "scripted",
     "rules": [{"answer": "a b c", "error": "failed", "error_after_chunks": 1}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def orchestrator():
    content = config_with_rules(RULES).model_dump(exclude_unset=True)
    return build(parse_config({**content, "experts": [*content["experts"], *MORE]}))


@pytest.fixture(scope="module")
def address(orchestrator):
    with running_server(create_app(orchestrator, api_keys=["key"])) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(address):
    url = f"{address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model="auto", messages=HELLO, n=2)
    assert answer.model == "large"
    assert [choice.message.content for choice in answer.choices] == ["large says hello"] * 2
    assert answer.usage.completion_tokens == 6


async def test_chat_async(async_client):
    answer = await async_client.chat.completions.create(model="large", messages=HELLO)
    assert answer.choices[0].message.content == "large says hello"


def test_chat_stream_with_usage(client):
    stream = client.chat.completions.create(
        model="auto", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "large says hello"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.total_tokens) == ([], 4)


async def test_chat_stream_async_with_several_answers(async_client):
    stream = await async_client.chat.completions.create(
        model="auto", messages=HELLO, stream=True, n=2
    )
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["large says hello"] * 2


def test_headers_are_there_before_the_first_chunk(client):
    with client.chat.completions.with_streaming_response.create(
        model="auto", messages=HELLO, stream=True
    ) as response:
        assert response.headers["x-collegium-model"] == "large"
        assert response.headers["x-collegium-path"] == "large"


def test_text_completions(client):
    answer = client.completions.create(model="large", prompt="go", max_tokens=2)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("large says", "length")
    stream = client.completions.create(model="large", prompt="go", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "large says hello"


def test_models(client):
    assert {"auto", "auto-cheap", "large"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("large").owned_by == "collegium"


def test_tool_calls(client):
    answer = client.chat.completions.create(model="large", messages=HELLO, tools=[TOOL])
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == tuple(CALL.values())
    assert answer.choices[0].finish_reason == "tool_calls"


def test_streamed_tool_calls(client):
    with client.chat.completions.stream(model="large", messages=HELLO, tools=[TOOL]) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.name == "weather"
    assert json.loads(message.tool_calls[0].function.arguments) == CALL["arguments"]


def test_response_format_and_extra_fields_reach_the_expert(client, orchestrator):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    client.chat.completions.create(
        model="large", messages=HELLO, response_format=wanted, extra_body={"top_k": 3}
    )
    request = expert(orchestrator, "large").requests[-1]
    assert request.model_dump(by_alias=True)["response_format"] == wanted
    assert request.model_extra == {"top_k": 3}


def test_the_knob_goes_as_a_header(client):
    answer = client.chat.completions.with_raw_response.create(
        model="auto", messages=HELLO,
        extra_headers={"x-collegium-cost-quality": "1", "x-collegium-debug": "1"},
    )  # fmt: skip
    assert json.loads(answer.headers["x-collegium-trace"])["cost_quality"] == 1


def test_the_knob_goes_as_a_field(client):
    answer = client.chat.completions.create(
        model="auto", messages=HELLO, extra_body={"cost_quality": 0}
    )
    assert answer.model == "small"


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        ("nobody", {}, openai.NotFoundError),
        ("large", {"temperature": 9}, openai.BadRequestError),
        ("overloaded", {}, openai.RateLimitError),
        ("down", {}, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_the_clients_own_classes(client, model, options, error, stream):
    with pytest.raises(error) as caught:
        client.chat.completions.create(model=model, messages=HELLO, stream=stream, **options)
    assert caught.value.body["code"]


def test_a_wrong_key_is_an_authentication_error(client):
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_an_unknown_model_cannot_be_retrieved(client):
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_stream_that_breaks_off_raises_after_its_pieces(client):
    stream = client.chat.completions.create(model="breaks", messages=HELLO, stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
    with pytest.raises(openai.APIError, match="failed while answering"):
        next(stream)


def send(address: str, path: str, **body) -> socket.socket:
    """Send a request over a bare socket and leave the connection open."""
    url = httpx.URL(address)
    text = json.dumps(body).encode()
    connection = socket.create_connection((url.host, url.port), timeout=5)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: {url.host}\r\nauthorization: Bearer key\r\n"
        f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n".encode()
        + text
    )
    return connection


@pytest.mark.parametrize(
    ("model", "stream"),
    [("small", True), ("medium", True), ("small", False), ("medium", False)],
    ids=["mid-stream", "before the first chunk", "plain", "plain before anything"],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_client_that_leaves_frees_its_expert(address, orchestrator, model, stream, path):
    body = {"prompt": "hello"} if path == TEXT else chat_body()
    busy = expert(orchestrator, model)
    with send(address, path, model=model, stream=stream, **body) as connection:
        eventually_sync(lambda: busy.active == 1)
        if stream and model == "small":
            received = b""
            while b'"a"' not in received:
                received += connection.recv(4096)
    eventually_sync(lambda: busy.active == 0)
    left = f'collegium_requests_total{{expert="{model}",model="{model}",status="499"}}'
    eventually_sync(lambda: metric(httpx.get(f"{address}/metrics").text, left) >= 1)
    page = httpx.get(f"{address}/metrics").text
    assert metric(page, "collegium_in_flight_requests") == 0


def test_a_client_that_stops_reading_and_leaves_frees_its_place(address, orchestrator):
    flood = expert(orchestrator, "floods")
    with send(address, CHAT, model="floods", stream=True, **chat_body()):
        eventually_sync(lambda: flood.active == 1)
        time.sleep(0.3)  # the connection's buffers are full by now
        assert flood.active == 1
    eventually_sync(lambda: flood.active == 0)


def test_a_body_that_never_comes_is_given_up():
    limits = {"limits": {"timeout_s": 0.2}}
    with running_server(create_app(build(config_with_rules({}, server=limits)))) as address:
        url = httpx.URL(address)
        with socket.create_connection((url.host, url.port), timeout=5) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                "content-length: 100\r\n\r\n{".encode()
            )
            started = time.monotonic()
            assert b"408 Request Timeout" in connection.recv(4096)
            assert time.monotonic() - started < 1
