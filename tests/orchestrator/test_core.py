from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from experts.errors import ExpertUnavailableError
from experts.types import collect
from orchestrator.config import ConfigError, parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import RequestContext
from orchestrator.errors import BadRequestError, EmptyPoolError, UnknownModelError
from orchestrator.options import RoutingOptions, not_allowed
from routers.base import Explanation, Prediction, Query, RouterError
from tests.orchestrator.support import (
    build,
    chat_request,
    config_content,
    config_with_rules,
    expert,
    text_request,
)

TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def orchestrator():
    return build(parse_config(config_content()))


async def test_a_named_expert_bypasses_routing(orchestrator):
    decision = await orchestrator.decide(chat_request(model="medium"))
    assert decision.experts == ("medium",)
    assert (decision.policy, decision.route, decision.router) == ("named", None, None)


async def test_a_missing_model_is_auto(orchestrator):
    decision = await orchestrator.decide(chat_request())
    assert decision.route == "auto"
    assert decision.experts == ("large", "medium", "small")


async def test_routes_differ_by_their_policy(orchestrator):
    decision = await orchestrator.decide(chat_request(model="auto-cheap"))
    assert decision.experts == ("small", "medium", "large")
    assert decision.cost_quality == 0


async def test_a_request_may_bring_its_own_knob(orchestrator):
    decision = await orchestrator.decide(chat_request(), options=RoutingOptions(cost_quality=0.0))
    assert decision.experts[0] == "small"
    assert decision.cost_quality == 0


@pytest.mark.parametrize("knob", [-0.1, 1.1, float("nan")])
def test_a_knob_out_of_range_is_refused(knob):
    with pytest.raises(ValidationError, match="cost_quality"):
        RoutingOptions(cost_quality=knob)


async def test_a_request_may_name_its_experts(orchestrator):
    options = RoutingOptions(allowed_models=["s*", "medium"])
    decision = await orchestrator.decide(chat_request(), options=options)
    assert decision.experts == ("medium", "small")
    assert decision.excluded["large"] == "allowed_models does not name it"
    with pytest.raises(EmptyPoolError, match="large: allowed_models does not name it"):
        await orchestrator.decide(chat_request(), options=RoutingOptions(allowed_models=["x*"]))
    with pytest.raises(EmptyPoolError, match="allowed_models"):
        await orchestrator.decide(chat_request(model="large"), options=options)


@pytest.mark.parametrize(
    ("pattern", "name", "allowed"),
    [
        ("ab", "ab", True),
        ("ab", "abc", False),
        ("AB", "ab", False),
        ("*", "ab", True),
        ("**", "ab", True),
        ("a*", "ab", True),
        ("*b", "ab", True),
        ("*b", "ba", False),
        ("a*b*c", "a-bb-c", True),
        ("a*b*c", "abc", True),
        ("a*b*c", "acb", False),
        ("*b*b*", "ab", False),
        ("ab*ba", "aba", False),
        ("ab*ba", "abba", True),
        ("a*ba*a", "aba", False),
        ("a**c", "abc", True),
        ("a?[b]", "a?[b]", True),
        ("a?", "ab", False),
    ],
)
def test_a_star_stands_for_any_characters(pattern, name, allowed):
    assert (not_allowed([name], [pattern]) == {}) is allowed


async def test_a_request_may_bring_its_own_route(orchestrator):
    options = RoutingOptions(route="auto-cheap")
    for model in ("auto", "large", "gpt-5"):
        decision = await orchestrator.decide(chat_request(model=model), options=options)
        assert (decision.route, decision.experts[0]) == ("auto-cheap", "small")
    with pytest.raises(UnknownModelError, match="unknown route 'large'"):
        await orchestrator.decide(chat_request(), options=RoutingOptions(route="large"))


async def test_a_request_may_limit_its_cost(orchestrator):
    found = await orchestrator.decide(chat_request())
    costs = {one.expert: one.cost_usd for one in found.candidates}
    options = RoutingOptions(max_cost=costs["medium"])
    decision = await orchestrator.decide(chat_request(), options=options)
    assert decision.experts == ("medium", "small")
    assert "more than max_cost" in decision.excluded["large"]
    nothing = RoutingOptions(max_cost=0.0)
    for model in ("auto", "large"):
        with pytest.raises(EmptyPoolError, match="more than max_cost"):
            await orchestrator.decide(chat_request(model=model), options=nothing)


async def test_a_request_may_want_some_quality(orchestrator):
    found = await orchestrator.decide(chat_request())
    middle = found.candidates[1].quality
    options = RoutingOptions(min_quality=middle, cost_quality=0.0)
    decision = await orchestrator.decide(chat_request(), options=options)
    assert decision.experts == ("medium", "large")
    with pytest.raises(EmptyPoolError, match="below min_quality"):
        await orchestrator.decide(chat_request(), options=RoutingOptions(min_quality=1.0))


