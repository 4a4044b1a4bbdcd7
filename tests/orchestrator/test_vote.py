from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from typing import Any

import openai
import pytest

from experts.types import Choice
from orchestrator.config import parse_config
from orchestrator.decision import Candidate
from orchestrator.http.app import create_app
from orchestrator.strategies import several
from orchestrator.strategies.agreement import AnswerForm, answer_key, medoid
from orchestrator.strategies.vote import VoteStrategy
from orchestrator.testing import StrategyCheck, StrategyRun, scripted, several_checks
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    config_content,
    eventually,
    expert,
    running_server,
)
from tests.orchestrator.support import client as http_client

VOTE = VoteStrategy(type="vote")
STRATEGIES = {
    "experts": VOTE,
    "samples": VoteStrategy(type="vote", samples=2),
    "weighted": VoteStrategy(type="vote", weights="quality", answer="exact"),
}


def vote(**fields: Any) -> VoteStrategy:
    return VoteStrategy.model_validate({"type": "vote", **fields})


def predicted(**quality: float) -> dict[str, Any]:
    return {"candidates": tuple(Candidate(name, chance) for name, chance in quality.items())}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"tool_call": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("check", several_checks(), ids=lambda check: check.__name__)
async def test_vote_passes_the_battery(strategy: VoteStrategy, check: StrategyCheck):
    await check(strategy)


@pytest.mark.parametrize(
    ("one", "other", "form"),
    [
        (" Paris. ", "paris", "exact"),
        ("**42**", "42.0", "exact"),
        ("$1,000.00", "1000", "exact"),
        ("\uff14\uff12", "42", "exact"),
        ("-0", "0", "exact"),
        ("(B)", "b.", "exact"),
        ("Adding up.\nAnswer: 42", "The answer is **42**.", "auto"),
        ("Answer:\n42", "So \\boxed{42}.", "auto"),
        ("\\boxed{\\frac{1}{2}}", "answer = \\frac{1}{2}", "auto"),
        ("Answer: 3, no.\nAnswer: 4", "4", "auto"),
        ('{"a": 1, "b": [2]}', '```json\n{"b": [2.0], "a": 1e0}\n```', "auto"),
        ("First I think.\n\nParis!\n", "Paris", "final_line"),
        ("3 + 4 = 7 apples", "7", "number"),
        ("The answer is 7 of the 12", "It must be 12", "number"),
        ('{"a": " x "}', '{"a": "x"}', "json"),
    ],
)
def test_answers_that_say_the_same_have_one_key(one: str, other: str, form: AnswerForm):
    key = answer_key(Choice(one), form)
    assert key is not None
    assert key == answer_key(Choice(other), form)


@pytest.mark.parametrize(
    ("one", "other", "form"),
    [
        ("5", "-5", "exact"),
        (".5", "5", "exact"),
        ("[1, 2)", "(1, 2]", "exact"),
        ("50%", "50", "exact"),
        ("1" * 40, "1" * 39 + "2", "exact"),
        ("The answer depends on a: b", "b", "auto"),
        ('{"a": 1}', '{"a": "1"}', "json"),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', "json"),
        ("x\nsame end", "y\nsame end", "auto"),
    ],
)
def test_answers_that_differ_have_two_keys(one: str, other: str, form: AnswerForm):
    assert answer_key(Choice(one), form) != answer_key(Choice(other), form)


@pytest.mark.parametrize(
    ("text", "form"),
    [("", "auto"), (" \n** ", "exact"), ("none at all", "number"), ("{broken", "json"),
     ("", "final_line"), ("[1e99999999999999999999]", "json")],
)  # fmt: skip
def test_an_answer_without_the_wanted_form_has_no_key(text: str, form: AnswerForm):
    assert answer_key(Choice(text), form) is None


@pytest.mark.parametrize("text", ["Answer:", "The answer is", "answer **", "The answer"])
@pytest.mark.parametrize("form", ["auto", "final_line", "number"])
def test_an_answer_of_spaces_takes_no_time(text: str, form: AnswerForm):
    started = time.process_time()
    answer_key(Choice(text + " " * 100_000), form)
    answer_key(Choice(text + " " * 100_000 + "\nx"), form)
    assert time.process_time() - started < 2


