from __future__ import annotations

import pytest
from pydantic import ValidationError

from experts.types import ChatRequest, Chunk, CompletionRequest, Message, Usage, collect


async def _stream(*chunks):
    for chunk in chunks:
        yield chunk


def _chat(**fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})


async def test_collect_joins_texts_and_takes_the_last_usage():
    answer = await collect(
        _stream(
            Chunk(text="a", usage=Usage.of(3, 1)),
            Chunk(text="b", finish_reason="stop"),
            Chunk(usage=Usage.of(3, 2)),
        )
    )
    assert answer.text == "ab"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)


async def test_collect_orders_choices_by_index():
    answer = await collect(_stream(Chunk(2, "c"), Chunk(0, "a"), Chunk(1, "b"), Chunk(0, "A")))
    assert [choice.text for choice in answer.choices] == ["aA", "b", "c"]


async def test_collect_of_nothing_is_one_empty_choice():
    answer = await collect(_stream())
    assert (answer.text, len(answer.choices)) == ("", 1)


async def test_collect_merges_pieces_of_tool_calls():
    first = {"index": 0, "id": "call_1", "function": {"name": "add", "arguments": '{"a":'}}
    more = {"index": 0, "function": {"arguments": " 1}"}}
    other = {"index": 1, "id": "call_2", "function": {"name": "sub", "arguments": "{}"}}
    chunks = [Chunk(tool_calls=[first]), Chunk(tool_calls=[more]), Chunk(tool_calls=[other])]
    calls = (await collect(_stream(*chunks))).choices[0].tool_calls
    assert calls == [
        {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
        {"id": "call_2", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
    ]


async def test_collect_concatenates_logprobs():
    entries = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]
    chunks = [Chunk(logprobs={"content": [entry]}) for entry in entries]
    assert (await collect(_stream(*chunks))).choices[0].logprobs == {"content": entries}


@pytest.mark.parametrize(
    ("stop", "texts"), [(None, ()), ("x", ("x",)), ("", ()), (["a", "", "b"], ("a", "b"))]
)
def test_stop_texts_are_a_tuple_without_empty_ones(stop, texts):
    assert _chat(stop=stop).stop_texts == texts


def test_unknown_fields_are_kept():
    request = _chat(guided_choice=["a"], messages=[{"role": "user", "content": "hi", "mood": 1}])
    assert request.model_extra == {"guided_choice": ["a"]}
    assert request.model_dump(exclude_unset=True)["messages"][0]["mood"] == 1


def test_token_limit_prefers_the_newer_name():
    assert _chat(max_tokens=5).token_limit == 5
    assert _chat(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert CompletionRequest(prompt="hi", max_tokens=3).token_limit == 3


def test_message_text_joins_text_parts():
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": "two"},
    ]
    assert Message.model_validate({"role": "user", "content": parts}).text == "one\ntwo"


@pytest.mark.parametrize(
    "fields", [{"temperature": 3}, {"n": 0}, {"messages": []}, {"top_p": 0}, {"stop": ["a"] * 5}]
)
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        _chat(**fields)