async def test_a_request_may_say_how_many_shall_answer(orchestrator):
    for wanted, width in ((1, 1), (2, 2), (16, 3)):
        options = RoutingOptions(top_k=wanted)
        assert (await orchestrator.decide(chat_request(), options=options)).width == width
    with pytest.raises(BadRequestError, match="top_k: how many experts"):
        await orchestrator.decide(chat_request(), options=RoutingOptions(top_k=17))


async def test_a_token_limit_bounds_the_expected_cost(orchestrator):
    decision = await orchestrator.decide(chat_request("x" * 4000, max_tokens=100))
    assert decision.candidates[0].cost_usd == pytest.approx((1000 * 5 + 100 * 10) / 1e6)


def _with_policy(policy, **card):
    content = config_content()
    content["routes"]["auto"]["policy"] = policy
    for entry in content["experts"]:
        entry |= {name: values[entry["name"]] for name, values in card.items()}
    return build(parse_config(content))


LATENCIES = {"small": 0.2, "medium": 1.0, "large": 4.0}


async def test_a_slow_expert_is_left_out_and_the_reason_shown():
    found = _with_policy({"max_latency_s": 2}, latency_s=LATENCIES)
    decision = await found.decide(chat_request())
    assert decision.experts == ("medium", "small")
    assert decision.excluded == {"large": "an answer typically takes 4 s, more than 2"}
    # Compared as if they were all there are: the dearest that is left costs 1.
    knob = await found.decide(chat_request(), options=RoutingOptions(cost_quality=0.5))
    assert knob.candidates[-1].utility == pytest.approx(0.5 * 0.7 - 0.5)


async def test_a_budget_charges_for_cost():
    usd = (256 * 10 + 1 * 5) / 1e6
    found = _with_policy({"type": "budget", "price": 0.3 / usd})
    decision = await found.decide(chat_request())
    assert decision.policy == "budget"
    assert decision.experts[0] == "medium"
    cheapest = await found.decide(chat_request(), options=RoutingOptions(cost_quality=0.0))
    assert cheapest.experts[0] == "small"


async def test_the_unit_of_cost_does_not_depend_on_who_can_answer():
    content = config_content()
    content["routes"]["auto"]["policy"] = {"type": "budget", "price": 100.0}
    for entry in content["experts"][1:]:
        entry |= {"active_params_b": 70.0, "capabilities": ["chat", "tools"]}
        del entry["input_usd_per_mtok"], entry["output_usd_per_mtok"]
    content["experts"][0]["capabilities"] = ["chat"]
    decision = await build(parse_config(content)).decide(chat_request(tools=[TOOL]))
    # The only expert with a price lacks tools; the others are still compared by their price, 0.
    assert decision.experts == ("large", "medium")
    assert decision.candidates[0].utility == pytest.approx(0.9)


async def test_top_p_says_how_many_experts_shall_answer():
    found = _with_policy({"type": "top_p", "confidence": 0.95, "max_experts": 3})
    decision = await found.decide(chat_request())
    assert decision.experts[: decision.width] == ("large", "medium")


@pytest.mark.parametrize(
    ("policy", "card", "said"),
    [
        ({"max_latency_s": 2}, {}, "max_latency_s needs 'latency_s' of every expert"),
        ({"max_latency_s": 0.1}, {"latency_s": LATENCIES}, "its policy leaves no expert"),
        ({"type": "budget", "max_mean_cost": 1}, {}, "has no 'price'; 'collegium calibrate'"),
        ({"null_expert": "tiny"}, {}, "names 'tiny', which is none of the route's experts"),
    ],
)
def test_policies_that_cannot_decide_are_refused_at_the_start(policy, card, said):
    with pytest.raises(ConfigError, match=said):
        _with_policy(policy, **card)


async def test_decisions_show_quality_cost_and_utility_of_every_candidate(orchestrator):
    decision = await orchestrator.decide(chat_request("x" * 4000, max_tokens=1000))
    best = decision.candidates[0]
    assert best.expert == "large"
    assert best.quality == pytest.approx(0.9)
    assert best.cost_usd == pytest.approx((1000 * 5 + 256 * 10) / 1e6)
    assert best.utility == pytest.approx(0.9)


async def test_unknown_models_are_named_with_the_known_ones(orchestrator):
    with pytest.raises(UnknownModelError, match="unknown model 'gpt'; known: 'auto', 'auto-cheap'"):
        await orchestrator.decide(chat_request(model="gpt"))


async def test_experts_that_lack_a_capability_are_left_out():
    content = config_content()
    content["experts"][2]["capabilities"] = ["chat"]
    decision = await build(parse_config(content)).decide(chat_request(tools=[TOOL]))
    assert decision.experts == ("medium", "small")
    assert decision.excluded == {"large": "lacks tools"}


@pytest.mark.parametrize("model", ["auto", "small"])
async def test_an_empty_pool_says_which_requirement_emptied_it(orchestrator, model):
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    request = chat_request(model=model, messages=[{"role": "user", "content": image}])
    with pytest.raises(EmptyPoolError, match="small: lacks images"):
        await orchestrator.decide(request)