def test_tool_calls_agree_by_name_and_arguments():
    def key(*calls: tuple[str, str]) -> str | None:
        made = [{"id": str(id(c)), "function": {"name": c[0], "arguments": c[1]}} for c in calls]
        return answer_key(Choice("as you wish", made), "number")

    assert key(("f", '{"a": 1, "b": "x"}')) == key(("f", '{"b": " x", "a": 1.0}'))
    assert key(("f", "{}"), ("g", "{}")) == key(("g", ""), ("f", "{ }"))
    assert key(("f", "{}")) != key(("g", "{}"))
    assert key(("f", '{"a": 1}')) != key(("f", '{"a": 2}'))
    assert key(("f", "not json")) == key(("f", " not json"))


@pytest.mark.parametrize("depth", [600, 100_000])
@pytest.mark.parametrize("form", ["auto", "json"])
async def test_json_of_any_depth_fails_nobody(form: AnswerForm, depth: int):
    deep = "[" * depth + "]" * depth
    experts = [scripted("a"), scripted("b", answer=deep), scripted("c", answer=deep)]
    # Too deep to be read it is no JSON, but words like others.
    wanted = deep if form == "auto" else "a"
    assert (await StrategyRun(vote(answer=form), experts).answer()).text == wanted


async def test_the_majority_wins_in_its_first_members_own_words():
    experts = [
        scripted("a", answer="4"),
        scripted("b", answer="Answer: 5"),
        scripted("c", answer="5.0"),
    ]
    run = StrategyRun(VOTE, experts)
    assert (await run.answer()).text == "Answer: 5"
    assert run.context.expert == "b"


@pytest.mark.parametrize(
    ("quality", "winner"),
    [
        ({}, "a"),
        ({"a": 0.5, "b": 0.5, "c": 0.2}, "a"),
        ({"a": 0.4, "b": 0.5, "c": 0.2}, "b"),
        ({"a": 0.4, "b": 0.2, "c": 0.9}, "c"),
    ],
)
async def test_ties_go_to_the_higher_predicted_quality_then_to_the_first(quality, winner):
    experts = [scripted(name) for name in "abc"]
    run = StrategyRun(VOTE, experts, decided=predicted(**quality))
    assert (await run.answer()).text == winner


@pytest.mark.parametrize(
    ("quality", "winner"), [((0.9, 0.4, 0.4), "4"), ((0.7, 0.4, 0.4), "5"), ((0.8, 0.4, 0.4), "4")]
)
async def test_votes_count_the_predicted_quality_if_wanted(quality, winner):
    experts = [scripted(n, answer=a) for n, a in zip("abc", "455", strict=True)]
    decided = predicted(**dict(zip("abc", quality, strict=True)))
    run = StrategyRun(vote(weights="quality"), experts, decided=decided)
    assert (await run.answer()).text == winner


@pytest.mark.parametrize("stream", [True, False])
async def test_the_rest_is_cancelled_once_the_lead_cannot_be_overtaken(stream):
    experts = [scripted(n, answer="5") for n in "ab"] + [scripted("c", delay_s=30)]
    run = StrategyRun(VOTE, experts, stream=stream)
    started = time.monotonic()
    assert (await run.answer()).text == "5"
    assert time.monotonic() - started < 3
    assert run.experts["c"].active == 0
    assert [made.error for made in run.context.calls] == [None, None, "cancelled"]


async def test_nobody_is_cancelled_as_long_as_the_lead_can_be_overtaken():
    answers = {"a": ("4", 0.0), "b": ("5", 0.0), "c": ("5", 0.1)}
    experts = [scripted(n, answer=a, delay_s=d) for n, (a, d) in answers.items()]
    assert (await StrategyRun(VOTE, experts).answer()).text == "5"


async def test_a_tie_that_could_come_keeps_the_vote_open():
    """Two against two would go to the expert predicted best, who has not answered yet."""
    answers = {"a": ("4", 0.1), "b": ("5", 0.0), "c": ("5", 0.0), "d": ("4", 0.1)}
    experts = [scripted(n, answer=a, delay_s=d) for n, (a, d) in answers.items()]
    decided = predicted(a=0.9, b=0.5, c=0.5, d=0.5)
    assert (await StrategyRun(vote(experts=4), experts, decided=decided).answer()).text == "4"


