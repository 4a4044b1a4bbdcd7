from __future__ import annotations

import json
import time

import pytest

from experts.types import Chunk
from orchestrator.config import parse_config
from orchestrator.strategies import answer_form
from orchestrator.strategies.answer_form import AnswerForm
from orchestrator.strategies.fallback import FallbackStrategy
from tests.orchestrator.composing import CITY, TOOL, Run, scripted
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    chat_request,
    client,
    config_with_rules,
    events,
    text_request,
)


def fault(text="", calls=None, reason="stop", **fields):
    form = AnswerForm.of(chat_request(**fields))
    assert form is not None
    middle = len(text) // 2
    assert form.fault(Chunk(text=text[:middle])) is None
    return form.fault(Chunk(text=text[middle:], tool_calls=calls, finish_reason=reason))


def with_schema(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def call(name="weather", arguments="{}", index=0):
    return {"index": index, "id": "1", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}])
def test_any_text_will_do_unless_a_form_is_asked_for(fields):
    assert AnswerForm.of(chat_request(**fields)) is None
    assert AnswerForm.of(text_request()) is None


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[1]"),
        ({"response_format": CITY}, '{"city": 1}', '{"town": 1}'),
        ({"structured_outputs": {"json": {"type": "array"}}}, "[1]", "{}"),
        ({"guided_json": {"enum": [1, 2]}}, "2", "3"),
        (with_schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}), "null", "0"),
        (with_schema({"properties": {"a": {}}, "additionalProperties": False}), "{}", '{"b": 1}'),
    ],
)
def test_json_must_satisfy_what_was_asked_for(fields, good, bad):
    assert fault(good, **fields) is None
    assert "schema" in fault(bad, **fields)
    for garbage in ("", "no", '{"a": ', "```json\n{}\n```", "[" * 100_000):
        assert fault(garbage, **fields) == "its answer is no JSON"


def test_an_answer_cut_short_says_so_itself():
    assert fault('{"ci', reason="length", response_format=CITY) is None


@pytest.mark.parametrize(
    ("calls", "wrong"),
    [
        ([call()], None),
        ([call(arguments="")], None),
        ([call(arguments='{"ci'), call("", 'ty": 1}')], None),
        ([call(arguments='{"a": 1}'), call(arguments="{}", index=1)], None),
        ([call("bank")], "bank"),
        ([call(arguments='{"ci')], "weather"),
        ([call(arguments="[]")], "weather"),
        ([call(), call(arguments="}", index=1)], "weather"),
    ],
)
def test_tools_must_be_offered_and_their_arguments_json_objects(calls, wrong):
    found = fault(calls=calls, reason="tool_calls", tools=[TOOL], response_format=CITY)
    assert found is None if wrong is None else wrong in found


def test_text_instead_of_a_tool_call_will_do():
    assert fault("no tool is needed", tools=[TOOL]) is None


def test_every_choice_is_checked():
    form = AnswerForm.of(chat_request(response_format=CITY, n=2))
    assert form is not None
    assert form.fault(Chunk(0, '{"city": 1}', finish_reason="stop")) is None
    assert form.fault(Chunk(1, "oops", finish_reason="stop"))


def doubling(depth):
    """A schema that takes 2 ** depth steps."""
    steps = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{depth}": {"type": "object"}}}


@pytest.mark.parametrize(
    "schema",
    [
        doubling(40),
        {"$ref": "#"},
        {"$ref": "https://example.com/schema.json"},
        {"type": "string", "pattern": "^(a+)+$"},
        {"patternProperties": {"^(a+)+$": {"type": "null"}}, "additionalProperties": False},
        {"type": 7},
        {"properties": 7},
    ],
    ids=["exponential", "endless", "remote", "pattern", "patterns", "wrong", "wrong too"],
)
@pytest.mark.parametrize("answer", ["a" * 40 + "!", {"a" * 40 + "!": 1}])
def test_schemas_neither_stop_the_service_nor_fetch_anything(schema, answer):
    if schema.get("type") == "string" and isinstance(answer, dict):
        return
    started = time.monotonic()
    fault(json.dumps(answer), **with_schema(schema))
    assert time.monotonic() - started < 1


def test_values_of_long_lists_are_looked_for_within_the_steps():
    compared = 0

    class Counted(int):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return int(self) == other

        __hash__ = int.__hash__

    schema = {"items": {"enum": [Counted(number) for number in range(2000)]}}
    # An answer that has not been checked to its end passes.
    assert answer_form._satisfies([-1.5] * 10, schema) is False
    compared = 0
    assert answer_form._satisfies([1999] * 999 + [-1], schema) is True
    assert 0 < compared < 32 * answer_form.MAX_STEPS


@pytest.mark.parametrize("stream", [True, False])
async def test_garbage_is_its_experts_failure(stream):
    panel = [scripted("a", {"answer": "garbage"}), scripted("b", {"answer": '{"city": "Graz"}'})]
    run = Run(FallbackStrategy(), panel, response_format=CITY, stream=stream)
    assert json.loads((await run.answer()).text) == {"city": "Graz"}
    assert run.context.calls[0].error == "ExpertFailedError"
    assert run.context.calls[0].cost_usd == 0


async def test_a_stream_of_garbage_ends_with_an_error():
    http = client(build(config_with_rules({"large": {"answer": "one two three"}})))
    body = chat_body(response_format=CITY, stream=True)
    *pieces, last = events((await http.post(CHAT, json=body)).text)
    assert [p["choices"][0]["delta"]["content"] for p in pieces] == ["", "one", " two"]
    assert last["error"]["code"] == "expert_failed"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_expert_asked_by_name_is_passed_on_as_it_is(stream):
    http = client(build(config_with_rules({"large": {"answer": "garbage"}})))
    body = chat_body(model="large", response_format=CITY, stream=stream)
    assert "garbage" in (await http.post(CHAT, json=body)).text


async def test_single_has_nobody_to_ask_instead():
    routes = {"auto": {"router": "table", "strategy": {"type": "single"}}}
    rules = {"large": {"answer": "garbage"}}
    config = parse_config(config_with_rules(rules, routes=routes).model_dump(mode="json"))
    response = await client(build(config)).post(CHAT, json=chat_body(response_format=CITY))
    assert response.status_code == 502
