"""The response cache: what is given again, to whom, and what never is."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from experts.config import ScriptedExpertConfig
from experts.scripted import ScriptedExpert
from experts.types import ChatRequest, Chunk, Usage
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import RequestContext
from orchestrator.http.app import create_app
from orchestrator.memory.base import StoreError
from orchestrator.memory.guard import Memory
from orchestrator.memory.semantic import QuestionIndex, SemanticConfig
from orchestrator.memory.sqlite import SQLiteStore
from orchestrator.options import RoutingOptions
from tests.orchestrator.support import (
    CHAT,
    ROUTE,
    TEXT,
    LoopClock,
    build,
    chat_body,
    client,
    config_content,
    config_with_rules,
    events,
    eventually,
    expert,
    metric,
    written,
)

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
STATE = "x-collegium-cache"


def service(rules: dict[str, Any] | None = None, **cache: Any) -> Orchestrator:
    return build(config_with_rules(rules or {}, cache=cache))


def fixed(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return chat_body(text, temperature=0, **fields)


async def ask(orchestrator: Orchestrator, body: dict[str, Any], **headers: str) -> Any:
    """The response; what is to be kept is kept by then."""
    response = await client(orchestrator).post(CHAT, json=body, headers=headers)
    await written(orchestrator)
    return response


def asked(orchestrator: Orchestrator, name: str = "large") -> int:
    return len(expert(orchestrator, name).requests)


async def test_the_same_request_gets_the_same_answer_for_nothing():
    orchestrator = service()
    first, second = [await ask(orchestrator, fixed()) for _ in range(2)]
    assert (first.headers[STATE], second.headers[STATE]) == ("miss", "hit")
    assert asked(orchestrator) == 1
    for body in (first.json(), second.json()):
        assert body["choices"][0]["message"]["content"] == "large says hello to you"
        assert body["model"] == "large"
        assert body["usage"]["completion_tokens"] == 5
    assert float(first.headers["x-collegium-cost"]) > 0
    assert float(second.headers["x-collegium-cost"]) == 0
    assert second.headers["x-collegium-model"] == "large"
    assert second.headers["x-collegium-policy"] == "cache"
    assert second.headers["x-collegium-route"] == "auto"
    assert "x-collegium-path" not in second.headers
    assert first.headers["x-collegium-decision-id"] != second.headers["x-collegium-decision-id"]


@pytest.mark.parametrize("streamed_first", [True, False])
async def test_plain_and_streamed_requests_share_answers(streamed_first):
    orchestrator = service()
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    bodies = [fixed(**options), fixed(user="me", session_id="one", priority="low")]
    answers = [
        await ask(orchestrator, body) for body in (bodies if streamed_first else bodies[::-1])
    ]
    assert [answer.headers[STATE] for answer in answers] == ["miss", "hit"]
    plain = answers[streamed_first].json()
    *chunks, usage, done = events(answers[not streamed_first].text)
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        == (plain["choices"][0]["message"]["content"])
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"] == plain["usage"]
    assert done == "[DONE]"


async def test_text_completions_are_kept_too():
    orchestrator = service()
    http = client(orchestrator)
    for state in ("miss", "hit"):
        body = {"prompt": ["a", "b"], "temperature": 0}
        response = await http.post(TEXT, json=body)
        await written(orchestrator)
        assert response.headers[STATE] == state
        assert len(response.json()["choices"]) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "hello!"}]},
        {"max_tokens": 50},
        {"seed": 1},
        {"stop": "x"},
        {"model": "large"},
        {"model": "auto-cheap"},
        {"route": "auto-cheap"},
        {"cost_quality": 0.5},
        {"allowed_models": ["large"]},
        {"min_quality": 0.1},
        {"max_cost": 1.0},
        {"unknown_field": 1},
        {"response_format": {"type": "json_object"}},
    ],
)
async def test_what_changes_the_answer_is_another_request(change):
    orchestrator = service()
    await ask(orchestrator, fixed())
    assert (await ask(orchestrator, {**fixed(), **change})).headers[STATE] == "miss"


@pytest.mark.parametrize(
    "body",
    [
        chat_body(),
        chat_body(temperature=0.7),
        fixed(n=2),
        fixed(cache=False),
        {
            "temperature": 0,
            "messages": [
                {"role": "user", "content": "how warm is it?"},
                {"role": "assistant", "tool_calls": [
                    {"id": "1", "type": "function",
                     "function": {"name": "weather", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": "20 degrees"},
            ],
        },
    ],
)  # fmt: skip
async def test_some_requests_neither_get_nor_leave_an_answer(body):
    orchestrator = service()
    for number in (1, 2):
        assert (await ask(orchestrator, body)).headers[STATE] == "off"
        assert asked(orchestrator) == number


async def test_a_header_goes_round_the_cache():
    orchestrator = service()
    await ask(orchestrator, fixed())
    response = await ask(orchestrator, fixed(), **{STATE: "false"})
    assert response.headers[STATE] == "off"
    assert asked(orchestrator) == 2


async def test_a_seed_makes_a_request_deterministic_and_any_takes_all():
    orchestrator = service()
    states = [
        (await ask(orchestrator, chat_body(seed=1, temperature=1))).headers[STATE] for _ in "ab"
    ]
    assert states == ["miss", "hit"]
    orchestrator = service(requests="any")
    assert [(await ask(orchestrator, chat_body())).headers[STATE] for _ in "ab"] == ["miss", "hit"]


@pytest.mark.parametrize(
    ("rule", "body"),
    [
        ({"answer": "one two three"}, fixed(max_tokens=1)),
        ({"tool_call": {"name": "weather"}}, fixed(tools=[TOOL])),
        ({"error": "invalid"}, fixed()),
        ({"answer": "a b c", "error": "failed", "error_after_chunks": 1}, fixed(stream=True)),
        ({"answer": "long " * 100}, fixed()),
    ],
)
async def test_only_whole_answers_are_kept(rule, body):
    orchestrator = service({"large": rule}, max_answer_bytes=400)
    for number in (1, 2):
        assert (await ask(orchestrator, {**body, "model": "large"})).headers[STATE] == "miss"
        assert asked(orchestrator) == number


async def test_nothing_is_kept_of_a_stream_that_nobody_read_to_its_end():
    orchestrator = service()
    request = ChatRequest.model_validate({**fixed(), "stream": True})
    context = RequestContext(deadline=1e12)
    assert await orchestrator.recall(request, RoutingOptions(), context) is None
    decision = await orchestrator.decide(request, context=context)
    chunks = orchestrator.run(request, decision, context)
    await anext(chunks)
    await chunks.aclose()
    await written(orchestrator)
    assert (await ask(orchestrator, fixed())).headers[STATE] == "miss"


class WaitingStore(SQLiteStore):
    """A store that writes values once it may."""

    def __init__(self):
        super().__init__()
        self.may_write = asyncio.Event()

    async def put(self, key, value, *, ttl_s=None):
        await self.may_write.wait()
        await super().put(key, value, ttl_s=ttl_s)


async def test_an_answer_is_found_before_it_is_written():
    store = WaitingStore()
    config = parse_config(config_content(cache={}))
    orchestrator = build(config, Memory(store, timeout_s=10))
    http = client(orchestrator)
    found = [(await http.post(CHAT, json=fixed())).headers[STATE] for _ in "ab"]
    assert found == ["miss", "hit"]
    assert asked(orchestrator) == 1
    store.may_write.set()
    assert (await ask(orchestrator, fixed())).headers[STATE] == "hit"
    assert (await client(build(config, Memory(store))).post(CHAT, json=fixed())).headers[
        STATE
    ] == "hit"


class HalfAnEmoji(ScriptedExpert):
    """An expert that cuts its last sign in two."""

    async def stream(self, request, *, timeout_s):
        """Answer with half a pair of surrogates."""
        self.requests.append(request)
        yield Chunk(text="well \ud83d", finish_reason="stop")
        yield Chunk(usage=Usage.of(1, 1))


@pytest.mark.parametrize("stream", [True, False])
async def test_half_a_sign_is_answered_and_not_kept(stream):
    config = config_with_rules({}, cache={"semantic": {}})
    experts = {
        entry.name: HalfAnEmoji(entry)
        for entry in config.experts
        if isinstance(entry, ScriptedExpertConfig)
    }
    orchestrator = Orchestrator(config, experts, load_routers(config))
    for number in (1, 2):
        response = await ask(orchestrator, fixed(stream=stream))
        assert (response.status_code, response.headers[STATE]) == (200, "miss")
        assert "well " in response.text
        assert asked(orchestrator) == number


async def test_an_experts_name_is_no_route_once_it_was_asked_as_model():
    orchestrator = service()
    assert (await ask(orchestrator, fixed(model="large"))).headers[STATE] == "miss"
    assert (await ask(orchestrator, fixed(model="large"))).headers[STATE] == "hit"
    assert (await ask(orchestrator, fixed(route="large"))).status_code == 404


async def test_an_arm_of_an_experiment_gets_nothing_that_is_kept():
    experiments = {"try": {"a": "auto", "b": "auto-cheap", "by": "request"}}
    orchestrator = build(parse_config(config_content(cache={}, experiments=experiments)))
    for body in (fixed(model="try"), fixed(route="try")):
        for _ in "ab":
            assert (await ask(orchestrator, body)).headers[STATE] == "off"
    assert sum(asked(orchestrator, name) for name in ("small", "large")) == 4


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_in_place_of_one_that_failed_is_not_kept(stream):
    orchestrator = service({"large": {"error": "unavailable"}})
    for number in (1, 2):
        response = await ask(orchestrator, fixed(stream=stream))
        assert (response.status_code, response.headers[STATE]) == (200, "miss")
        assert asked(orchestrator, "medium") == number


async def test_an_answer_made_without_a_failed_expert_is_not_kept():
    rules = {"medium": {"error": "unavailable"}}
    routes = {"auto": {"router": "table", "strategy": {"type": "fusion", "experts": 3}}}
    orchestrator = build(config_with_rules(rules, routes=routes, cache={}))
    for _ in "ab":
        assert (await ask(orchestrator, fixed())).headers[STATE] == "miss"


async def test_another_key_never_gets_it():
    orchestrator = service(semantic={})
    http = client(create_app(orchestrator, api_keys=["mine", "yours"]))

    async def state(key: str, text: str) -> str:
        headers = {"authorization": f"Bearer {key}"}
        response = await http.post(CHAT, json=fixed(text), headers=headers)
        await written(orchestrator)
        return response.headers[STATE]

    one, other = "What is the capital of Kenya?", "Tell me, what is Kenya's capital?"
    assert await state("mine", one) == "miss"
    assert await state("yours", other) == "miss"
    assert await state("yours", one) == "semantic"
    assert await state("mine", one) == "hit"
    assert [await state(key, "Hi.") for key in ("mine", "yours", "yours")] == [
        "miss", "miss", "hit"
    ]  # fmt: skip


async def test_a_changed_config_gets_no_old_answers():
    store = SQLiteStore()
    for state, share in (("miss", 0.1), ("hit", 0.1), ("miss", 0.2)):
        content = config_content(cache={"semantic": {}}, sessions={"cached_input_share": share})
        config = parse_config(content)
        orchestrator = build(config)
        orchestrator = Orchestrator(
            config, orchestrator.experts, load_routers(config), Memory(store)
        )
        assert (await ask(orchestrator, fixed())).headers[STATE] == state


@pytest.mark.parametrize("text", ["What is a prime?", "Tell me what a prime is."])
async def test_answers_are_forgotten(text):
    orchestrator = service(ttl_s=0.05, semantic={})
    await ask(orchestrator, fixed("What is a prime?"))
    await asyncio.sleep(0.06)
    response = await client(orchestrator).post(CHAT, json=fixed(text))
    assert response.headers[STATE] == "miss"


class BrokenStore(SQLiteStore):
    """A store that has failed for good."""

    async def get(self, key):
        raise StoreError("gone")

    async def put(self, key, value, *, ttl_s=None):
        raise StoreError("gone")

    async def scan(self, log, *, after=None, limit):
        raise StoreError("gone")

    async def append(self, log, id, record):
        raise StoreError("gone")


async def test_a_broken_store_is_a_miss():
    config = parse_config(config_content(cache={"semantic": {}}, sessions={}))
    orchestrator = Orchestrator(
        config, build(config).experts, load_routers(config), Memory(BrokenStore())
    )
    http = client(orchestrator)
    failed: set[str] = set()
    orchestrator.memory.on_error = failed.add
    for body in (fixed(), fixed(stream=True), fixed(session_id="one")):
        for _ in range(2):
            response = await http.post(CHAT, json=body)
            await written(orchestrator)
            assert (response.status_code, response.headers[STATE]) == (200, "miss")
    assert failed >= {"cache", "semantic_cache", "sessions"}


class OldStore(SQLiteStore):
    """A store with values of another version."""

    async def get(self, key):
        return b'{"expert": 1}'


async def test_records_of_another_version_are_a_miss():
    config = parse_config(config_content(cache={"semantic": {}}))
    store = OldStore()
    orchestrator = Orchestrator(config, build(config).experts, load_routers(config), Memory(store))
    await store.append("semantic_cache:public", "old", b'{"text": "hello"}')
    await ask(orchestrator, fixed())
    assert (await ask(orchestrator, fixed())).headers[STATE] == "miss"


async def test_without_a_cache_nothing_is_said_of_it():
    response = await client(build(parse_config(config_content()))).post(CHAT, json=fixed())
    assert STATE not in response.headers


async def test_a_decision_alone_does_not_look():
    orchestrator = service()
    await ask(orchestrator, fixed())
    response = await client(orchestrator).post(ROUTE, json=fixed())
    assert response.json()["policy"] == "utility"
    assert STATE not in response.headers


async def test_lookups_are_counted():
    orchestrator = service()
    http = client(orchestrator)
    for body in (fixed(), fixed(), chat_body()):
        await http.post(CHAT, json=body)
        await written(orchestrator)
    page = (await http.get("/metrics")).text
    for state, count in (("miss", 1), ("hit", 1), ("off", 1), ("semantic", 0)):
        assert metric(page, f'collegium_cache_lookups_total{{state="{state}"}}') == count
    assert metric(page, "collegium_router_seconds_count") == 2


# --- questions in other words


async def states(orchestrator: Orchestrator, *bodies: dict[str, Any]) -> list[str]:
    return [(await ask(orchestrator, body)).headers[STATE] for body in bodies]


async def test_a_question_in_other_words_gets_the_answer():
    orchestrator = service(semantic={})
    questions = (
        "What is the capital of Kenya?",
        "Tell me, what is Kenya's capital?",
        "What is the capital of Peru?",
        "What is not the capital of Kenya?",
    )
    assert await states(orchestrator, *map(fixed, questions)) == [
        "miss", "semantic", "miss", "miss"
    ]  # fmt: skip


async def test_everything_else_must_be_the_same():
    orchestrator = service(semantic={})
    system = {"role": "system", "content": "Be brief."}
    earlier = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]

    def body(text: str, *before: dict[str, str], **fields: Any) -> dict[str, Any]:
        message = {"role": "user", "content": text}
        return {"messages": [*before, message], "temperature": 0, **fields}

    one, other = "What is the capital of Kenya?", "Tell me, what is Kenya's capital?"
    await ask(orchestrator, body(one, system, *earlier))
    found = await states(
        orchestrator,
        body(other),
        body(other, system),
        body(other, {"role": "system", "content": "Be long."}, *earlier),
        body(other, system, *earlier, max_tokens=7),
        body(other, system, *earlier, model="auto-cheap"),
        body(other, system, *earlier),
    )
    assert found == ["miss", "miss", "miss", "miss", "miss", "semantic"]


async def test_questions_survive_and_are_shared():
    config = parse_config(config_content(cache={"semantic": {}}))
    store = SQLiteStore()
    replicas = [
        Orchestrator(config, build(config).experts, load_routers(config), Memory(store))
        for _ in "ab"
    ]
    first, second = replicas
    assert await states(first, fixed("What is the capital of Kenya?")) == ["miss"]
    assert await states(second, fixed("Tell me, what is Kenya's capital?")) == ["semantic"]
    assert await states(second, fixed("What is the capital of Peru?")) == ["miss"]
    assert await states(first, fixed("Tell me, what is Peru's capital?")) == ["semantic"]


async def test_only_the_newest_questions_are_compared():
    orchestrator = service(semantic={"max_questions": 2})
    countries = ("Kenya", "Peru", "Laos")
    await states(orchestrator, *(fixed(f"What is the capital of {c}?") for c in countries))
    again = [fixed(f"Tell me, what is {c}'s capital?") for c in reversed(countries)]
    assert await states(orchestrator, *again) == ["semantic", "semantic", "miss"]


class WaitingLog(SQLiteStore):
    """A store that reads one log once it may."""

    def __init__(self, log):
        super().__init__()
        self.log = log
        self.may_read = asyncio.Event()

    async def scan(self, log, *, after=None, limit):
        if log == self.log:
            await self.may_read.wait()
        return await super().scan(log, after=after, limit=limit)


async def test_one_slow_scope_does_not_hold_up_another():
    store = WaitingLog("semantic_cache:slow")
    index = QuestionIndex(SemanticConfig(), Memory(store, timeout_s=10))
    slow, quick, other = [
        await index.question("What is a prime?", scope, "") for scope in ("slow", "quick", "slow")
    ]
    waiting = asyncio.create_task(index.alike(slow))
    await asyncio.sleep(0)
    async with LoopClock() as clock:
        assert await index.alike(quick) == []
        # Nor does who reads a log hold up others who would read it.
        assert await index.alike(other) == []
    assert clock.seconds < 1
    assert not waiting.done()
    store.may_read.set()
    assert await waiting == []
    index.close()


async def test_a_reader_that_leaves_loses_nothing():
    memory = Memory(SQLiteStore())
    index = QuestionIndex(SemanticConfig(), memory)
    question = await index.question("What is a prime?", "scope", "")
    index.keep(question, "key", 60)
    await eventually(lambda: memory.idle)
    busy = threading.Event()
    index._thread.submit(busy.wait)
    await eventually(index._thread._work_queue.empty)
    reader = asyncio.create_task(index.alike(question))
    await eventually(lambda: index._thread._work_queue.qsize() == 1)
    reader.cancel()
    await asyncio.wait({reader})
    busy.set()
    assert await index.alike(question) == ["key"]
    index.close()
