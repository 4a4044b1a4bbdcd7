"""A route that learns: what feedback changes, what it does not, and who explores."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from experts.types import collect
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from orchestrator.decision import PUBLIC, RequestContext
from orchestrator.errors import UnknownModelError
from orchestrator.learning.config import LearningConfig
from orchestrator.learning.learner import Learner, Lesson, Lessons, drawn, preferred
from orchestrator.options import RoutingOptions
from tests.orchestrator.support import (
    CHAT,
    ROUTE,
    build,
    chat_body,
    chat_request,
    client,
    config_content,
    config_with_rules,
    written,
)

LEARNING = {"encoder": "hashing"}


def learning_config(rules=None, **learning):
    """The config with an ``auto`` that learns, and an ``auto-off`` that does not."""
    routes = {
        "auto": {"router": "table", "learning": {**LEARNING, **learning}},
        "auto-off": {"router": "table"},
    }
    return config_with_rules(rules or {}, routes=routes)


async def answered(orchestrator: Orchestrator, text: str = "hello", **changes):
    """A decision and its answer, as if over HTTP."""
    options = changes.pop("options", RoutingOptions())
    client = changes.pop("client", PUBLIC)
    context = RequestContext(deadline=time.monotonic() + 5, scope=client)
    request = chat_request(text, **changes)
    decision = await orchestrator.decide(request, options=options, context=context)
    try:
        await collect(orchestrator.run(request, decision, context))
    finally:
        await asyncio.sleep(0)
    return decision


def quality(decision):
    """What a decision predicts, by expert."""
    return {one.expert: one.quality for one in decision.candidates}


async def test_without_feedback_a_learning_route_is_the_offline_router():
    orchestrator = build(learning_config())
    learns = await orchestrator.decide(chat_request())
    off = await orchestrator.decide(chat_request(model="auto-off"))
    assert learns.candidates == off.candidates
    assert learns.experts == off.experts
    assert learns.detail["learning"]["observations"] == 0
    assert "learning" not in off.detail


async def test_bad_ratings_move_requests_to_another_expert():
    orchestrator = build(learning_config())
    for _ in range(10):
        decision = await answered(orchestrator)
        orchestrator.learning.learn(decision.id, 0.0 if decision.experts[0] == "large" else 1.0)
    decision = await orchestrator.decide(chat_request())
    assert decision.experts[0] == "medium"
    assert quality(decision)["large"] < 0.7
    assert decision.detail["learning"]["predicted"]["large"] == pytest.approx(0.9)
    assert (await orchestrator.decide(chat_request(model="auto-off"))).experts[0] == "large"


async def test_a_decision_teaches_once_and_only_if_it_is_known():
    orchestrator = build(learning_config())
    decision = await answered(orchestrator)
    assert orchestrator.learning.learn(decision.id, 0.0)
    assert not orchestrator.learning.learn(decision.id, 0.0)
    assert not orchestrator.learning.learn("dec_unknown", 0.0)
    # Nobody answered these.
    assert not orchestrator.learning.learn((await orchestrator.decide(chat_request())).id, 0.0)
    assert not orchestrator.learning.learn((await answered(orchestrator, model="auto-off")).id, 0.0)
    assert not orchestrator.learning.learn((await answered(orchestrator, model="large")).id, 0.0)


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan")])
async def test_rewards_out_of_range_are_refused(reward):
    orchestrator = build(learning_config())
    decision = await answered(orchestrator)
    with pytest.raises(ValueError, match="reward"):
        orchestrator.learning.learn(decision.id, reward)
    assert orchestrator.learning.learn(decision.id, 1.0)


async def test_the_expert_that_answered_is_rated_not_the_one_that_failed():
    orchestrator = build(learning_config({"large": {"error": "unavailable"}}))
    decision = await answered(orchestrator)
    before = quality(decision)
    orchestrator.learning.learn(decision.id, 0.0)
    after = quality(await orchestrator.decide(chat_request()))
    assert after["large"] == before["large"]
    assert after["medium"] < before["medium"] - 0.1


async def test_failures_count_only_where_the_config_says_so():
    for weight, moved in ((0.0, False), (1.0, True)):
        config = learning_config({"large": {"error": "unavailable"}}, error_weight=weight)
        orchestrator = build(config)
        before = quality(await answered(orchestrator))
        after = quality(await orchestrator.decide(chat_request()))
        assert (after["large"] < before["large"]) is moved
        assert after["medium"] == before["medium"]


async def test_an_identical_retry_by_the_same_client_counts_against_the_answer():
    orchestrator = build(learning_config(retry_weight=0.5))

    async def large_after(text, **who):
        await answered(orchestrator, text, **who)
        return quality(await orchestrator.decide(chat_request()))["large"]

    first = await large_after("hello", client="x")
    assert first == pytest.approx(0.9)
    assert await large_after("another", client="x") == first
    assert await large_after("hello", client="y") == first
    assert await large_after("hello") == first
    assert await large_after("hello") == first
    assert await large_after("hello", client="x") < first


async def test_a_preference_moves_the_difference_and_not_the_level():
    orchestrator = build(learning_config())
    worse = await answered(orchestrator)
    only_small = RoutingOptions(allowed_models=["small"])
    better = await answered(orchestrator, options=only_small)
    before = quality(worse)
    assert orchestrator.learning.learn_preference(better.id, worse.id)
    after = quality(await orchestrator.decide(chat_request()))
    assert after["small"] > before["small"] + 0.1
    assert after["large"] < before["large"] - 0.1
    assert not orchestrator.learning.learn_preference(better.id, worse.id)


async def test_a_preference_between_one_expert_s_answers_says_nothing():
    orchestrator = build(learning_config())
    one, other = await answered(orchestrator), await answered(orchestrator, "something else")
    assert not orchestrator.learning.learn_preference(one.id, other.id)
    assert orchestrator.learning.learn(one.id, 1.0)


def test_preferences_reward_by_the_difference_of_qualities():
    rng = np.random.default_rng(0)
    quality = 0.7, 0.4
    sums, wins = np.zeros(2), rng.random(20_000) < 0.5 + (quality[0] - quality[1]) / 2
    for won in wins:
        better, worse = preferred(*(quality if won else quality[::-1]))
        sums += (better, worse) if won else (worse, better)
    rewards = sums / len(wins)
    assert rewards[0] - rewards[1] == pytest.approx(0.3, abs=0.02)
    assert rewards.sum() == pytest.approx(1.1)


async def test_who_explores_is_drawn_by_the_decision_s_id_alone():
    orchestrator = build(learning_config(exploration_share=0.3, alpha=1.0))
    decisions = [await orchestrator.decide(chat_request()) for _ in range(200)]
    for decision in decisions:
        explores = decision.detail["learning"]["explores"]
        assert explores is drawn(f"explore:{decision.id}", 0.3)
    assert 35 <= sum(one.detail["learning"]["explores"] for one in decisions) <= 85


async def test_exploring_tries_an_expert_of_which_little_is_known():
    orchestrator = build(learning_config(exploration_share=1.0, alpha=0.5))
    seen = set()
    for _ in range(30):
        decision = await answered(orchestrator)
        seen.add(decision.experts[0])
        orchestrator.learning.learn(decision.id, 0.6)
    assert seen == {"small", "medium", "large"}
    # What users see is what is expected, without the bonus.
    assert all(0 <= one.quality <= 1 for one in decision.candidates)


async def test_dear_experts_are_not_explored_beyond_the_cap():
    config = learning_config(exploration_share=1.0, alpha=10.0, exploration_max_cost_usd=0.0001)
    decision = await build(config).decide(chat_request())
    assert decision.experts == ("small", "large", "medium")


async def test_a_decision_is_the_same_whatever_else_is_in_work():
    orchestrator = build(learning_config(exploration_share=0.0))
    alone = await orchestrator.decide(chat_request("alone"))
    others = [orchestrator.decide(chat_request(f"other {number}")) for number in range(20)]
    among = (await asyncio.gather(orchestrator.decide(chat_request("alone")), *others))[0]
    assert among.candidates == alone.candidates


async def test_feedback_is_for_the_client_s_decision_over_http():
    orchestrator = build(learning_config())
    async with client(orchestrator) as http:
        response = await http.post(CHAT, json=chat_body())
        streamed = await http.post(CHAT, json=chat_body(stream=True))
        dry = await http.post(ROUTE, json=chat_body())
    for one, learnt in ((response, True), (streamed, True), (dry, False)):
        assert orchestrator.learning.learn(one.headers["x-collegium-decision-id"], 1.0) is learnt


def test_lessons_are_bounded_and_fit_into_a_store():
    lessons = Lessons(size=2)
    lesson = Lesson("auto", "a", {"a": 0.5}, np.array([0.1, 1.0], np.float16), "try", "b")
    for name in ("x", "y", "z"):
        lessons.add(name, lesson)
    assert lessons.get("x") is None
    assert lessons.take("y") is lesson
    assert lessons.take("y") is None
    back = Lesson.of_json(lesson.to_json())
    np.testing.assert_array_equal(np.asarray(back.features), np.asarray(lesson.features))
    assert (back.route, back.expert, back.priors, back.experiment, back.arm) == (
        "auto", "a", {"a": 0.5}, "try", "b",
    )  # fmt: skip
    assert Lesson.of_json(Lesson("auto").to_json()) == Lesson("auto")


def test_lessons_of_another_config_teach_nothing():
    learner = Learner(LearningConfig(encoder="hashing"), ["a", "b"])
    features = np.ones(33, np.float16)
    lesson = Lesson("auto", "a", {"a": 0.5, "gone": 0.5}, features, encoder="hashing")
    assert not learner.learn(lesson, "b", 1.0)
    assert not learner.learn(replace(lesson, features=features[:9]), "a", 1.0)
    assert not learner.learn(replace(lesson, encoder="another"), "a", 1.0)
    assert learner.bandit.observations == 0
    assert learner.learn(lesson, "a", 1.0)


def test_an_expert_that_another_replica_had_first_is_learnt_of():
    learner = Learner(LearningConfig(encoder="hashing"), ["a"])
    features = np.ones(33, np.float16)
    lesson = Lesson("auto", "new", {"a": 0.5, "new": 0.5}, features, encoder="hashing")
    assert learner.learn(lesson, "new", 1.0)
    assert learner.expected(lesson) > 0.5


# --- experiments

SPLIT = {"try": {"a": "auto", "b": "auto-cheap"}}


def split(**fields):
    """An orchestrator with one experiment over two routes."""
    return build(parse_config(config_content(experiments={"try": {**SPLIT["try"], **fields}})))


async def arm_of(orchestrator, who, session=None):
    context = RequestContext(deadline=time.monotonic() + 5, scope=who or PUBLIC)
    options = RoutingOptions(session_id=session)
    return await orchestrator.decide(chat_request(model="try"), options=options, context=context)


async def test_a_client_stays_in_its_arm():
    orchestrator = split(share_b=0.3)
    first = {who: await arm_of(orchestrator, who) for who in map(str, range(300))}
    for who, decision in first.items():
        again = await arm_of(orchestrator, who, session="whatever")
        assert again.arm == decision.arm
        assert decision.route == {"a": "auto", "b": "auto-cheap"}[decision.arm]
        assert decision.experiment == "try"
    assert 60 <= sum(one.arm == "b" for one in first.values()) <= 120


async def test_clients_are_keys_then_sessions_then_requests():
    for by, given, varies in (
        ("key", {}, True),
        ("key", {"session": "s"}, False),
        ("session", {"session": "s"}, False),
        ("session", {}, True),
        ("request", {"session": "s"}, True),
    ):
        orchestrator = split(by=by)
        who = "key" if by != "key" else None
        arms = {(await arm_of(orchestrator, who, **given)).arm for _ in range(40)}
        assert (len(arms) == 2) is varies, (by, given)


async def test_ratings_become_a_verdict():
    orchestrator = split(by="request")
    async with client(orchestrator) as http:
        before = (await http.get("/v1/experiments")).json()["data"][0]
        for _ in range(300):
            decision = await answered(orchestrator, model="try")
            assert orchestrator.learning.learn(decision.id, 0.9 if decision.arm == "b" else 0.4)
        await written(orchestrator)
        after = (await http.get("/v1/experiments")).json()["data"][0]
        listed = (await http.get("/v1/models")).json()["data"]
    assert (before["verdict"], before["difference"]) == ("undecided", None)
    assert (after["verdict"], after["kind"]) == ("b", "split")
    assert 0 < after["low"] < after["difference"] < after["high"]
    a, b = after["arms"]
    assert (a["route"], b["route"]) == ("auto", "auto-cheap")
    assert a["requests"] + b["requests"] == a["outcomes"] + b["outcomes"] == 300
    assert (a["mean"], b["mean"]) == (pytest.approx(0.4), pytest.approx(0.9))
    assert {"try": "experiment"} == {
        one["id"]: one["kind"] for one in listed if one["kind"] == "experiment"
    }


async def test_an_arm_gets_no_ratings_of_a_route_that_it_was_before():
    orchestrator = split()
    orchestrator.learning.lessons.add("before", Lesson("auto", "a", experiment="try", arm="b"))
    orchestrator.learning.lessons.add("now", Lesson("auto", "a", experiment="try", arm="a"))
    assert not orchestrator.learning.learn("before", 1.0)
    assert orchestrator.learning.learn("now", 1.0)
    ratings = orchestrator.experiments["try"].ratings
    assert (ratings["a"].n, ratings["b"].n) == (1, 0)


async def test_an_unknown_model_is_told_of_experiments():
    with pytest.raises(UnknownModelError, match="'try'"):
        await split().decide(chat_request(model="nobody"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiments": {"auto": SPLIT["try"]}}, "names an experiment and an expert or a route"),
        ({"experiments": {"try": {"a": "auto", "b": "nowhere"}}}, "unknown route 'nowhere'"),
        ({"experiments": {"try": {"a": "auto", "b": "auto"}}}, "with itself"),
        (
            {"routes": {"auto": {"router": "table", "learning": {"encoder": "no"}}}},
            "unknown encoder",
        ),
        (
            {
                "routes": {
                    "auto": {"router": "table", "shadow": {"route": "auto", "judge": "large"}}
                }
            },
            "must be another route",
        ),
    ],
)
def test_what_cannot_be_is_said_when_the_config_is_read(changes, message):
    with pytest.raises(Exception, match=message):
        parse_config(config_content(**changes))
