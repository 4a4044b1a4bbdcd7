"""Shadows: copies are judged blindly, and nobody who is answered notices."""

from __future__ import annotations

import asyncio
import time

import pytest

from experts.types import ChatRequest, collect
from orchestrator.config import parse_config
from orchestrator.decision import RequestContext
from orchestrator.options import RoutingOptions
from tests.orchestrator.composing import TOOL
from tests.orchestrator.support import (
    CHAT,
    LOOK_S,
    LoopClock,
    build,
    chat_body,
    chat_request,
    client,
    config_content,
    expert,
    metric,
    written,
)


def shadowed(rules=None, *, server=None, **shadow):
    """An ``auto`` by ``large`` with a shadow by ``small`` that ``medium`` judges."""
    fields = {"route": "copy", "judge": "medium", "share": 1.0, **shadow}
    routes = {
        "auto": {"router": "table", "strategy": {"type": "single"}, "shadow": fields},
        "copy": {
            "router": "table",
            "strategy": {"type": "single"},
            "policy": {"cost_quality": 0},
        },
    }
    content = config_content(routes=routes, **({"server": server} if server else {}))
    for entry in content["experts"]:
        given = (rules or {}).get(entry["name"], entry["rules"])
        entry["rules"] = given if isinstance(given, list) else [given]
    return build(parse_config(content))


async def asked(orchestrator, text="hello", *, options=None, **fields):
    """One answered request; how long it took."""
    context = RequestContext(deadline=time.monotonic() + 5)
    request = chat_request(text, **fields)
    async with LoopClock() as clock:
        decision = await orchestrator.decide(request, options=options, context=context)
        completion = await collect(orchestrator.run(request, decision, context))
    assert completion.text.startswith("large")
    return clock.seconds


async def counts(orchestrator):
    """What became of copies."""
    await written(orchestrator)
    return await orchestrator.shadows.shadows["auto"].counts.read()


async def settled(orchestrator, n):
    """Wait until so many copies are done."""
    for _ in range(1000):
        if sum((await counts(orchestrator)).values()) == n:
            return
        await asyncio.sleep(LOOK_S)
    pytest.fail("copies are not done in time")


async def test_a_judge_that_favours_a_position_favours_no_route():
    orchestrator = shadowed({"medium": {"answer": "Better: A"}}, max_in_flight=100)
    for number in range(20):
        await asked(orchestrator, f"question {number}")
    await settled(orchestrator, 20)
    assert (await counts(orchestrator))["equal"] == 20
    assert (await orchestrator.shadows.shadows["auto"].results())["verdict"] == "undecided"


async def test_the_judge_sees_both_answers_in_both_orders_and_no_names_of_routes():
    orchestrator = shadowed({"medium": {"answer": "Better: TIE"}})
    await asked(orchestrator, "what is it?")
    await settled(orchestrator, 1)
    prompts = []
    for request in expert(orchestrator, "medium").requests:
        assert isinstance(request, ChatRequest)
        prompts.append(request.messages[0].text)
    large, small = "large says hello to you", "small says hello to you"
    for prompt in prompts:
        for part in ("what is it?", large, small):
            assert part in prompt
        assert "auto" not in prompt
    assert sorted(prompt.index(large) < prompt.index(small) for prompt in prompts) == [False, True]
    assert (await counts(orchestrator))["equal"] == 1


async def test_the_better_route_is_found():
    sees_small_first = {"match": r"\[answer A [0-9a-f]+\]\nsmall", "answer": "Better: A"}
    judge = [sees_small_first, {"answer": "Rather the second. Better: B"}]
    orchestrator = shadowed({"medium": judge}, max_in_flight=200)
    for number in range(60):
        await asked(orchestrator, f"question {number}")
    await settled(orchestrator, 60)
    results = await orchestrator.shadows.shadows["auto"].results()
    assert (results["verdict"], results["kind"]) == ("b", "shadow")
    assert results["low"] > 0


async def test_equal_answers_need_no_judge():
    orchestrator = shadowed({"small": {"answer": "large says hello to you"}})
    await asked(orchestrator)
    await settled(orchestrator, 1)
    assert (await counts(orchestrator))["equal"] == 1
    assert not expert(orchestrator, "medium").requests


