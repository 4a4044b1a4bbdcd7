from __future__ import annotations

import asyncio
import json
import time

import pytest

from experts import errors
from experts.config import ScriptedExpertConfig, ScriptedToolCall, ScriptRule
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest, CompletionRequest, collect


def _expert(*rules, **options):
    return ScriptedExpert(
        ScriptedExpertConfig(
            name="s", engine="scripted", rules=rules or (ScriptRule(answer="one two three"),),
            **options,
        )
    )  # fmt: skip


def _chat(text="hello", **fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": text}], **fields})


async def _ask(expert, request=None, timeout_s=5.0):
    return await collect(expert.stream(request or _chat(), timeout_s=timeout_s))


async def test_first_rule_that_matches_answers_with_the_users_text():
    expert = _expert(ScriptRule(match="sum|add", answer="4"), ScriptRule(answer="You said: {text}"))
    assert (await _ask(expert, _chat("add 2 and 2"))).text == "4"
    assert (await _ask(expert, _chat("hi {x}"))).text == "You said: hi {x}"


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
async def test_answer_comes_in_as_many_pieces_as_scripted(chunks):
    expert = _expert(ScriptRule(answer="one two three ", chunks=chunks))
    pieces = [chunk async for chunk in expert.stream(_chat(), timeout_s=5)]
    assert len(pieces) == chunks + 1
    assert "".join(piece.text for piece in pieces) == "one two three "
    assert pieces[-2].finish_reason == "stop"


async def test_words_count_as_tokens():
    answer = await _ask(_expert(), _chat("a b", max_tokens=2))
    assert (answer.text, answer.choices[0].finish_reason) == ("one two", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 2)


async def test_stop_text_ends_the_answer():
    answer = await _ask(_expert(), _chat(stop=["thr", "zzz"]))
    assert (answer.text, answer.choices[0].finish_reason) == ("one two ", "stop")


async def test_n_choices_and_several_prompts():
    request = CompletionRequest(prompt=["a", "b"], n=2)
    answer = await _ask(_expert(ScriptRule(answer="<{text}>")), request)
    assert [choice.text for choice in answer.choices] == ["<a>", "<a>", "<b>", "<b>"]


async def test_logprobs_have_one_entry_per_word():
    answer = await _ask(_expert(), _chat(logprobs=True, top_logprobs=1))
    entries = answer.choices[0].logprobs["content"]
    assert [entry["token"] for entry in entries] == ["one", " two", " three"]
    plain = await _ask(_expert(), CompletionRequest(prompt="a", logprobs=1))
    assert plain.choices[0].logprobs["tokens"] == ["one", " two", " three"]


async def test_tool_is_called_only_if_offered():
    expert = _expert(
        ScriptRule(tool_call=ScriptedToolCall(name="f", arguments={"x": 1}), answer="no tools")
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = (await _ask(expert, _chat(tools=tools))).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.tool_calls[0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert (await _ask(expert, _chat(tools=tools, tool_choice="none"))).text == "no tools"
    assert (await _ask(expert)).text == "no tools"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("unavailable", errors.ExpertUnavailableError),
        ("timeout", errors.ExpertTimeoutError),
        ("overloaded", errors.ExpertOverloadedError),
        ("failed", errors.ExpertFailedError),
        ("auth", errors.ExpertAuthError),
        ("invalid", errors.InvalidRequestError),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
async def test_fails_after_the_scripted_number_of_pieces(kind, error, after):
    expert = _expert(ScriptRule(answer="one two three", error=kind, error_after_chunks=after))
    pieces = []

    async def read():
        async for chunk in expert.stream(_chat(), timeout_s=5):
            pieces.append(chunk.text)

    with pytest.raises(error):
        await read()
    assert "".join(pieces) == ("one two" if after else "")
    assert expert.active == 0


@pytest.mark.parametrize(
    ("lost_after", "said"),
    [
        (None, [{"a": 0.5, "b": 0.1}, None, None]),
        (0, [{"b": 0.1}, None, None]),
        (2, [{"a": 0.5, "b": 0.1}, None, {"b": 0.1}]),
    ],
)
async def test_says_whom_it_listens_to(lost_after, said):
    expert = _expert(ScriptRule(answer="one two three", peer_lost_after_chunks=lost_after))
    request = _chat(peers={"a": 0.5, "b": 0.1})
    *pieces, _ = [chunk async for chunk in expert.stream(request, timeout_s=5)]
    assert [piece.peers for piece in pieces] == said
    assert "".join(piece.text for piece in pieces) == "one two three"


async def test_says_nothing_of_peers_unless_asked():
    assert all([chunk.peers is None async for chunk in _expert().stream(_chat(), timeout_s=5)])
    alone = [chunk.peers async for chunk in _expert().stream(_chat(peers={}), timeout_s=5)]
    assert alone == [{}, None, None, None]


@pytest.mark.parametrize("peers", [["a"], {"a": 0}, {"a": 1.5}, {"a": "much"}])
async def test_refuses_peers_without_gates(peers):
    with pytest.raises(errors.InvalidRequestError, match="peers"):
        await _ask(_expert(), _chat(peers=peers))


async def test_delays_and_deadline():
    slow = _expert(ScriptRule(answer="one two three", delay_s=0.02, chunk_delay_s=0.02))
    started = time.monotonic()
    await _ask(slow)
    assert time.monotonic() - started >= 0.06
    with pytest.raises(errors.ExpertTimeoutError):
        await _ask(slow, timeout_s=0.03)


async def test_cancellation_ends_the_answer():
    expert = _expert(ScriptRule(delay_s=60))
    task = asyncio.create_task(_ask(expert))
    await asyncio.sleep(0.01)
    assert expert.active == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert expert.active == 0


async def test_requests_are_recorded():
    expert = _expert()
    await _ask(expert, _chat("first"))
    await _ask(expert, _chat("second"))
    assert [request.messages[0].text for request in expert.requests] == ["first", "second"]


async def test_refuses_what_its_card_does_not_promise():
    expert = _expert(capabilities={"chat"}, context_length=16)
    with pytest.raises(errors.UnsupportedFeatureError, match="logprobs"):
        await _ask(expert, _chat(logprobs=True))
    with pytest.raises(errors.ContextLengthError):
        await _ask(expert, _chat("word " * 17))


async def test_closed_expert_is_unavailable():
    expert = _expert()
    await expert.aclose()
    await expert.aclose()
    with pytest.raises(errors.ExpertUnavailableError):
        await expert.check_health()
    with pytest.raises(errors.ExpertUnavailableError):
        await _ask(expert)


def _faulty(kind, *rules, share=1.0):
    faults = {"share": share, "kinds": [kind], "seed": 3}
    return _expert(*rules, faults=faults)


@pytest.mark.parametrize(
    ("kind", "error", "pieces"),
    [
        ("error", errors.ExpertFailedError, 0),
        ("timeout", errors.ExpertTimeoutError, 0),
        ("hang", errors.ExpertTimeoutError, 0),
        ("broken", errors.ExpertFailedError, 1),
    ],
)
async def test_faults_are_errors_before_or_after_the_first_piece(kind, error, pieces):
    stream = _faulty(kind).stream(_chat(), timeout_s=0.05)
    for _ in range(pieces):
        await anext(stream)
    with pytest.raises(error):
        await anext(stream)


async def test_a_truncated_answer_says_so():
    answer = await _ask(_faulty("truncated", ScriptRule(answer="1 2 3 4")))
    assert (answer.text, answer.choices[0].finish_reason) == ("1 2", "length")


async def test_garbage_is_no_json_where_json_is_wanted_and_leaves_other_answers_alone():
    garbage = _faulty("garbage", ScriptRule(answer='{"a": 1}'))
    assert (await _ask(garbage)).text == '{"a": 1}'
    answer = await _ask(garbage, _chat(response_format={"type": "json_object"}))
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(answer.text)


@pytest.mark.parametrize(
    ("kind", "reason"), [("truncated", "length"), ("garbage", "tool_calls"), ("broken", None)]
)
async def test_faulty_tool_calls_have_half_of_their_arguments(kind, reason):
    call = ScriptedToolCall(name="f", arguments={"city": "Graz"})
    request = _chat(tools=[{"type": "function", "function": {"name": "f"}}])
    first = await anext(_faulty(kind, ScriptRule(tool_call=call)).stream(request, timeout_s=5))
    assert first.tool_calls[0]["function"]["arguments"] == '{"city":'
    assert first.finish_reason == reason


async def test_faults_come_in_their_share_and_the_same_every_time():
    async def outcomes():
        expert = _faulty("error", share=0.3)
        found = []
        for _ in range(500):
            try:
                await _ask(expert)
                found.append(True)
            except errors.ExpertFailedError:
                found.append(False)
        return found

    first = await outcomes()
    assert first == await outcomes()
    assert 0.6 < sum(first) / len(first) < 0.8