async def test_an_early_stop_never_changes_the_winner():
    """All orders of arrival of all votes of four experts give what all of them together give."""
    from itertools import permutations, product

    from experts.types import Completion, Usage
    from orchestrator.decision import Decision
    from orchestrator.strategies.calls import Answer
    from orchestrator.strategies.vote import _Ballot

    calls: list[Any] = [(name, None) for name in "abcd"]
    quality = {"a": 0.6, "b": 0.9, "c": 0.6, "d": 0.3}
    decision = Decision(tuple("abcd"), **predicted(**quality))
    for weights, said in product(({n: 1.0 for n in "abcd"}, quality), product("xyz", repeat=4)):
        found = [Answer(n, Completion([Choice(t)], Usage()), place)
                 for place, (n, t) in enumerate(zip("abcd", said, strict=True))]  # fmt: skip
        winners = set()
        for order in permutations(found):
            ballot = _Ballot("exact", weights, decision, calls)
            for one in order:
                ballot.add(one)
                if ballot.decided:
                    break
            assert ballot.decided
            leader = max(ballot._votes, key=lambda key: ballot._standing(ballot._votes[key]))
            winners.add(leader)
        assert len(winners) == 1, (weights, said)


async def test_failures_are_no_votes():
    experts = [scripted("a", error="failed"), scripted("b", answer="x"), scripted("c", answer="y"),
               scripted("d", answer="y")]  # fmt: skip
    run = StrategyRun(vote(experts=4), experts)
    assert (await run.answer()).text == "y"
    assert run.context.calls[0].error == "ExpertFailedError"


async def test_failures_free_the_rest_once_they_cannot_matter():
    experts = [scripted("a", answer="5"), scripted("b", delay_s=0.05, error="failed"),
               scripted("c", delay_s=30)]  # fmt: skip
    run = StrategyRun(vote(answer="exact"), experts, decided=predicted(a=0.9, b=0.5, c=0.5))
    assert (await run.answer()).text == "5"
    assert run.experts["c"].active == 0


async def test_failures_nobody_waits_for_are_not_logged():
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    same = [scripted(name, answer="5") for name in "ab"]
    run = StrategyRun(VOTE, [*same, scripted("c", error="failed")])
    await run.answer()
    run.chunks = None  # type: ignore[assignment]  # whatever it holds is collected now
    gc.collect()
    assert not complaints


async def test_a_wrong_request_for_one_is_no_vote_once_another_has_answered():
    experts = [scripted("a"), scripted("b", delay_s=0.05, error="invalid")]
    run = StrategyRun(VOTE, experts, decided=predicted(a=0.1, b=0.9))
    assert (await run.answer()).text == "a"


async def test_answers_without_the_wanted_form_lose_to_any_that_has_it():
    experts = [scripted("a", answer="no idea"), scripted("b", answer="no idea"),
               scripted("c", answer="it is 7")]  # fmt: skip
    assert (await StrategyRun(vote(answer="number"), experts).answer()).text == "it is 7"


async def test_if_nobody_has_the_wanted_form_the_best_predicted_wins():
    experts = [scripted("a", answer="no idea"), scripted("b", answer="none")]
    run = StrategyRun(vote(answer="number"), experts, decided=predicted(a=0.2, b=0.3))
    assert (await run.answer()).text == "none"


async def test_self_consistency_asks_one_expert_with_different_seeds():
    run = StrategyRun(vote(experts=1, samples=5, temperature=0.5, answer="text"), [scripted("a")])
    assert (await run.answer()).text == "a"
    requests = run.experts["a"].requests
    assert len({request.seed for request in requests}) == 5
    assert {request.temperature for request in requests} == {0.5}


async def test_a_requests_own_seed_and_temperature_are_kept_to():
    fields = {"seed": 7, "temperature": 1.5}
    run = StrategyRun(vote(experts=1, samples=3, answer="text"), [scripted("a")], fields=fields)
    await run.answer()
    requests = run.experts["a"].requests
    assert [(one.seed, one.temperature) for one in requests] == [(7, 1.5), (8, 1.5), (9, 1.5)]


