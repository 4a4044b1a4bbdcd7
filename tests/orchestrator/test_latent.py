"""One expert writes and listens to others: gates, whom, at what cost, and what is said of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experts.config import ExpertConfig, OpenAIExpertConfig, ScriptedExpertConfig
from experts.errors import ExpertFailedError
from orchestrator.config import ConfigError, parse_config
from orchestrator.core import Orchestrator
from orchestrator.memory.decisions import DecisionRecord
from orchestrator.strategies.latent import LatentStrategy, hosted_together
from orchestrator.strategies.several import shares_by_quality
from tests.orchestrator.composing import Run, scripted
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    client,
    config_content,
    events,
    expert,
    metric,
)

PEERS = "x-collegium-peers"
FIVE = {"answer": "one two three four five"}


def latent(active: int = 2) -> LatentStrategy:
    return LatentStrategy(type="latent", active=active)


def asked(run: Run, name: str) -> dict[str, float]:
    """Whom an expert was asked to listen to."""
    (request,) = run.experts[name].requests
    assert request.model_extra is not None
    peers: dict[str, float] = request.model_extra["peers"]
    return peers


def test_gates_by_hand():
    # Odds of 4, 1 and 1.
    assert shares_by_quality([0.8, 0.5, 0.5]) == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert shares_by_quality([0.3]) == [1.0]


def test_gates_are_the_softmax_of_the_scores_that_predict_quality():
    scores = [1.7, -0.4, 0.2]
    total = sum(map(math.exp, scores))
    qualities = [1 / (1 + math.exp(-score)) for score in scores]
    assert shares_by_quality(qualities) == pytest.approx(
        [math.exp(score) / total for score in scores]
    )


def test_certain_qualities_have_gates_too():
    found = shares_by_quality([1.0, 0.0, 1.0])
    assert found == pytest.approx([0.5, 0.0, 0.5], abs=1e-9)
    assert min(found) > 0


async def test_the_first_writes_and_the_next_are_peers():
    run = Run(latent(3), [scripted(name) for name in "abcd"])
    assert (await run.answer()).text == "a"
    # Predicted 0.9, 0.8 and 0.7: odds of 9, 4 and 7/3.
    total = 9 + 4 + 7 / 3
    assert asked(run, "a") == pytest.approx({"b": 4 / total, "c": 7 / 3 / total})
    assert run.context.peers == asked(run, "a")
    assert not any(run.experts[name].requests for name in "bcd")
    assert (run.context.path, run.context.expert) == (["a"], "a")
    assert [(call.expert, call.error) for call in run.context.calls[1:]] == [
        ("b", None),
        ("c", None),
    ]
    assert run.calls("listen") == ["b", "c"]


async def test_one_expert_may_always_write():
    run = Run(
        LatentStrategy(type="latent", active=3, writer="c"), [scripted(name) for name in "abcd"]
    )
    assert (await run.answer()).text == "c"
    # Predicted 0.7 of the writer, 0.9 and 0.8 of the others: odds of 7/3, 9 and 4.
    total = 7 / 3 + 9 + 4
    assert asked(run, "c") == pytest.approx({"a": 9 / total, "b": 4 / total})


async def test_who_always_writes_does_not_where_it_cannot():
    run = Run(LatentStrategy(type="latent", writer="z"), [scripted("a"), scripted("b")])
    assert (await run.answer()).text == "a"


@pytest.mark.parametrize(("width", "peers"), [(None, ["b"]), (1, []), (3, ["b", "c"])])
async def test_the_decision_may_say_how_many(width: int | None, peers: list[str]):
    run = Run(latent(), [scripted(name) for name in "abc"], width=width)
    await run.answer()
    assert list(asked(run, "a")) == peers


@pytest.mark.parametrize("active", [1, 2])
async def test_peers_are_the_strategys_to_say(active: int):
    run = Run(latent(active), [scripted("a"), scripted("b")], peers={"mallory": 1.0})
    await run.answer()
    assert list(asked(run, "a")) == ["b"][: active - 1]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_failed_writer_is_replaced_and_is_no_peer(stream: bool):
    experts = [scripted("a", {"error": "failed"}), *map(scripted, "bcd")]
    run = Run(latent(), experts, stream=stream)
    assert (await run.answer()).text == "b"
    assert list(asked(run, "b")) == ["c"]
    assert run.context.path == ["a", "b"]
    assert list(run.context.peers or ()) == ["c"]
    assert run.calls("listen") == ["c"]


async def test_the_last_one_writes_alone():
    experts = [scripted("a", {"error": "failed"}), scripted("b")]
    run = Run(latent(), experts)
    assert (await run.answer()).text == "b"
    assert asked(run, "b") == run.context.peers == {}


async def test_a_plain_answer_that_breaks_off_is_replaced_though_it_lost_a_peer():
    rule = {**FIVE, "peer_lost_after_chunks": 1, "error": "failed", "error_after_chunks": 3}
    run = Run(latent(), [scripted("a", rule), scripted("b"), scripted("c")], stream=False)
    assert (await run.answer()).text == "b"
    ended = [(call.expert, call.purpose, call.error) for call in run.context.calls]
    assert ended == [
        ("a", "answer", "ExpertFailedError"),
        ("b", "listen", "lost"),
        ("b", "answer", None),
        ("c", "listen", None),
    ]


async def test_peers_of_a_stream_that_breaks_off_are_not_to_blame():
    broken = {**FIVE, "error": "failed", "error_after_chunks": 3}
    run = Run(latent(), [scripted("a", broken), scripted("b")])
    assert isinstance(await run.error(), ExpertFailedError)
    assert [call.error for call in run.context.calls] == ["ExpertFailedError", "cancelled"]
    assert all(call.seconds is not None for call in run.context.calls)


async def test_who_is_listened_to_is_paid_for_what_it_reads():
    prices = {"input_usd_per_mtok": 10.0, "output_usd_per_mtok": 100.0}
    experts = [scripted("a", FIVE, **prices), scripted("b", **prices)]
    run = Run(latent(), experts, messages=[{"role": "user", "content": "now say it all"}])
    usage = (await run.answer()).usage
    # The client sees the writer's: a prompt of four words, five words written.
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 5)
    assert usage == run.context.usage
    writer, peer = run.context.calls
    assert writer.cost_usd == pytest.approx((4 * 10 + 5 * 100) / 1e6)
    # The peer reads all nine and writes nothing.
    assert (peer.usage.prompt_tokens, peer.usage.completion_tokens) == (9, 0)
    assert peer.cost_usd == pytest.approx(9 * 10 / 1e6)
    assert run.context.cost_usd == pytest.approx(630 / 1e6)


async def test_a_cost_limit_leaves_out_peers_first():
    prices = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 1.0}
    experts = [scripted(name, **prices) for name in "abc"]
    text: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 100}
    # Everyone is expected to cost 200 tokens: 100 of the prompt, 100 of the answer.
    for max_cost, peers in ((700e-6, ["b", "c"]), (500e-6, ["b"]), (300e-6, [])):
        run = Run(latent(3), experts, max_cost=max_cost, **text)
        await run.answer()
        assert list(run.context.peers or ()) == peers


def content_of(strategy: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    routes = {
        "auto": {"router": "table", "strategy": strategy or {"type": "latent", "active": 3}},
        "plain": {"router": "table"},
    }
    return config_content(routes=routes, **changes)


def orchestrator_of(rule: dict[str, Any] | None = None, **changes: Any) -> Orchestrator:
    """large writes, medium and small are peers."""
    content = content_of(**changes)
    content["experts"][2]["rules"] = [rule or FIVE]
    return build(parse_config(content))


# Qualities of 0.9, 0.7 and 0.5: odds of 9, 7/3 and 1, which add up to 37/3.
GATES = {"medium": 7 / 37, "small": 3 / 37}
HEADER = "medium=0.1892,small=0.0811"


@pytest.mark.parametrize("stream", [True, False])
async def test_headers_name_the_peers_with_their_gates(stream: bool):
    response = await client(orchestrator_of()).post(CHAT, json=chat_body(stream=stream))
    assert response.headers[PEERS] == HEADER
    assert response.headers["x-collegium-model"] == "large"
    assert response.headers["x-collegium-path"] == "large"
    assert response.headers["x-collegium-strategy"] == "latent"


async def test_whoever_is_not_asked_to_listen_says_nothing_of_peers():
    http = client(orchestrator_of())
    for model in ("plain", "large"):
        assert PEERS not in (await http.post(CHAT, json=chat_body(model=model))).headers


async def test_the_requests_top_k_counts_the_writer():
    http = client(orchestrator_of())
    two = await http.post(CHAT, json=chat_body(top_k=2))
    # Odds of 9 and 7/3.
    assert two.headers[PEERS] == "medium=0.2059"
    one = await http.post(CHAT, json=chat_body(top_k=1))
    assert one.headers[PEERS] == "none"


async def test_a_named_expert_gets_the_clients_peers():
    orchestrator = orchestrator_of()
    body = chat_body(model="large", peers={"small": 0.25})
    response = await client(orchestrator).post(CHAT, json=body)
    assert response.headers[PEERS] == "small=0.2500"
    (request,) = expert(orchestrator, "large").requests
    assert request.model_extra == {"peers": {"small": 0.25}}
    wrong = await client(orchestrator).post(CHAT, json=chat_body(model="large", peers=["small"]))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "peers")


async def record_of(orchestrator: Orchestrator, id: str) -> DecisionRecord:
    return DecisionRecord.model_validate_json(
        (await client(orchestrator).get(f"/v1/decisions/{id}")).content
    )


async def test_the_record_has_peers_and_their_calls():
    orchestrator = orchestrator_of()
    response = await client(orchestrator).post(CHAT, json=chat_body())
    record = await record_of(orchestrator, response.headers["x-collegium-decision-id"])
    assert record.peers == pytest.approx(GATES)
    assert record.expert == "large"
    asked = [(call.expert, call.purpose, call.prompt_tokens) for call in record.path]
    assert asked == [("large", "answer", 1), ("medium", "listen", 6), ("small", "listen", 6)]
    # Large: 1 read at 5 and 5 written at 10; medium reads 6 at 1, small 6 at 0.1.
    assert record.cost_usd == pytest.approx((5 + 50 + 6 + 0.6) / 1e6)
    assert float(response.headers["x-collegium-cost"]) == pytest.approx(record.cost_usd)
    assert response.json()["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 5,
        "total_tokens": 6,
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_a_peer_lost_midway_is_said(stream: bool):
    orchestrator = orchestrator_of({**FIVE, "peer_lost_after_chunks": 2})
    http = client(orchestrator)
    response = await http.post(CHAT, json=chat_body(stream=stream))
    assert response.headers[PEERS] == HEADER, "as the answer began"
    comments = [line for line in response.text.splitlines() if line.startswith(": ")]
    assert comments == ([": large goes on without medium"] if stream else [])
    if stream:
        data = "".join(
            f"{block}\n\n" for block in response.text.split("\n\n") if block.startswith("data")
        )
        *chunks, done = events(data)
        said = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        assert ("".join(said), done) == (FIVE["answer"], "[DONE]")
    else:
        assert response.json()["choices"][0]["message"]["content"] == FIVE["answer"]
    record = await record_of(orchestrator, response.headers["x-collegium-decision-id"])
    assert [(call.expert, call.error) for call in record.path] == [
        ("large", None),
        ("medium", "lost"),
        ("small", None),
    ]
    lost, kept = record.path[1:]
    assert 0 < lost.prompt_tokens < kept.prompt_tokens
    page = (await http.get("/metrics")).text
    assert metric(page, 'collegium_peers_lost_total{expert="medium"}') == 1
    assert metric(page, 'collegium_peers_lost_total{expert="small"}') == 0
    lost_calls = 'collegium_expert_calls_total{expert="medium",outcome="lost",purpose="listen"}'
    assert metric(page, lost_calls) == 1


async def test_a_peer_that_is_lost_before_the_first_byte_is_missing_from_the_header():
    orchestrator = orchestrator_of({**FIVE, "peer_lost_after_chunks": 0})
    http = client(orchestrator)
    response = await http.post(CHAT, json=chat_body(stream=True))
    assert response.headers[PEERS] == "small=0.0811"
    assert not [line for line in response.text.splitlines() if line.startswith(": ")]
    page = (await http.get("/metrics")).text
    assert metric(page, 'collegium_peers_lost_total{expert="medium"}') == 1
    assert metric(page, 'collegium_cost_usd_total{expert="medium"}') == 0


async def test_each_of_several_answers_names_its_peers():
    response = await client(orchestrator_of()).post(CHAT, json=chat_body(n=3))
    assert response.headers[PEERS] == HEADER
    assert len(response.json()["choices"]) == 3
    assert response.headers["x-collegium-path"] == "large"


async def test_an_answer_that_lost_a_peer_is_not_given_again():
    body = chat_body(temperature=0)
    for rule, state in ((FIVE, "hit"), ({**FIVE, "peer_lost_after_chunks": 2}, "miss")):
        http = client(orchestrator_of(rule, cache={}))
        first, second = [await http.post(CHAT, json=body) for _ in range(2)]
        assert first.headers["x-collegium-cache"] == "miss"
        assert second.headers["x-collegium-cache"] == state


async def test_a_latent_route_is_listed_with_its_members():
    entry = (await client(orchestrator_of()).get("/v1/models/auto")).json()
    assert (entry["kind"], entry["experts"]) == ("route", ["small", "medium", "large"])


REMOTE = {"name": "remote", "engine": "openai", "base_url": "http://x/v1", "model": "m"}


def test_experts_that_are_not_hosted_together_are_refused():
    content = content_of()
    content["experts"].append(REMOTE)
    content["routers"]["table"]["quality"]["remote"] = 0.8
    content["routes"]["auto"]["experts"] = ["large", "remote"]
    with pytest.raises(ConfigError, match="latent' of route 'auto' needs experts that one entry"):
        parse_config(content)
    content["routes"]["auto"]["experts"] = ["large", "small"]
    parse_config(content)


def test_experts_that_only_the_router_knows_are_checked_too():
    content = content_of()
    content["experts"].append(REMOTE)
    content["routers"]["table"]["quality"]["remote"] = 0.8
    config = parse_config(content)
    with pytest.raises(ConfigError, match="which 'small', 'medium', 'large', 'remote' are not"):
        build(config)
    del content["routers"]["table"]["quality"]["remote"]
    build(parse_config(content))


def test_who_always_writes_is_one_of_the_routes_experts():
    content = content_of({"type": "latent", "writer": "small"})
    build(parse_config(content))
    content["routes"]["auto"]["experts"] = ["large", "medium"]
    with pytest.raises(ConfigError, match="writer 'small' of route 'auto' is none of its experts"):
        parse_config(content)
    content["routes"]["auto"]["experts"] = None
    del content["routers"]["table"]["quality"]["small"]
    with pytest.raises(ConfigError, match="none of its experts: 'medium', 'large'"):
        build(parse_config(content))


def test_hosted_together():
    entries: list[ExpertConfig] = [
        *(ScriptedExpertConfig(name=name, engine="scripted") for name in "ab"),
        OpenAIExpertConfig.model_validate(REMOTE),
    ]
    assert hosted_together(entries, ["a", "b"])
    assert not hosted_together(entries, ["a", "remote"])
    assert not hosted_together(entries, ["remote"])
    assert not hosted_together(entries, ["a", "nobody"])


def test_at_least_one_is_active():
    with pytest.raises(ConfigError, match="active"):
        parse_config(content_of({"type": "latent", "active": 0}))
