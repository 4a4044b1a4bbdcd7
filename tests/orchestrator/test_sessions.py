"""Sessions: leaving an expert that has read the conversation has its price."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from orchestrator.http.app import create_app
from tests.orchestrator.support import (
    CHAT,
    ROUTE,
    build,
    chat_body,
    client,
    config_content,
    config_with_rules,
    expert,
    written,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
LONG = "word " * 2000


def service(
    knob: float = 0.5, quality: dict[str, float] | None = None, prices: Any = None, **sessions: Any
) -> Orchestrator:
    """Two experts of about the same worth, and a route that weighs quality against cost."""
    prices = prices or {"small": (1, 1), "large": (1.2, 1.2)}
    content = config_content(
        experts=[
            {"name": name, "engine": "scripted", "input_usd_per_mtok": read,
             "output_usd_per_mtok": write, "rules": [{"answer": name}]}
            for name, (read, write) in prices.items()
        ],
        routers={"table": {"type": "static", "quality": quality or {"small": 0.6, "large": 0.6}}},
        routes={"auto": {"router": "table", "policy": {"cost_quality": knob}}},
        sessions=sessions,
    )  # fmt: skip
    return build(parse_config(content))


async def answer(orchestrator: Orchestrator, body: dict[str, Any]) -> str:
    response = await client(orchestrator).post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


async def decision(orchestrator: Orchestrator, body: dict[str, Any]) -> Any:
    return (await client(orchestrator).post(ROUTE, json=body)).json()


async def test_whoever_has_read_the_conversation_stays():
    orchestrator = service()
    assert await answer(orchestrator, chat_body(LONG)) == "small"
    assert await answer(orchestrator, chat_body(LONG, model="large", session_id="one")) == "large"
    assert await answer(orchestrator, chat_body(LONG, session_id="one")) == "large"
    assert await answer(orchestrator, chat_body(LONG, session_id="other")) == "small"
    assert await answer(orchestrator, chat_body(LONG)) == "small"


async def test_the_price_is_that_of_the_earlier_turns_without_their_cached_share():
    orchestrator = service(cached_input_share=0.25)
    await answer(orchestrator, chat_body(LONG, model="large", session_id="one"))
    without = await decision(orchestrator, chat_body(LONG))
    within = await decision(orchestrator, chat_body(LONG, session_id="one"))
    cost = {
        name: [next(c for c in d["candidates"] if c["expert"] == name) for d in (without, within)]
        for name in ("small", "large")
    }
    assert within["session"] == {
        "expert": "large", "cached_tokens": 2001, "stickiness": 0.0, "tool_call": False,
        "cached_usd": pytest.approx(2001 * 1.2e-6 * 0.75),
    }  # fmt: skip
    assert without["session"] is None
    saved = cost["large"][0]["cost_usd"] - cost["large"][1]["cost_usd"]
    assert saved == pytest.approx(within["session"]["cached_usd"])
    assert cost["small"][0]["cost_usd"] == cost["small"][1]["cost_usd"]
    assert cost["large"][1]["utility"] > cost["large"][0]["utility"]
    assert cost["large"][0]["quality"] == cost["large"][1]["quality"]


@pytest.mark.parametrize(("gain", "chosen"), [(0.1, "small"), (0.9, "large")])
async def test_a_gain_that_is_worth_it_switches(gain, chosen):
    prices = {"small": (1, 1), "large": (2, 2)}
    orchestrator = service(0.5, {"small": 0.1, "large": 0.1 + gain}, prices)
    assert (await decision(orchestrator, chat_body(LONG)))["experts"][0] == (
        "small" if gain < 0.5 else "large"
    )
    await answer(orchestrator, chat_body(LONG, model="small", session_id="one"))
    found = await decision(orchestrator, chat_body(LONG, session_id="one"))
    assert found["experts"][0] == chosen


@pytest.mark.parametrize(("lead", "chosen"), [(0.01, "small"), (0.03, "large")])
async def test_without_prices_others_must_be_better_by_a_little(lead, chosen):
    free = {"small": (0, 0), "large": (0, 0)}
    orchestrator = service(1.0, {"small": 0.6, "large": 0.6 + lead}, free)
    await answer(orchestrator, chat_body(model="small", session_id="one"))
    found = await decision(orchestrator, chat_body(session_id="one"))
    assert found["experts"][0] == chosen
    assert found["session"]["stickiness"] == 0.02
    assert {c["expert"]: c["quality"] for c in found["candidates"]} == pytest.approx(
        {"small": 0.6, "large": 0.6 + lead}
    )


async def test_a_conversation_grows_and_the_last_expert_counts():
    orchestrator = service()
    for name, text in (("small", "one two"), ("large", "one two three")):
        await answer(orchestrator, chat_body(text, model=name, session_id="one"))
    found = await decision(orchestrator, chat_body(LONG, session_id="one"))
    assert found["session"]["expert"] == "large"
    # What was read and what was written, in words as scripted experts count.
    assert found["session"]["cached_tokens"] == 4


async def test_a_tools_result_goes_to_who_called_it():
    content = config_content(sessions={"stickiness": 0})
    content["experts"][0]["rules"] = [{"tool_call": {"name": "weather"}, "answer": "done"}]
    orchestrator = build(parse_config(content))
    http = client(orchestrator)
    body = chat_body("how warm is it?", tools=[TOOL], session_id="one")
    first = (await http.post(CHAT, json={**body, "model": "small"})).json()
    message = first["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "20"}
    messages = [*body["messages"], message, result]
    found = await decision(orchestrator, {**body, "messages": messages})
    assert found["experts"] == ["small", "large", "medium"]
    assert found["session"]["tool_call"]
    other = {**result, "tool_call_id": "another"}
    found = await decision(orchestrator, {**body, "messages": [*messages[:-1], other]})
    assert found["experts"][0] == "large"
    asked = {**body, "messages": messages, "allowed_models": ["medium", "large"]}
    found = await decision(orchestrator, asked)
    assert found["experts"][0] == "large"
    assert found["session"] is None


async def test_who_answered_after_a_failure_is_remembered():
    content = {"large": {"error": "unavailable"}}
    orchestrator = build(config_with_rules(content, sessions={}))
    for stream in (True, False):
        body = chat_body(session_id=f"s{stream}", stream=stream)
        assert (await client(orchestrator).post(CHAT, json=body)).status_code == 200
        found = await decision(orchestrator, body)
        assert found["session"]["expert"] == "medium"


async def test_an_answer_from_the_cache_is_nobodys_turn():
    content = config_content(sessions={}, cache={})
    orchestrator = build(parse_config(content))
    for session in ("one", "two"):
        await answer(orchestrator, chat_body(temperature=0, session_id=session))
        await written(orchestrator)
    assert len(expert(orchestrator, "large").requests) == 1
    assert (await decision(orchestrator, chat_body(session_id="one")))["session"]
    assert (await decision(orchestrator, chat_body(session_id="two")))["session"] is None


async def test_sessions_belong_to_a_key():
    http = client(create_app(service(), api_keys=["mine", "yours"]))
    body = chat_body(LONG, session_id="one")
    keys = {key: {"authorization": f"Bearer {key}"} for key in ("mine", "yours")}
    await http.post(CHAT, json={**body, "model": "large"}, headers=keys["mine"])
    for key, found in (("mine", "large"), ("yours", None)):
        session = (await http.post(ROUTE, json=body, headers=keys[key])).json()["session"]
        assert (session and session["expert"]) == found


async def test_sessions_are_off_unless_configured():
    orchestrator = build(parse_config(config_content()))
    await answer(orchestrator, chat_body(session_id="one"))
    assert (await decision(orchestrator, chat_body(session_id="one")))["session"] is None