async def test_experts_and_samples_together_ask_each_expert_before_any_again():
    run = StrategyRun(vote(experts=2, samples=2, answer="text"), [scripted(n) for n in "abc"])
    await run.answer()
    assert run.context.path == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("policy", "options", "asked"),
    [
        ({"type": "top_p", "confidence": 0.85}, {}, 1),
        ({"type": "top_p", "confidence": 0.95}, {}, 2),
        ({}, {"top_k": 1}, 1),
        ({}, {}, 3),
    ],
)
async def test_the_surest_request_asks_one_expert(policy, options, asked):
    routes = {"auto": {"router": "table", "policy": policy, "strategy": {"type": "vote"}}}
    orchestrator = build(parse_config(config_content(routes=routes)))
    response = await http_client(orchestrator).post(CHAT, json=chat_body(**options))
    assert response.status_code == 200
    names = ("small", "medium", "large")
    assert sum(len(expert(orchestrator, name).requests) for name in names) == asked


@pytest.mark.parametrize(("width", "path"), [(None, "abc"), (1, "a"), (2, "ab"), (4, "abcd")])
async def test_the_decision_says_how_many_vote(width, path):
    experts = [scripted(n, answer=n) for n in "abcde"]
    run = StrategyRun(VOTE, experts, decided={"width": width})
    await run.answer()
    assert run.context.path == list(path)


async def test_a_vote_of_one_streams():
    run = StrategyRun(vote(experts=1), [scripted("a", answer="x y", chunk_delay_s=30)])
    assert (await anext(run.chunks)).text == "x"
    assert run.context.expert == "a"
    await run.chunks.aclose()


def priced(name: str, **rule: Any) -> Any:
    from experts.config import ScriptedExpertConfig
    from experts.scripted import ScriptedExpert

    return ScriptedExpert(ScriptedExpertConfig.model_validate(
        {"name": name, "engine": "scripted", "output_usd_per_mtok": 1e6,
         "rules": [{"answer": name, **rule}]}
    ))  # fmt: skip


async def test_no_more_are_asked_than_the_cost_limit_allows():
    fields = {"max_tokens": 10}
    run = StrategyRun(
        VOTE, [priced(n, delay_s=0.01) for n in "abc"], fields=fields, max_cost_usd=25
    )
    assert (await run.answer()).text == "a"
    assert run.context.path == ["a", "b"]
    assert run.context.cost_usd == 2


async def test_late_answers_are_not_waited_for():
    experts = [scripted("a", delay_s=30), scripted("b", answer="5"), scripted("c", delay_s=30)]
    run = StrategyRun(vote(deadline_share=0.01), experts, timeout_s=20)
    started = time.monotonic()
    assert (await run.answer()).text == "5"
    assert 0.2 <= time.monotonic() - started < 10
    assert all(one.active == 0 for one in run.experts.values())


async def test_the_first_answer_is_waited_for_to_the_deadline():
    experts = [scripted("a", delay_s=30), scripted("b", answer="5", delay_s=0.3)]
    run = StrategyRun(vote(deadline_share=0.1), experts, timeout_s=1)
    assert (await run.answer()).text == "5"


async def test_a_streams_client_hears_something_while_it_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(several, "TICK_S", 0.05)
    for stream in (True, False):
        experts = [scripted("a", delay_s=0.2), scripted("b", delay_s=0.12)]
        chunks = [chunk async for chunk in StrategyRun(VOTE, experts, stream=stream).chunks]
        heard = [chunk.progress for chunk in chunks if chunk.progress]
        assert bool(heard) == stream
        assert all(words.endswith(" of 2 answers") for words in heard)
        assert [chunk.text for chunk in chunks if chunk.text] == ["a"]


TEXTS = {
    "a": "The committee will meet again next Tuesday to discuss the new budget for schools.",
    "b": "Photosynthesis turns the light of the sun into sugar that feeds the whole plant.",
    "c": "Plants use sunlight to make sugar, which is the food that they live on.",
}


async def test_of_texts_the_one_most_like_the_others_wins():
    run = StrategyRun(VOTE, [scripted(n, answer=t) for n, t in TEXTS.items()])
    assert (await run.answer()).text in (TEXTS["b"], TEXTS["c"])


