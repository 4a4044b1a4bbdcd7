"""Tools and structured output through every strategy there is, with the real client and server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from orchestrator.http.app import create_app
from tests.orchestrator.drill import NAMES, STRATEGIES, orchestrator_of
from tests.orchestrator.support import running_server

TOOL = {
    "type": "function",
    "function": {
        "name": "report",
        "parameters": {"type": "object", "properties": {"by": {"type": "string"}}},
    },
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"by": {"enum": list(NAMES)}, "well": {"type": "boolean"}},
            "required": ["by", "well"],
        },
    },
}


@pytest.fixture(scope="module", params=STRATEGIES)
def openai_client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    app = create_app(orchestrator_of(request.param, timeout_s=10, faults={"share": 0.0}))
    with (
        running_server(app) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_tool_is_called_by_the_one_who_answers(openai_client):
    answer = openai_client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "report"}], tools=[TOOL]
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.id
    assert call.function.name == "report"
    assert json.loads(call.function.arguments) == {"by": answer.model}


def test_a_streamed_tool_call_is_one_experts(openai_client):
    with openai_client.chat.completions.stream(
        model="auto", messages=[{"role": "user", "content": "report"}], tools=[TOOL]
    ) as stream:
        models = {event.chunk.model for event in stream if event.type == "chunk"}
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert {json.loads(call.function.arguments)["by"]} == models


@pytest.mark.parametrize("stream", [False, True])
def test_json_keeps_to_its_schema(openai_client, stream):
    given = {
        "model": "auto",
        "messages": [{"role": "user", "content": "answer as JSON"}],
        "response_format": FORMAT,
    }
    if stream:
        chunks = list(openai_client.chat.completions.create(**given, stream=True))
        model = chunks[0].model
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    else:
        answer = openai_client.chat.completions.create(**given)
        model, text = answer.model, answer.choices[0].message.content
    assert json.loads(text) == {"by": model, "well": True}


def test_a_tools_result_is_answered(openai_client):
    call = {"id": "call_1", "type": "function", "function": {"name": "report", "arguments": "{}"}}
    answer = openai_client.chat.completions.create(
        model="auto",
        messages=[
            {"role": "user", "content": "is all well?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "yes"},
        ],
    )
    assert answer.choices[0].message.content == f"{answer.model} says all is well"