async def test_a_prompt_that_fits_no_context_says_so():
    content = config_content()
    for entry in content["experts"]:
        entry["context_length"] = 16
    with pytest.raises(EmptyPoolError, match="large: context of 16 tokens is too short"):
        await build(parse_config(content)).decide(chat_request("word " * 100))


@pytest.mark.parametrize("model", ["auto", "small"])
@pytest.mark.parametrize("content", ["", "  \n", []])
async def test_conversations_without_any_text_are_refused(orchestrator, model, content):
    request = chat_request(model=model, messages=[{"role": "user", "content": content}])
    with pytest.raises(BadRequestError) as caught:
        await orchestrator.decide(request)
    assert caught.value.param == "messages"


async def test_empty_prompts_are_refused(orchestrator):
    with pytest.raises(BadRequestError) as caught:
        await orchestrator.decide(text_request(prompt=["a", ""]))
    assert caught.value.param == "prompt"


class LengthRouter:
    """Long queries need the large expert; slow enough for requests to overlap."""

    method = "length"

    @property
    def models(self) -> list[str]:
        return ["small", "medium", "large"]

    def predict(self, queries: Sequence[Query], candidates: Sequence[str]) -> Prediction:
        if "broken" in queries[0].text:
            raise RouterError("it is broken")
        time.sleep(0.001)
        rank = np.array([self.models.index(name) / 2 for name in candidates], dtype=np.float32)
        want = np.array([min(len(query.text), 100) / 100 for query in queries], dtype=np.float32)
        explanations = [Explanation(category=f"{len(query.text)}") for query in queries]
        return Prediction(1 - np.abs(rank[None, :] - want[:, None]), explanations)


@pytest.fixture
def learned():
    config = parse_config(config_content())
    return Orchestrator(config, {}, {"table": LengthRouter()})


async def test_a_decision_is_the_same_alone_and_among_many(learned):
    requests = [chat_request("x" * (2 * size + 1)) for size in range(64)]
    alone = [await learned.decide(request) for request in requests]
    together = await asyncio.gather(*(learned.decide(request) for request in requests))
    assert [d.candidates for d in alone] == [d.candidates for d in together]
    assert [d.category for d in alone] == [d.category for d in together]
    assert {d.experts[0] for d in alone} == {"small", "medium", "large"}


async def test_the_routers_time_is_noted(learned):
    context = RequestContext(deadline=time.monotonic() + 1)
    await learned.decide(chat_request(), context=context)
    assert 0.001 <= context.router_s < 1


async def test_errors_of_a_router_are_raised(learned):
    with pytest.raises(RouterError, match="it is broken"):
        await learned.decide(chat_request("broken"))


def test_a_route_with_experts_its_router_does_not_know_is_refused():
    content = config_content(routers={"table": {"type": "static", "quality": {"small": 1}}})
    content["routes"]["auto"]["experts"] = ["small", "large"]
    with pytest.raises(ConfigError, match=r"'table' knows 'small', but not 'large'; train it"):
        build(parse_config(content))


def test_a_policy_that_names_an_expert_its_router_does_not_know_is_refused():
    content = config_content()
    del content["routers"]["table"]["quality"]["small"]
    policy = {"type": "threshold", "weak": "small", "strong": "large", "threshold": 0.1}
    content["routes"] = {"auto": {"router": "table", "policy": policy}}
    with pytest.raises(ConfigError, match="but not 'small'"):
        build(parse_config(content))


def test_a_route_without_experts_takes_those_its_router_knows():
    content = config_content(routers={"table": {"type": "static", "quality": {"small": 1}}})
    assert build(parse_config(content)).routes["auto"].experts == ("small",)


def test_a_missing_artefact_names_the_router(tmp_path):
    content = config_content(routes={})
    content["routers"] = {"knn": {"type": "artefact", "path": str(tmp_path / "nothing")}}
    with pytest.raises(ConfigError, match=r"router 'knn': .*nothing"):
        load_routers(parse_config(content))


async def test_run_answers_as_decided(orchestrator):
    request = chat_request()
    context = RequestContext(deadline=time.monotonic() + 5)
    decision = await orchestrator.decide(request)
    completion = await collect(orchestrator.run(request, decision, context))
    assert completion.text == "large says hello to you"
    assert context.path == ["large"]


async def test_named_experts_do_not_fall_back():
    orchestrator = build(config_with_rules({"large": {"error": "unavailable"}}))
    request = chat_request(model="large")
    decision = await orchestrator.decide(request)
    context = RequestContext(deadline=time.monotonic() + 5)
    with pytest.raises(ExpertUnavailableError):
        await collect(orchestrator.run(request, decision, context))


async def test_health_tells_the_state_of_every_expert(orchestrator):
    await expert(orchestrator, "medium").aclose()
    states = await orchestrator.check_health()
    assert [name for name, state in states.items() if state is None] == ["small", "large"]
    assert isinstance(states["medium"], ExpertUnavailableError)


async def test_closing_closes_every_expert(orchestrator):
    await orchestrator.aclose()
    assert all((await orchestrator.check_health()).values())