@pytest.mark.parametrize(
    "rules",
    [
        {"small": {"error": "unavailable"}},
        {"medium": {"error": "failed"}},
        {"medium": {"answer": "I cannot say"}},
        {"small": {"delay_s": 30}},
    ],
)
async def test_a_copy_that_fails_or_hangs_neither_fails_nor_delays_the_answer(rules):
    orchestrator = shadowed(rules, timeout_s=0.2)
    assert await asked(orchestrator) < 0.2
    await settled(orchestrator, 1)
    assert (await counts(orchestrator))["failed"] == 1
    assert expert(orchestrator, "small").active == 0


async def test_a_copy_keeps_to_its_cost_cap():
    orchestrator = shadowed(max_cost_usd=1e-9)
    await asked(orchestrator)
    await settled(orchestrator, 1)
    assert (await counts(orchestrator))["failed"] == 1
    assert not expert(orchestrator, "small").requests


async def test_copies_are_dropped_where_there_is_no_room():
    orchestrator = shadowed({"small": {"delay_s": 30}}, max_in_flight=1)
    for _ in range(3):
        await asked(orchestrator)
    assert (await counts(orchestrator))["dropped"] == 2
    orchestrator.shadows.has_room = lambda: False
    await asked(orchestrator)
    assert (await counts(orchestrator))["dropped"] == 3
    await orchestrator.aclose()
    assert expert(orchestrator, "small").active == 0


async def test_a_service_for_one_request_at_a_time_has_room_for_copies():
    orchestrator = shadowed(server={"limits": {"max_in_flight": 1}})
    assert (await client(orchestrator).post(CHAT, json=chat_body())).status_code == 200
    await settled(orchestrator, 1)
    assert not (await counts(orchestrator))["dropped"]


async def test_requests_that_say_who_may_see_them_are_not_copied():
    orchestrator = shadowed()
    await asked(orchestrator, options=RoutingOptions(allowed_models=["large"]))
    await asked(orchestrator, n=2)
    await asyncio.sleep(0.05)
    assert not any((await counts(orchestrator)).values())
    assert not expert(orchestrator, "small").requests


async def test_a_copy_has_the_requests_own_options():
    orchestrator = shadowed()
    await asked(orchestrator, options=RoutingOptions(cost_quality=1.0, session_id="one"))
    await settled(orchestrator, 1)
    assert len(expert(orchestrator, "large").requests) == 2
    assert not expert(orchestrator, "small").requests


async def test_a_copy_that_calls_a_tool_is_dropped():
    orchestrator = shadowed({"small": {"tool_call": {"name": "weather"}}})
    await asked(orchestrator, tools=[TOOL])
    await settled(orchestrator, 1)
    assert (await counts(orchestrator))["dropped"] == 1
    assert expert(orchestrator, "small").requests
    assert not expert(orchestrator, "medium").requests


async def test_only_the_wanted_share_is_copied():
    orchestrator = shadowed(share=0.2, max_in_flight=100)
    for number in range(150):
        await asked(orchestrator, f"question {number}")
    await asyncio.sleep(0.2)
    assert 12 <= sum((await counts(orchestrator)).values()) <= 50


async def test_copies_are_counted_and_listed_over_http():
    orchestrator = shadowed({"medium": {"answer": "Better: A"}})
    async with client(orchestrator) as http:
        answer = await http.post(CHAT, json=chat_body(stream=True))
        assert answer.headers["x-collegium-path"] == "large"
        await settled(orchestrator, 1)
        page = (await http.get("/metrics")).text
        listed = (await http.get("/v1/experiments")).json()["data"]
    assert metric(page, 'collegium_shadow_total{outcome="equal",route="auto"}') == 1
    for name, purpose, times in (("small", "shadow_answer", 1), ("medium", "shadow_judge", 2)):
        labels = f'expert="{name}",outcome="ok",purpose="{purpose}"'
        assert metric(page, f"collegium_expert_calls_total{{{labels}}}") == times
    assert [(one["name"], one["kind"]) for one in listed] == [("auto", "shadow")]
    assert sum(listed[0]["counts"].values()) == 1
