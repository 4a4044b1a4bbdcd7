"""Every kind of wrong request: its status, the field named, and a service that goes on."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from orchestrator.config import parse_config
from orchestrator.http.app import create_app
from orchestrator.http.schemas import ErrorBody
from tests.orchestrator.support import CHAT, ROUTE, TEXT, build, chat_body, client, config_content

LIMIT = 300_000
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "hello"}


class Case(NamedTuple):
    """A wrong request and what must be said of it."""

    name: str
    path: str
    content: bytes
    status: int
    param: str | None
    headers: dict[str, str] = JSON
    method: str = "POST"


def wrong_values(field: str, *values: Any) -> list[tuple[str, Any, str]]:
    return [(f"{field}={json.dumps(value)[:40]}", {field: value}, field) for value in values]


SHARED = [
    *wrong_values("model", 5, True, [], {}, "", "x" * 257),
    *wrong_values("stream", "yes", 1, 0, [], {}),
    *wrong_values("stream_options", 5, "usage", [], True),
    ("include_usage", {"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    *wrong_values("max_tokens", 0, -1, 1.5, "5", True, [], 1_000_001, 10**30),
    *wrong_values("temperature", -0.1, 2.1, "1", True, [], {}, 10**400),
    *wrong_values("top_p", 0, -1, 1.1, "1", False, []),
    *wrong_values("n", 0, -1, 17, 1.5, "2", True, [], {}),
    *wrong_values("seed", 1.5, "1", True, 2**63, -(2**63) - 1, [], {}),
    *wrong_values("presence_penalty", -2.1, 2.1, "0", [], {}),
    *wrong_values("frequency_penalty", -2.1, 2.1, "0", [], {}),
    *wrong_values("stop", 5, True, {}, ["a"] * 5),
    ("stop of numbers", {"stop": ["a", 5]}, "stop.1"),
    *wrong_values("user", 5, True, [], {}),
    *wrong_values("cost_quality", -0.1, 1.1, "1", True, [], {}, 10**400),
    *wrong_values("route", 5, True, [], "x" * 129),
    *wrong_values("max_cost", -1, "1", True, [], 10**400),
    *wrong_values("allowed_models", "small", [], {}, ["a"] * 65),
    ("allowed_models of numbers", {"allowed_models": ["a", 5]}, "allowed_models.1"),
    *wrong_values("min_quality", -0.1, 1.1, "1", []),
    *wrong_values("top_k", 0, -1, 1.5, "2", True),
    *wrong_values("deadline_ms", 0, -1, 1.5, "5", True),
    *wrong_values("priority", "urgent", 1, []),
    *wrong_values("session_id", "", 5, [], "x" * 257),
]

WRONG_LISTS: list[list[Any]] = [[None], ["a"], [5], [[]]]
CHAT_ONLY = [
    *wrong_values("messages", None, "hello", 5, {}, []),
    *((f"messages={items}", {"messages": items}, "messages.0") for items in WRONG_LISTS),
    *wrong_values("max_completion_tokens", 0, -1, 1.5, "5", True),
    *wrong_values("logprobs", "yes", 1, [], {}),
    *wrong_values("top_logprobs", -1, 21, 1.5, "1", True),
    *wrong_values("tools", [], {}, "weather", 5),
    *((f"tools={items}", {"tools": items}, "tools.0") for items in WRONG_LISTS),
    *wrong_values("tool_choice", "sometimes", "", 5, True, []),
    *wrong_values("response_format", 5, "json", []),
    ("response_format={}", {"response_format": {}}, "response_format.type"),
]
MESSAGES: list[tuple[str, Any, str]] = [
    ("no role", {"content": "a"}, "role"),
    ("role null", {"role": None, "content": "a"}, "role"),
    ("role unknown", {"role": "robot", "content": "a"}, "role"),
    ("role a number", {"role": 5, "content": "a"}, "role"),
    ("user without content", {"role": "user"}, "content"),
    ("user with null", {"role": "user", "content": None}, "content"),
    ("system with null", {"role": "system", "content": None}, "content"),
    ("developer with null", {"role": "developer", "content": None}, "content"),
    ("tool with null", {"role": "tool", "content": None, "tool_call_id": "1"}, "content"),
    ("content a number", {"role": "user", "content": 5}, "content"),
    ("content an object", {"role": "user", "content": {"text": "a"}}, "content"),
    ("content true", {"role": "user", "content": True}, "content"),
    ("part a text", {"role": "user", "content": ["a"]}, "content.0"),
    ("part null", {"role": "user", "content": [None]}, "content.0"),
    ("part without type", {"role": "user", "content": [{"text": "a"}]}, "content.0.type"),
    ("part with type 5", {"role": "user", "content": [{"type": 5}]}, "content.0.type"),
    ("text part without text", {"role": "user", "content": [{"type": "text"}]}, "content.0.text"),
    ("text null", {"role": "user", "content": [{"type": "text", "text": None}]}, "content.0.text"),
    ("text a number", {"role": "user", "content": [{"type": "text", "text": 5}]}, "content.0.text"),
    ("tool_calls a text", {"role": "assistant", "tool_calls": "a"}, "tool_calls"),
    ("tool_calls of numbers", {"role": "assistant", "tool_calls": [5]}, "tool_calls.0"),
    ("call without id", {"role": "assistant", "tool_calls": [
        {"function": {"name": "a", "arguments": ""}}]}, "tool_calls.0.id"),
    ("call without function", {"role": "assistant", "tool_calls": [{"id": "1"}]},
     "tool_calls.0.function"),
    ("call with arguments as object", {"role": "assistant", "tool_calls": [
        {"id": "1", "function": {"name": "a", "arguments": {}}}]},
     "tool_calls.0.function.arguments"),
    ("call of another type", {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "x", "function": {"name": "a", "arguments": ""}}]},
     "tool_calls.0.type"),
    ("tool_call_id a number", {"role": "tool", "content": "a", "tool_call_id": 5}, "tool_call_id"),
]  # fmt: skip
NESTED: list[tuple[str, Any, str]] = [
    ("tool without function", {"tools": [{"type": "function"}]}, "tools.0.function"),
    ("tool of another type", {"tools": [{"type": "x", "function": {"name": "a"}}]}, "tools.0.type"),
    ("function without name", {"tools": [{"function": {}}]}, "tools.0.function.name"),
    ("function with empty name", {"tools": [{"function": {"name": ""}}]}, "tools.0.function.name"),
    ("parameters a text", {"tools": [{"function": {"name": "a", "parameters": "x"}}]},
     "tools.0.function.parameters"),
    ("129 tools", {"tools": [{"function": {"name": "a"}}] * 129}, "tools"),
    ("format of unknown type", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("format without schema", {"response_format": {"type": "json_schema"}},
     "response_format.json_schema"),
    ("schema without schema", {"response_format": {"type": "json_schema", "json_schema": {}}},
     "response_format.json_schema.schema"),
    ("schema a list", {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
     "response_format.json_schema.schema"),
    ("blank text", {"messages": [{"role": "user", "content": " \n\t"}]}, "messages"),
    ("all texts empty", {"messages": [{"role": "system", "content": ""},
                                      {"role": "user", "content": ""}]}, "messages"),
    ("no parts", {"messages": [{"role": "user", "content": []}]}, "messages"),
    ("null from the assistant", {"messages": [{"role": "assistant", "content": None}]}, "messages"),
    ("4097 messages", {"messages": [{"role": "user", "content": ""}] * 4097}, "messages"),
]  # fmt: skip
TEXT_ONLY = [
    *wrong_values("prompt", None, 5, True, {}, [], ["a"] * 65, "", [""], ["a", ""]),
    ("prompt of numbers", {"prompt": ["a", 5]}, "prompt.1"),
    ("prompt of tokens", {"prompt": [1, 2]}, "prompt.0"),
    *wrong_values("logprobs", -1, 6, 1.5, "1", True, []),
    *wrong_values("echo", "yes", 1, []),
]


def of_fields(path: str, base: dict[str, Any], cases: list[tuple[str, Any, str]]) -> list[Case]:
    return [
        Case(name, path, json.dumps({**base, **fields}).encode(), 400, param)
        for name, fields, param in cases
    ]


def of_messages(path: str) -> list[Case]:
    return [
        Case(name, path, json.dumps({"messages": [USER, message]}).encode(), 400,
             f"messages.1.{param}")
        for name, message, param in MESSAGES
    ]  # fmt: skip


RAW: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "body"),
    ("a blank", b" ", "body"),
    ("a text", b"hello", "body"),
    ("null", b"null", "body"),
    ("a number", b"5", "body"),
    ("a string", b'"hello"', "body"),
    ("true", b"true", "body"),
    ("a list", b"[]", "body"),
    ("a list of a body", b'[{"messages":[]}]', "body"),
    ("an open brace", b"{", "body"),
    ("truncated", b'{"messages":[{"role":"user","content":"hel', "body"),
    ("a trailing comma", b'{"messages":[],}', "body"),
    ("single quotes", b"{'messages':[]}", "body"),
    ("a comment", b"{} // hello", "body"),
    ("two bodies", b"{}{}", "body"),
    ("a byte order mark", b"\xef\xbb\xbf{}", "body"),
    ("UTF-16", '{"model":"auto"}'.encode("utf-16"), "body"),
    ("a zero byte", b'{"model":"a\x00b"}', "body"),
    ("bad UTF-8", b'{"model":"\xff"}', "body"),
    ("bad UTF-8 in a key", b'{"\xc3":1}', "body"),
    ("overlong UTF-8", b'{"model":"\xc0\xaf"}', "body"),
    ("a surrogate in UTF-8", b'{"model":"\xed\xa0\x80"}', "body"),
    ("a lone high surrogate", rb'{"model":"\ud800"}', "body"),
    ("a lone low surrogate", rb'{"model":"\udc00"}', "body"),
    ("two high surrogates", rb'{"model":"\ud800\ud800"}', "body"),
    ("half an escape", rb'{"model":"\u12"}', "body"),
    ("100k open lists", b'{"messages":' + b"[" * 100_000, "body"),
    ("100k lists in an unknown field", b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body"),
    ("50k open objects", b'{"x":' * 50_000, "body"),
    ("deep objects", b'{"x":' * 5_000 + b"1" + b"}" * 5_000, "body"),
]
# These are valid for lenient readers; the rest of the body is right.
NUMBERS: list[tuple[str, str, str]] = [
    ("temperature NaN", '"temperature":NaN', "temperature"),
    ("temperature Infinity", '"temperature":Infinity', "temperature"),
    ("temperature -Infinity", '"temperature":-Infinity', "temperature"),
    ("temperature 1e999", '"temperature":1e999', "temperature"),
    ("top_p -1e999", '"top_p":-1e999', "top_p"),
    ("max_tokens 1e3", '"max_tokens":1e3', "max_tokens"),
    ("seed of 5000 digits", '"seed":' + "9" * 5000, "body"),
    ("deadline_ms of 400 digits", '"deadline_ms":' + "9" * 400, "deadline_ms"),
    ("unknown field NaN", '"x":NaN', "body"),
    ("unknown field Infinity", '"x":[1,{"y":-Infinity}]', "body"),
    ("unknown field 1e999", '"x":1e999', "body"),
    ("unknown field of 400 digits", '"x":' + "9" * 400, "body"),
    ("unknown field of 400 digits and a sign", '"x":{"y":[-' + "9" * 400 + "]}", "body"),
    ("a leading zero", '"n":01', "body"),
    ("a plus", '"n":+1', "body"),
    ("a hexadecimal number", '"n":0x1', "body"),
    ("model twice", '"model":"auto","model":"small"', "model"),
    ("an unknown field twice", '"x":1,"x":1', "x"),
    ("a nested key twice", '"x":{"a":1,"a":2}', "a"),
]

HEADERS: list[tuple[str, dict[str, str], int, str]] = [
    ("no content type", {}, 415, "content-type"),
    ("plain text", {"content-type": "text/plain"}, 415, "content-type"),
    ("a form", {"content-type": "application/x-www-form-urlencoded"}, 415, "content-type"),
    ("upload", {"content-type": "multipart/form-data; boundary=x"}, 415, "content-type"),
    ("nearly JSON", {"content-type": "application/jsonp"}, 415, "content-type"),
    ("empty content type", {"content-type": ""}, 415, "content-type"),
    ("brotli", {**JSON, "content-encoding": "br"}, 415, "content-encoding"),
    ("announced as huge", {**JSON, "content-length": str(LIMIT + 1)}, 413, "body"),
    ("announced as gigantic", {**JSON, "content-length": "9" * 5000}, 413, "body"),
    *(
        (f"knob {knob!r}", {**JSON, "x-collegium-cost-quality": knob}, 400,
         "x-collegium-cost-quality")
        for knob in ("", "high", "-0.1", "1.1", "nan", "inf", "-inf", "1e999", "0,5", "0.5 0.5")
    ),
]  # fmt: skip


def cases() -> list[Case]:
    found: list[Case] = []
    for path in (CHAT, ROUTE, TEXT):
        base: dict[str, Any] = {"prompt": "hello"} if path == TEXT else chat_body()
        good = json.dumps(base)
        found += of_fields(path, base, SHARED)
        found += [Case(name, path, body, 400, param) for name, body, param in RAW]
        found += [
            Case(name, path, f"{good[:-1]},{extra}}}".encode(), 400, param)
            for name, extra, param in NUMBERS
        ]
        found += [
            Case(name, path, good.encode(), status, param, headers)
            for name, headers, status, param in HEADERS
        ]
        found += [
            Case("unknown model", path, json.dumps({**base, "model": "x"}).encode(), 404, "model"),
            Case("huge", path, good.encode() + b" " * LIMIT, 413, "body"),
            Case("gzip", path, gzip.compress(good.encode()), 400, "body"),
            Case("gzip, announced", path, gzip.compress(good.encode()), 415, "content-encoding",
                 {**JSON, "content-encoding": "gzip"}),
            *(Case(method, path, good.encode(), 405, None, JSON, method)
              for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")),
        ]  # fmt: skip
        if path != TEXT:
            found += of_fields(path, base, [*CHAT_ONLY, *NESTED])
            found += of_messages(path)
            found.append(Case("no messages", path, b"{}", 400, "messages"))
    found += of_fields(TEXT, {"prompt": "hello"}, TEXT_ONLY)
    found.append(Case("no prompt", TEXT, b"{}", 400, "prompt"))
    return found


CASES = cases()


@pytest.fixture(scope="module")
def app():
    limits = {"limits": {"max_body_bytes": LIMIT}}
    return create_app(build(parse_config(config_content(server=limits))))


@pytest.fixture
async def service(app):
    async with client(app) as service:
        yield service
        # Whatever came, the next request is answered.
        assert (await service.post(CHAT, json=chat_body())).status_code == 200


def check_refusal(response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    if response.request.method == "HEAD":
        return
    assert response.headers["content-type"] == "application/json"
    error = ErrorBody.model_validate_json(response.content).error
    assert error.param == param
    assert param is None or param.removeprefix("body") in error.message
    assert "Traceback" not in response.text
    assert 'File \\"' not in response.text
    assert len(error.message) < 1000


def test_there_are_many_cases():
    assert len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path[4:]}: {case.name}")
async def test_bad_input_is_refused(service, case):
    response = await service.request(
        case.method, case.path, content=case.content, headers=case.headers
    )
    check_refusal(response, case.status, case.param)


async def test_what_is_wrong_with_a_huge_number_is_said(service):
    body = json.dumps(chat_body())[:-1] + ',"x":' + "9" * 400 + "}"
    response = await service.post(CHAT, content=body, headers=JSON)
    said = "the body holds a number that is too large: 99999999999999999999"
    assert response.json()["error"]["message"] == said


@pytest.mark.parametrize("path", [CHAT, ROUTE, TEXT])
async def test_bodies_that_grow_beyond_the_limit_are_refused(service, path):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b"[" * 1000

    check_refusal(await service.post(path, content=endless(), headers=JSON), 413, "body")
    # The transport reads ahead of the application; it must not read on for ever.
    assert sent <= 10 * LIMIT


@pytest.mark.parametrize("name", ["nobody", "%ff%00", "x" * 5000])
async def test_unknown_models_cannot_be_shown(service, name):
    response = await service.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert ErrorBody.model_validate_json(response.content).error.param == "model"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON ;x"])
async def test_content_types_with_parameters_are_accepted(service, content_type):
    headers = {"content-type": content_type}
    response = await service.post(CHAT, content=json.dumps(chat_body()), headers=headers)
    assert response.status_code == 200
