from __future__ import annotations

import pytest

from experts.features import required_features
from experts.types import ExpertCard
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.pool import (
    Conversation,
    estimated_prompt_tokens,
    has_content,
    prompt_text,
    split_pool,
)
from tests.orchestrator.support import chat_request, text_request

TOOL = {"type": "function", "function": {"name": "weather"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}


def chat(*messages, **fields):
    return chat_request(messages=list(messages), **fields)


def user(content):
    return {"role": "user", "content": content}


def test_routers_see_the_last_user_message():
    request = chat(user("first"), {"role": "assistant", "content": "yes"}, user("second"),
                   {"role": "tool", "content": "42", "tool_call_id": "1"})  # fmt: skip
    assert prompt_text(request) == "second"


def test_routers_see_the_last_message_if_no_user_speaks():
    assert prompt_text(chat({"role": "system", "content": "be brief"})) == "be brief"


def test_text_parts_are_joined_and_images_left_out():
    parts = [{"type": "text", "text": "what"}, IMAGE, {"type": "text", "text": "is this"}]
    assert prompt_text(chat(user(parts))) == "what\nis this"


def test_prompts_are_joined():
    assert prompt_text(text_request(prompt=["a", "b"])) == "a\nb"


def test_prompt_tokens_are_estimated_over_the_whole_conversation():
    assert estimated_prompt_tokens(chat(user("x" * 40), user("y" * 40))) == 20


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, {"chat"}),
        ({"tools": [TOOL]}, {"chat", "tools"}),
        ({"response_format": {"type": "text"}}, {"chat"}),
        ({"response_format": {"type": "json_object"}}, {"chat", "json_schema"}),
        ({"response_format": SCHEMA}, {"chat", "json_schema"}),
        ({"logprobs": True}, {"chat", "logprobs"}),
        ({"messages": [user([IMAGE])]}, {"chat", "images"}),
        ({"structured_outputs": {"choice": ["a"]}}, {"chat", "choice"}),
        # Engines say what is wrong with these.
        ({"structured_outputs": 5}, {"chat"}),
        ({"structured_outputs": True}, {"chat"}),
    ],
)
def test_chat_requests_say_what_they_need(fields, needed):
    assert required_features(chat_request(**fields)).keys() == needed


def test_text_completions_say_what_they_need():
    assert required_features(text_request()).keys() == {"completion"}
    assert required_features(text_request(logprobs=0)).keys() == {"completion", "logprobs"}


@pytest.mark.parametrize(
    ("request_", "filled"),
    [
        (chat(user("a")), True),
        (chat(user(" \n")), False),
        (chat(user([])), False),
        (chat(user([IMAGE])), True),
        (chat({"role": "system", "content": "a"}, user("")), True),
        (text_request("\n"), True),
        (text_request(""), False),
        (text_request(prompt=["a", ""]), False),
    ],
)
def test_blank_requests_are_told_from_filled_ones(request_, filled):
    assert has_content(request_) is filled


def test_experts_that_lack_something_are_excluded_with_the_reason():
    able = ExpertCard(name="able", capabilities=frozenset({"chat", "tools"}))
    unable = ExpertCard(name="unable", capabilities=frozenset({"chat"}))
    pool, excluded = split_pool(chat_request(tools=[TOOL]), [unable, able])
    assert [card.name for card in pool] == ["able"]
    assert excluded == {"unable": "lacks tools"}


def test_experts_with_a_context_that_is_surely_too_short_are_excluded():
    cards = [ExpertCard(name=str(length), context_length=length) for length in (100, 200)]
    pool, excluded = split_pool(chat_request("word " * 320), [*cards, ExpertCard(name="unknown")])
    assert [card.name for card in pool] == ["200", "unknown"]
    assert excluded == {"100": "context of 100 tokens is too short"}


SPOKEN = (
    user("one"), {"role": "assistant", "content": "yes"}, user("two"), user(""),
    {"role": "assistant", "content": "no"}, user("three"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("conversation", "seen"),
    [
        ("last_turn", "three"),
        ({"type": "last_turn", "turns": 2}, "three"),
        ("recent_turns", "three\ntwo\none"),
        ({"type": "recent_turns", "turns": 2}, "three\ntwo"),
        ({"type": "recent_turns", "max_characters": 7}, "three\nt"),
        ({"type": "recent_turns", "turns": 1}, "three"),
    ],
)
def test_routers_see_what_the_route_shows_them(conversation, seen):
    assert prompt_text(chat(*SPOKEN), Conversation.model_validate(conversation)) == seen


@pytest.mark.parametrize("conversation", ["last_turn", "recent_turns"])
async def test_a_follow_up_is_understood_with_the_turns_before_it(conversation):
    experts = ("general", "maths", "intents", "docstrings", "extract")
    config = parse_config(
        {
            "experts": [{"name": name, "engine": "scripted"} for name in experts],
            "routers": {"auto": {"type": "artefact", "path": "package:routers/embedded/auto"}},
            "routes": {"auto": {"router": "auto", "conversation": conversation}},
        }
    )
    orchestrator = Orchestrator(config, {}, load_routers(config))
    question = user("What is 412 minus 57?")
    assert (await orchestrator.decide(chat(question))).experts[0] == "maths"
    reply = {"role": "assistant", "content": "355"}
    follow_up = await orchestrator.decide(chat(question, reply, user("and in French?")))
    assert follow_up.category == ("maths" if conversation == "recent_turns" else "general")
