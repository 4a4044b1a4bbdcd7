"""Three in ten calls of experts go wrong. What comes out is right, or one error."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from orchestrator.http.errors import ERRORS, INTERNAL
from tests.orchestrator.drill import NAMES, STRATEGIES, active, orchestrator_of
from tests.orchestrator.support import CHAT, LoopClock, chat_body, client, eventually, metric

DEADLINE_S = 0.3
REQUESTS = 45
AT_ONCE = 12
CODES = {code for _, _, code in [*ERRORS.values(), INTERNAL]}
TOOL = {"type": "function", "function": {"name": "report", "parameters": {"type": "object"}}}
SCHEMA = {
    "type": "object",
    "properties": {"by": {"enum": list(NAMES)}, "well": {"const": True}},
    "required": ["by", "well"],
}
FORMS: dict[str, dict[str, Any]] = {
    "text": chat_body("is all well?"),
    "json": chat_body(
        "answer as JSON",
        response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    ),
    "tool": chat_body("report", tools=[TOOL]),
}


def check_error(error: dict[str, Any]) -> str:
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] in CODES - {INTERNAL[2]}, error
    assert error["message"]
    return "error"


def check_answer(form: str, model: str, text: str, calls: list[list[str]], reason: str) -> str:
    """Right, as the one named expert would say it, or cut short and labelled so."""
    assert model in NAMES
    whole = {"text": f"{model} says all is well", "json": f'{{"by": "{model}", "well": true}}',
             "tool": f'{{"by": "{model}"}}'}[form]  # fmt: skip
    if form == "tool" and calls:
        ((name, said),) = calls
        assert name == "report"
        assert not text
    else:
        assert not calls
        # A panel's member has no tools and answers in words.
        whole = f"{model} says all is well" if form == "tool" else whole
        said = text
    if reason == "length":
        assert whole.startswith(said)
        return "cut"
    assert said == whole
    assert reason == ("tool_calls" if calls else "stop")
    return "right"


def check_plain(form: str, response: Any) -> str:
    body = response.json()
    if response.status_code != 200:
        return check_error(body["error"])
    (choice,) = body["choices"]
    message = choice["message"]
    calls = [[call["function"]["name"], call["function"]["arguments"]]
             for call in message.get("tool_calls") or ()]  # fmt: skip
    text = message["content"] or ""
    return check_answer(form, body["model"], text, calls, choice["finish_reason"])


def check_stream(form: str, response: Any) -> str:
    if response.status_code != 200:
        return check_error(response.json()["error"])
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(": ")]
    *chunks, last = data
    pieces = [json.loads(chunk) for chunk in chunks]
    assert all("error" not in piece for piece in pieces)
    models = {piece["model"] for piece in pieces}
    assert len(models) <= 1
    text, reasons = "", []
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        (choice,) = piece["choices"]
        text += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls") or ():
            call = calls.setdefault(delta["index"], ["", ""])
            call[0] += delta["function"].get("name") or ""
            call[1] += delta["function"].get("arguments") or ""
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    if last == "[DONE]":
        (reason,) = reasons
        return check_answer(form, models.pop(), text, list(calls.values()), reason)
    # What came before the error is the beginning of one expert's answer, and no end of it.
    assert not reasons
    if models:
        check_answer(form, models.pop(), text, list(calls.values()), "length")
    return check_error(json.loads(last)["error"])


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_every_request_ends_in_a_right_answer_or_one_error(strategy: str, stream: bool):
    orchestrator = orchestrator_of(
        strategy, timeout_s=DEADLINE_S, faults={"share": 0.3, "seed": 11}
    )
    http, places = client(orchestrator), asyncio.Semaphore(AT_ONCE)
    outcomes: Counter[str] = Counter()
    decided: list[str] = []

    async def ask(form: str) -> None:
        async with places:
            started = clock.seconds
            response = await http.post(CHAT, json={**FORMS[form], "stream": stream})
        assert clock.seconds - started < DEADLINE_S + 1
        check = check_stream if stream else check_plain
        outcomes[check(form, response)] += 1
        decided.append(response.headers["x-collegium-decision-id"])

    async with LoopClock() as clock:
        await asyncio.gather(*(ask(form) for form in [*FORMS] * (REQUESTS // len(FORMS))))
    assert active(orchestrator) == 0
    assert metric((await http.get("/metrics")).text, "collegium_in_flight_requests") == 0
    assert sum(outcomes.values()) == REQUESTS
    assert outcomes["right"] > REQUESTS / 3
    await eventually(lambda: orchestrator.memory.idle)
    logged = await orchestrator.memory.store.scan("decisions", limit=REQUESTS + 1)
    assert sorted(id for id, _ in logged) == sorted(decided), "one row for each"
