"""The HTTP side without a network; see test_openai_client.py for real connections."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import time

import httpx
import pytest

from experts import errors as expert_errors
from experts.config import ScriptedExpertConfig
from experts.errors import ExpertError, ExpertFailedError
from experts.scripted import ScriptedExpert
from experts.types import Chunk, Completion, Usage
from orchestrator import errors as request_errors
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import Decision
from orchestrator.errors import RequestError
from orchestrator.http.app import create_app
from orchestrator.http.encoding import encode
from orchestrator.http.errors import ERRORS, error_object, error_response, status_of
from orchestrator.http.generation import decision_headers
from orchestrator.http.openai_shapes import AnswerShape
from orchestrator.http.requests import ChatBody
from tests.orchestrator.support import (
    CHAT,
    ROUTE,
    TEXT,
    build,
    chat_body,
    client,
    config_content,
    config_with_rules,
    events,
    eventually,
    expert,
    metric,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def service(**rules):
    return client(build(config_with_rules(rules)))


async def test_a_plain_answer_has_openais_shape():
    response = await service().post(CHAT, json=chat_body())
    body = response.json()
    decision_id = response.headers["x-collegium-decision-id"]
    assert body.pop("id") == "chatcmpl-" + decision_id.removeprefix("dec_")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    message = {"role": "assistant", "content": "large says hello to you"}
    assert body == {
        "object": "chat.completion",
        "model": "large",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6},
    }


async def test_a_text_completion_has_openais_shape():
    response = await service().post(TEXT, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 1})
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0] == {
        "index": 0, "text": "large", "finish_reason": "length", "logprobs": None
    }  # fmt: skip


async def test_a_stream_byte_for_byte():
    orchestrator = build(config_with_rules({"large": {"answer": 'Grüße, "du"'}}))
    request = chat_body(stream=True, stream_options={"include_usage": True})
    response = await client(orchestrator).post(CHAT, json=request)
    body = json.loads(response.text.partition("\n")[0].removeprefix("data: "))
    head = (
        f'data: {{"id":"{body["id"]}","object":"chat.completion.chunk",'
        f'"created":{body["created"]},"model":"large",'
        f'"system_fingerprint":"{orchestrator.config.fingerprint}","choices":['
    )
    end = ',"logprobs":null}]}\n\n'
    assert response.content.decode() == (
        head + '{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null' + end
        + head + '{"index":0,"delta":{"content":"Grüße,"},"finish_reason":null' + end
        + head + '{"index":0,"delta":{"content":" \\"du\\""},"finish_reason":"stop"' + end
        + head + '],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
        + "data: [DONE]\n\n"
    )  # fmt: skip


async def test_streams_are_not_to_be_kept_or_held_back():
    response = await service().post(CHAT, json=chat_body(stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


async def test_streamed_text_completions_have_texts_and_no_roles():
    body = {"prompt": "a", "stream": True, "max_tokens": 2}
    *chunks, done = events((await service().post(TEXT, json=body)).text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["large", " says"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_every_streamed_answer_begins_with_its_role():
    response = await service().post(CHAT, json=chat_body(stream=True, n=3))
    choices = [chunk["choices"][0] for chunk in events(response.text)[:-1]]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": None}])
async def test_usage_is_streamed_only_if_wanted(options):
    response = await service().post(CHAT, json=chat_body(stream=True, stream_options=options))
    assert all("usage" not in chunk for chunk in events(response.text)[:-1])


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_say_who_answered_and_why(stream):
    response = await service(large={"error": "unavailable"}).post(
        CHAT, json=chat_body(stream=stream)
    )
    headers = response.headers
    assert headers["x-collegium-model"] == "medium"
    assert headers["x-collegium-path"] == "large>medium"
    assert headers["x-collegium-route"] == "auto"
    assert headers["x-collegium-policy"] == "utility"
    assert re.fullmatch("dec_[0-9a-f]{32}", headers["x-collegium-decision-id"])
    assert float(headers["x-collegium-overhead-ms"]) < 1000
    assert "x-collegium-trace" not in headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_expert_shows_no_route(stream):
    response = await service().post(CHAT, json=chat_body(model="small", stream=stream))
    assert response.headers["x-collegium-policy"] == "named"
    assert "x-collegium-route" not in response.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_debug_adds_the_whole_decision(stream):
    response = await service().post(
        CHAT, json=chat_body(stream=stream), headers={"x-collegium-debug": "1"}
    )
    trace = json.loads(response.headers["x-collegium-trace"])
    assert trace["id"] == response.headers["x-collegium-decision-id"]
    assert [entry["expert"] for entry in trace["candidates"]] == ["large", "medium", "small"]


def test_headers_survive_categories_of_any_kind():
    decision = Decision(experts=("a",), category="Küche\r\nx-evil: 1\N{PILE OF POO}")
    headers = decision_headers(decision, None, debug=True)
    assert headers["x-collegium-category"] == "K\\u00fcche  x-evil: 1\\ud83d\\udca9"
    assert json.loads(headers["x-collegium-trace"])["category"].startswith("Küche")
    assert all(value.isascii() and value.isprintable() for value in headers.values())


@pytest.mark.parametrize(("knob", "model"), [("0", "small"), ("1", "large"), ("0.0", "small")])
async def test_the_cost_quality_header_overrides_the_route(knob, model):
    headers = {"x-collegium-cost-quality": knob}
    response = await service().post(CHAT, json=chat_body(), headers=headers)
    assert response.json()["model"] == model


@pytest.mark.parametrize(("knob", "model"), [(0, "small"), (1.0, "large"), (None, "large")])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_cost_quality_field_overrides_the_route_and_goes_to_no_expert(
    knob, model, stream
):
    orchestrator = build(parse_config(config_content()))
    http = client(orchestrator)
    response = await http.post(CHAT, json=chat_body(cost_quality=knob, stream=stream, extra=1))
    assert response.headers["x-collegium-model"] == model
    assert expert(orchestrator, model).requests[-1].model_extra == {"extra": 1}
    assert "cost_quality" not in expert(orchestrator, model).requests[-1].model_dump()


async def test_the_field_goes_before_the_header():
    headers = {"x-collegium-cost-quality": "1"}
    for path in (CHAT, ROUTE):
        response = await service().post(path, json=chat_body(cost_quality=0), headers=headers)
        assert (response.json().get("experts") or [response.json()["model"]])[0] == "small"


@pytest.mark.parametrize(
    ("option", "value", "answered"),
    [
        ("route", "auto-cheap", "small"),
        ("allowed_models", ["s*", "medium"], "medium"),
        ("max_cost", 0.0006, "medium"),
        ("min_quality", 0.85, "large"),
        ("top_k", 2, "large"),
        ("deadline_ms", 60_000, "large"),
        ("priority", "low", "large"),
        ("session_id", "one", "large"),
    ],
)
async def test_options_come_in_the_body_or_in_a_header_and_go_to_no_expert(option, value, answered):
    orchestrator = build(parse_config(config_content()))
    http = client(orchestrator)
    text = ", ".join(value) if isinstance(value, list) else str(value)
    header = {"x-collegium-" + option.replace("_", "-"): text}
    for response in (
        await http.post(CHAT, json=chat_body(**{option: value})),
        await http.post(CHAT, json=chat_body(), headers=header),
    ):
        assert response.status_code == 200, response.text
        assert response.json()["model"] == answered
        assert option not in expert(orchestrator, answered).requests[-1].model_dump()


async def test_experts_can_read_a_headers_priority():
    orchestrator = build(parse_config(config_content()))
    http = client(orchestrator)
    await http.post(CHAT, json=chat_body(), headers={"x-collegium-priority": "low"})
    await http.post(CHAT, json=chat_body())
    asked = expert(orchestrator, "large").requests
    assert [request.priority for request in asked if isinstance(request, ChatBody)] == ["low", None]


async def test_a_wrong_header_is_named():
    for header, text in (("max-cost", "much"), ("top-k", "0"), ("priority", "urgent")):
        headers = {"x-collegium-" + header: text}
        response = await service().post(CHAT, json=chat_body(), headers=headers)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["param"] == "x-collegium-" + header
        assert text in error["message"]


async def test_a_named_expert_gets_top_k_as_its_sampling_parameter():
    orchestrator = build(parse_config(config_content()))
    await client(orchestrator).post(CHAT, json=chat_body(model="large", top_k=40))
    assert expert(orchestrator, "large").requests[-1].model_dump()["top_k"] == 40


async def test_a_request_may_be_in_a_hurry():
    http = service(large={"delay_s": 30}, medium={"delay_s": 30}, small={"delay_s": 30})
    started = time.monotonic()
    response = await http.post(CHAT, json=chat_body(deadline_ms=50))
    assert response.status_code == 504
    assert time.monotonic() - started < 5


async def test_plain_answers_say_what_they_cost():
    http = service(large={"error": "unavailable"})
    response = await http.post(CHAT, json=chat_body())
    assert response.headers["x-collegium-path"] == "large>medium"
    assert float(response.headers["x-collegium-cost"]) > 0
    assert response.headers["x-collegium-strategy"] == "fallback"


async def test_low_priority_is_refused_when_half_of_the_places_are_taken():
    limits = {"limits": {"max_in_flight": 2}}
    http = client(build(config_with_rules({"large": {"delay_s": 0.5}}, server=limits)))
    slow = asyncio.ensure_future(http.post(CHAT, json=chat_body()))
    await asyncio.sleep(0.1)
    low = await http.post(CHAT, json=chat_body(model="small", priority="low"))
    assert low.status_code == 429
    assert low.headers["retry-after"]
    assert (await http.post(CHAT, json=chat_body(model="small"))).status_code == 200
    assert (await slow).status_code == 200
    assert (await http.post(CHAT, json=chat_body(priority="low"))).status_code == 200


class Forgetful(ScriptedExpert):
    """Breaks, or is silent, when its answer is complete and only its token counts are missing."""

    async def stream(self, request, *, timeout_s):
        """The answer without its end."""
        async for chunk in super().stream(request, timeout_s=timeout_s):
            if chunk.usage is not None:
                if "wait" in request.messages[-1].text:
                    await asyncio.sleep(30)
                raise ExpertFailedError("large", "it forgot")
            yield chunk


@pytest.mark.parametrize(("text", "n"), [("hello", 1), ("hello", 2), ("wait", 1)])
async def test_nothing_is_wrong_with_a_complete_answer(text, n):
    config = config_with_rules({}, server={"limits": {"timeout_s": 0.05}})
    entries = [entry for entry in config.experts if isinstance(entry, ScriptedExpertConfig)]
    experts = {entry.name: Forgetful(entry) for entry in entries}
    http = client(Orchestrator(config, experts, load_routers(config)))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await http.post(CHAT, json=chat_body(text, n=n, **options))
    *pieces, usage, end = events(response.text)
    assert end == "[DONE]"
    assert usage["usage"]["completion_tokens"] > 0
    reasons = [choice["finish_reason"] for piece in pieces for choice in piece["choices"]]
    assert reasons.count("stop") == n
    page = (await http.get("/metrics")).text
    assert metric(page, 'collegium_requests_total{expert="large",model="auto",status="200"}') == 1


async def test_route_decides_without_asking_anybody():
    orchestrator = build(parse_config(config_content()))
    response = await client(orchestrator).post(ROUTE, json=chat_body())
    body = response.json()
    assert body["experts"] == ["large", "medium", "small"]
    assert body["id"] == response.headers["x-collegium-decision-id"]
    assert body["candidates"][0] == {
        "expert": "large", "quality": pytest.approx(0.9), "cost_usd": 0.002565,
        "utility": pytest.approx(0.9),
    }  # fmt: skip
    assert not expert(orchestrator, "large").requests


async def test_tool_calls_reach_the_client():
    http = service(large={"tool_call": {"name": "weather", "arguments": {"city": "Graz"}}})
    call = {"name": "weather", "arguments": '{"city": "Graz"}'}
    plain = (await http.post(CHAT, json=chat_body(tools=[TOOL]))).json()["choices"][0]
    assert plain["message"]["content"] is None
    assert plain["message"]["tool_calls"][0]["function"] == call
    assert plain["finish_reason"] == "tool_calls"
    streamed = events((await http.post(CHAT, json=chat_body(tools=[TOOL], stream=True))).text)
    delta = streamed[1]["choices"][0]["delta"]
    assert delta["tool_calls"][0]["function"] == call
    assert "content" not in delta


async def test_log_probabilities_reach_the_client():
    body = chat_body(logprobs=True, top_logprobs=1)
    plain = (await service().post(CHAT, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in plain] == ["large", " says", " hello", " to", " you"]
    streamed = events((await service().post(CHAT, json={**body, "stream": True})).text)
    assert streamed[1]["choices"][0]["logprobs"]["content"] == plain[:1]


async def test_unknown_fields_reach_the_expert():
    orchestrator = build(parse_config(config_content()))
    await client(orchestrator).post(CHAT, json=chat_body(min_p=5, chat_template_kwargs={"a": [1]}))
    request = expert(orchestrator, "large").requests[0]
    assert request.model_extra == {"min_p": 5, "chat_template_kwargs": {"a": [1]}}


async def test_null_means_the_default():
    body = chat_body(
        model=None, stream=None, n=None, logprobs=None, max_tokens=None, tools=None, stop=None
    )
    assert (await service().post(CHAT, json=body)).json()["model"] == "large"


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("invalid", 400, "invalid_request"),
        ("auth", 502, "expert_refused_key"),
        ("failed", 502, "expert_failed"),
        ("unavailable", 503, "expert_unavailable"),
        ("timeout", 504, "expert_timeout"),
        ("overloaded", 429, "expert_overloaded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_byte_have_their_own_status(kind, status, code, stream):
    http = service(large={"error": kind})
    response = await http.post(CHAT, json=chat_body(model="large", stream=stream))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert response.headers["x-collegium-path"] == "large"
    assert ("retry-after" in response.headers) == (status == 429)
    if status in (502, 503):
        assert "script" not in error["message"]
        assert response.headers["x-collegium-decision-id"] in error["message"]


async def test_after_the_first_byte_a_stream_ends_with_exactly_one_error():
    broken = {"answer": "a b c", "error": "failed", "error_after_chunks": 2}
    response = await service(large=broken).post(CHAT, json=chat_body(stream=True))
    *pieces, last = events(response.text)
    assert response.status_code == 200
    assert [piece["choices"][0]["delta"]["content"] for piece in pieces] == ["", "a", " b"]
    assert last["error"]["code"] == "expert_failed"
    assert "script" not in response.text


async def test_a_plain_answer_that_breaks_off_comes_from_the_next_expert():
    broken = {"answer": "a b c", "error": "failed", "error_after_chunks": 2}
    response = await service(large=broken).post(CHAT, json=chat_body())
    assert response.json()["choices"][0]["message"]["content"] == "medium says hello to you"
    assert response.headers["x-collegium-path"] == "large>medium"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_ends_a_request(stream):
    limits = {"limits": {"timeout_s": 0.1}}
    orchestrator = build(config_with_rules({"large": {"delay_s": 30}}, server=limits))
    response = await client(orchestrator).post(CHAT, json=chat_body(stream=stream))
    assert response.status_code == 504
    message = response.json()["error"]["message"]
    assert re.fullmatch(r"expert 'large' did not answer within 0\.\d+ s", message)
    assert expert(orchestrator, "large").active == 0


class DeafExpert:
    """Ignores its deadline, which the protocol forbids; ends when it is closed."""

    card = parse_config(config_content()).cards()["large"]

    def __init__(self):
        self.closed = asyncio.Event()

    async def stream(self, request, *, timeout_s):
        try:
            if request.stream and "speak" in request.messages[0].text:
                yield Chunk(text="a")
            await asyncio.sleep(30)
            yield Chunk(text="b")
        finally:
            self.closed.set()

    async def check_health(self):
        await asyncio.sleep(30)

    async def aclose(self):
        pass


def deaf_service():
    limits = {"limits": {"timeout_s": 0.05}}
    orchestrator = build(parse_config(config_content(server=limits)))
    deaf = DeafExpert()
    orchestrator.experts = {**orchestrator.experts, "large": deaf}
    return client(orchestrator), deaf


@pytest.mark.parametrize("stream", [False, True])
async def test_an_expert_that_ignores_the_deadline_is_stopped(stream):
    http, deaf = deaf_service()
    response = await http.post(CHAT, json=chat_body(stream=stream))
    assert response.status_code == 504
    assert deaf.closed.is_set()


async def test_a_stream_that_ignores_the_deadline_is_stopped():
    http, deaf = deaf_service()
    *_, last = events((await http.post(CHAT, json=chat_body("speak", stream=True))).text)
    assert last["error"]["code"] == "expert_timeout"
    assert deaf.closed.is_set()


@pytest.mark.parametrize("path", [CHAT, ROUTE])
async def test_more_requests_than_allowed_are_refused(path):
    server = {"limits": {"max_in_flight": 2}}
    orchestrator = build(config_with_rules({"large": {"delay_s": 0.2}}, server=server))
    http = client(orchestrator)
    busy = [asyncio.create_task(http.post(CHAT, json=chat_body(stream=s))) for s in (True, False)]
    await eventually(lambda: expert(orchestrator, "large").active == 2)
    refused = await http.post(path, json=chat_body())
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert [(await task).status_code for task in busy] == [200, 200]
    assert (await http.post(path, json=chat_body())).status_code == 200
    if path == CHAT:
        page = (await http.get("/metrics")).text
        assert metric(page, 'collegium_requests_total{expert="",model="",status="429"}') == 1
        assert metric(page, "collegium_in_flight_requests") == 0


async def test_every_way_to_end_gives_its_place_back():
    rules = {"small": {"error": "failed"}, "medium": {"error": "failed", "error_after_chunks": 1}}
    orchestrator = build(config_with_rules(rules, server={"limits": {"max_in_flight": 1}}))
    http = client(orchestrator)
    bodies = [chat_body(model=name) for name in ("small", "medium", "large", "nobody")]
    for body in [*bodies, {}, chat_body("")]:
        for stream in (False, True):
            response = await http.post(CHAT, json={**body, "stream": stream})
            assert response.status_code != 429
    page = (await http.get("/metrics")).text
    assert metric(page, "collegium_in_flight_requests") == 0


@pytest.mark.parametrize(
    "authorization",
    [None, "", "key-1", "Basic key-1", "Bearer", "Bearer ", "Bearer nope", "Bearer ä"],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, ROUTE, "/v1/models", "/v1/models/auto"])
async def test_without_a_known_key_nothing_under_v1_answers(authorization, path):
    app = create_app(build(parse_config(config_content())), api_keys=["key-1", "", "key-2"])
    sent = {} if authorization is None else {"authorization": authorization}
    headers = httpx.Headers(sent, encoding="utf-8")
    method = "GET" if "models" in path else "POST"
    response = await client(app).request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["key-1", "schlüssel"])
async def test_every_known_key_is_accepted(key):
    app = create_app(build(parse_config(config_content())), api_keys=["key-1", "schlüssel"])
    headers = httpx.Headers({"authorization": f"Bearer {key}"}, encoding="utf-8")
    assert (await client(app).post(CHAT, json=chat_body(), headers=headers)).status_code == 200


async def test_operations_need_no_key():
    http = client(create_app(build(parse_config(config_content())), api_keys=["key-1"]))
    for path in ("/health", "/ready", "/metrics", "/openapi.json"):
        assert (await http.get(path)).status_code == 200


async def test_models_lists_routes_and_experts():
    body = (await service().get("/v1/models")).json()
    kinds = {entry["id"]: entry["kind"] for entry in body["data"]}
    assert kinds == {"auto": "route", "auto-cheap": "route", "small": "expert",
                     "medium": "expert", "large": "expert"}  # fmt: skip
    assert body["data"][0]["experts"] == ["small", "medium", "large"]


async def test_an_experts_card_is_shown():
    card = (await service().get("/v1/models/large")).json()["card"]
    assert card["input_usd_per_mtok"] == 5
    assert card["capabilities"] == sorted(card["capabilities"])


async def test_ready_needs_every_expert():
    orchestrator = build(parse_config(config_content()))
    http = client(orchestrator)
    assert (await http.get("/ready")).json()["status"] == "ready"
    await expert(orchestrator, "medium").aclose()
    response = await http.get("/ready")
    assert response.status_code == 503
    assert response.json() == {
        "status": "not ready",
        "experts": {"small": None, "large": None,
                    "medium": "the expert is not available at the moment"},
    }  # fmt: skip


async def test_metrics_count_requests_tokens_and_fallbacks():
    http = service(large={"error": "unavailable"})
    await http.post(CHAT, json=chat_body())
    await http.post(CHAT, json=chat_body(stream=True))
    await http.post(CHAT, json=chat_body(model="made-up"))
    page = (await http.get("/metrics")).text
    finished = 'collegium_requests_total{expert="medium",model="auto",status="200"}'
    assert metric(page, finished) == 2
    assert metric(page, 'collegium_requests_total{expert="",model="",status="404"}') == 1
    calls = 'collegium_expert_calls_total{expert="%s",outcome="%s",purpose="answer"}'
    assert metric(page, calls % ("large", "ExpertUnavailableError")) == 2
    assert metric(page, calls % ("medium", "ok")) == 2
    assert metric(page, 'collegium_tokens_total{expert="medium",kind="completion"}') == 10
    assert metric(page, 'collegium_first_chunk_seconds_count{expert="medium"}') == 1
    assert metric(page, "collegium_router_seconds_count") == 2


async def test_metrics_have_exactly_these_names():
    page = (await service().get("/metrics")).text
    names = set(re.findall(r"^# HELP (\S+)", page, re.MULTILINE))
    assert {name for name in names if not name.endswith("_created")} == {
        "collegium_requests_total",
        "collegium_memory_errors_total",
        "collegium_expert_calls_total",
        "collegium_peers_lost_total",
        "collegium_cost_usd_total",
        "collegium_tokens_total",
        "collegium_in_flight_requests",
        "collegium_request_seconds",
        "collegium_first_chunk_seconds",
        "collegium_router_seconds",
        "collegium_cache_lookups_total",
        "collegium_shadow_total",
    }


async def test_decisions_are_logged_without_texts(caplog):
    caplog.set_level("INFO", "collegium.decisions")
    response = await service().post(CHAT, json=chat_body("my secret"))
    entry = json.loads(caplog.records[0].message)
    assert entry["decision_id"] == response.headers["x-collegium-decision-id"]
    assert entry["experts"] == ["large", "medium", "small"]
    assert "secret" not in caplog.text


async def test_unknown_paths_and_methods_get_error_objects():
    http = service()
    missing, wrong = await http.get("/v1/nothing"), await http.get(CHAT)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


class BuggyExpert(DeafExpert):
    """Raises what the protocol does not allow."""

    async def stream(self, request, *, timeout_s):
        raise ZeroDivisionError("secret detail")
        yield Chunk()

    async def check_health(self):
        raise ZeroDivisionError("secret detail")


@pytest.mark.parametrize("stream", [False, True])
async def test_bugs_become_internal_errors_without_details(stream, caplog):
    orchestrator = build(parse_config(config_content()))
    orchestrator.experts = {**orchestrator.experts, "large": BuggyExpert()}
    response = await client(orchestrator).post(CHAT, json=chat_body(stream=stream))
    assert response.status_code == 500
    assert response.json()["error"]["message"].startswith("internal error (dec_")
    assert "secret detail" in caplog.text
    ready = await client(orchestrator).get("/ready")
    assert ready.json()["experts"]["large"] == "internal error"


def subclasses(module, base):
    found = [value for _, value in inspect.getmembers(module, inspect.isclass)]
    return [value for value in found if issubclass(value, base)]


@pytest.mark.parametrize(
    "kind",
    [*subclasses(expert_errors, ExpertError), *subclasses(request_errors, RequestError)],
    ids=lambda kind: kind.__name__,
)
def test_the_error_table_is_total(kind):
    assert kind in ERRORS
    status, family, code = ERRORS[kind]
    assert 400 <= status < 600
    assert (family == "server_error") == (status >= 500)
    assert code


def test_own_subclasses_of_errors_are_found_along_their_ancestors():
    class MyTimeout(expert_errors.ExpertTimeoutError):
        pass

    assert status_of(MyTimeout("a", 1)) == 504
    assert status_of(ValueError()) == 500
    assert error_object(ValueError("secret"))["error"]["message"] == "internal error"


@pytest.mark.parametrize(
    ("wait_s", "said"),
    [(0, "1"), (1.2, "2"), (60, "60"), (1e9, "3600"), (float("inf"), "1"), (float("nan"), "1")],
)
def test_retry_after_is_a_sensible_whole_number(wait_s, said):
    error = expert_errors.ExpertOverloadedError("a", wait_s)
    assert error_response(error).headers["retry-after"] == said


def test_half_characters_survive_as_escapes():
    assert encode({"text": "\ud83d"}) == b'{"text":"\\ud83d"}'
    shape = AnswerShape(chat=True, decision_id="dec_1", model="a", fingerprint="fp")
    assert b'"\\ud83d"' in shape.piece(Chunk(text="\ud83d"))
    assert b'"id"' in encode(shape.whole(Completion([], Usage())))


def test_json_has_neither_nan_nor_infinity():
    assert encode({"a": float("nan"), "b": [float("inf")]}) == b'{"a":null,"b":[null]}'