async def test_texts_are_compared_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch):
    from orchestrator.strategies import vote as module

    threads = []

    def noted(texts, weights):
        threads.append(threading.current_thread())
        return medoid(texts, weights)

    monkeypatch.setattr(module, "medoid", noted)
    run = StrategyRun(vote(answer="text"), [scripted(n) for n in "abc"])
    await run.answer()
    assert threads != [threading.main_thread()]
    assert len(threads) == 1


def test_the_medoid_of_equals_is_the_first_and_weights_move_it():
    assert medoid(["x", "y"], [1, 1]) == 0
    assert medoid(list(TEXTS.values()), [1, 1, 1]) in (1, 2)
    assert medoid(list(TEXTS.values()), [0, 0, 0]) == 0


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
HELLO: Any = [{"role": "user", "content": "hello"}]
RULES = {
    "large": {"answer": '{"a": 2}', **call("time")},
    "medium": {"answer": '{"b": 1, "a": 1.0}', **call("weather", city="Graz", days=1)},
    "small": {"answer": '{"a": 1, "b": 1}', **call("weather", days=1.0, city=" Graz")},
}


@pytest.fixture(scope="module")
def orchestrator():
    content = config_content()
    for one in content["experts"]:
        one["rules"] = [{"match": "slow", "answer": "5", "delay_s": 30 * (one["name"] == "small")},
                        RULES[one["name"]]]  # fmt: skip
    content["routes"]["auto"]["strategy"] = {"type": "vote"}
    return build(parse_config(content))


@pytest.fixture(scope="module")
def client(orchestrator):
    with (
        running_server(create_app(orchestrator)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


def test_tool_calls_are_voted_on_over_http(client):
    answer = client.chat.completions.with_raw_response.create(
        model="auto", messages=HELLO, tools=[TOOL]
    )
    assert answer.headers["x-collegium-model"] == "medium"
    assert answer.headers["x-collegium-path"] == "large>medium>small"
    (made,) = answer.parse().choices[0].message.tool_calls
    assert json.loads(made.function.arguments) == {"city": "Graz", "days": 1}
    assert answer.parse().choices[0].finish_reason == "tool_calls"


def test_streamed_tool_calls_are_voted_on_over_http(client):
    with client.chat.completions.stream(model="auto", messages=HELLO, tools=[TOOL]) as stream:
        stream.until_done()
        (made,) = stream.get_final_completion().choices[0].message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)["city"]) == ("weather", "Graz")


@pytest.mark.parametrize("stream", [True, False])
def test_json_is_voted_on_by_value_over_http(client, stream):
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    found = client.chat.completions.create(
        model="auto", messages=HELLO, response_format={"type": "json_object"}, stream=stream,
        **options,
    )  # fmt: skip
    if stream:
        *chunks, last = list(found)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert {chunk.model for chunk in chunks} == {"medium"}
        assert last.usage.prompt_tokens == 3
    else:
        text = found.choices[0].message.content
        assert found.usage.prompt_tokens == 3
    assert text == RULES["medium"]["answer"]


async def test_a_decided_vote_frees_the_others_over_http(client, orchestrator):
    busy = expert(orchestrator, "small")
    found = await asyncio.to_thread(
        client.chat.completions.create, model="auto", messages=[{"role": "user", "content": "slow"}]
    )
    assert found.choices[0].message.content == "5"
    await eventually(lambda: busy.active == 0)


async def test_headers_that_left_with_a_comment_name_nobody_yet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(several, "TICK_S", 0.05)
    content = config_content()
    for one in content["experts"]:
        one["rules"] = [{"answer": "5", "delay_s": 0.3 * (one["name"] != "small")}]
    content["routes"]["auto"]["strategy"] = {"type": "vote"}
    async with http_client(build(parse_config(content))) as http:
        answer = await http.post(CHAT, json=chat_body(stream=True))
    assert answer.text.startswith(": ")
    assert '"model":"large"' in answer.text.replace('": "', '":"')
    assert "x-collegium-model" not in answer.headers
    assert answer.headers["x-collegium-path"] == "large>medium>small"
