from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from orchestrator.config import CollegiumConfig, parse_config
from orchestrator.core import Orchestrator, load_routers
from routers.baselines import BestSingleRouter
from routers.outcomes import OutcomeTable
from routers.releases import publish, rollback
from routers.testing import MODELS, example_table
from tests.orchestrator.support import (
    CHAT,
    build,
    chat_body,
    chat_request,
    client,
    eventually,
    expert,
)

LEARNS = {"auto": {"router": "learned", "learning": {"encoder": "hashing"}}}


def router_for(best: str, path, models=MODELS):
    """An artefact that always prefers one of the example table's models."""
    table = example_table(per_split=20)
    scores = table.scores("all")
    scores[:, MODELS.index(best)] = 1.0
    preferring = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    BestSingleRouter().fit(preferring.restricted_to(models)).save(path)
    return path


def config_for(folder, rules: Mapping[str, Any] | None = None, **changes: Any) -> CollegiumConfig:
    """Three experts behind a router with releases; the one rule of some experts replaced."""
    given = rules or {}
    experts = [
        {"name": name, "engine": "scripted", "rules": [given.get(name, {"delay_s": 0.01})]}
        for name in MODELS
    ]
    routers = {"learned": {"type": "artefact", "path": str(folder), "reload_s": 0.02}}
    routes = {"auto": {"router": "learned"}}
    return parse_config({"experts": experts, "routers": routers, "routes": routes, **changes})


def service(folder, rules: Mapping[str, Any] | None = None, **changes: Any) -> Orchestrator:
    return build(config_for(folder, rules, **changes))


async def first_expert(orchestrator: Orchestrator) -> str:
    return (await orchestrator.decide(chat_request())).experts[0]


async def until(orchestrator: Orchestrator, expert: str) -> None:
    async with asyncio.timeout(5):
        while await first_expert(orchestrator) != expert:
            await asyncio.sleep(0.01)


async def test_a_release_is_taken_up_and_rolled_back_without_losing_a_request(tmp_path):
    folder = tmp_path / "router"
    old = publish(router_for(MODELS[0], tmp_path / "a"), folder)
    orchestrator = service(folder)
    http = client(orchestrator)
    answers: list[tuple[int, str]] = []
    running = True

    async def ask_on() -> None:
        while running:
            response = await http.post(CHAT, json=chat_body())
            answers.append((response.status_code, response.json()["model"]))

    clients = [asyncio.ensure_future(ask_on()) for _ in range(8)]
    await until(orchestrator, MODELS[0])
    new = publish(router_for(MODELS[1], tmp_path / "b"), folder)
    await until(orchestrator, MODELS[1])
    assert (await orchestrator.decide(chat_request())).router_release == new
    rollback(folder)
    await until(orchestrator, MODELS[0])
    assert (await orchestrator.decide(chat_request())).router_release == old
    running = False
    await asyncio.gather(*clients)
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {MODELS[0], MODELS[1]}


async def test_a_release_that_does_not_go_with_the_config_is_refused_once(tmp_path, caplog):
    folder = tmp_path / "router"
    publish(router_for(MODELS[0], tmp_path / "a"), folder)
    orchestrator = service(folder)
    unknown = tmp_path / "unknown"
    table = example_table(per_split=20)
    renamed = OutcomeTable(
        table.prompts, models=["x", "y", "z"], numbers={"score": table.scores("all")}
    )
    BestSingleRouter().fit(renamed).save(unknown)
    with caplog.at_level(logging.ERROR, "collegium.releases"):
        publish(unknown, folder)
        for _ in range(20):
            assert await first_expert(orchestrator) == MODELS[0]
            await asyncio.sleep(0.01)
    assert len(caplog.records) == 1
    assert "keeps release 0001-" in caplog.text
    publish(router_for(MODELS[2], tmp_path / "c"), folder)
    await until(orchestrator, MODELS[2])


async def test_a_folder_that_is_away_for_a_while_is_logged_once(tmp_path, caplog):
    folder, away = tmp_path / "router", tmp_path / "away"
    publish(router_for(MODELS[0], tmp_path / "a"), folder)
    orchestrator = service(folder)
    folder.rename(away)
    with caplog.at_level(logging.ERROR, "collegium.releases"):
        for _ in range(20):
            assert await first_expert(orchestrator) == MODELS[0]
            await asyncio.sleep(0.01)
    assert len(caplog.records) == 1
    away.rename(folder)
    publish(router_for(MODELS[1], tmp_path / "b"), folder)
    await until(orchestrator, MODELS[1])


async def test_models_show_the_experts_of_the_release_in_use(tmp_path):
    folder = tmp_path / "router"
    publish(router_for(MODELS[0], tmp_path / "a"), folder)
    orchestrator = service(folder)
    publish(router_for(MODELS[1], tmp_path / "b", MODELS[:2]), folder)
    await until(orchestrator, MODELS[1])
    entry = (await client(orchestrator).get("/v1/models/auto")).json()
    assert entry["experts"] == list(MODELS[:2])


async def test_a_release_published_while_the_service_starts_is_taken_up(tmp_path):
    folder = tmp_path / "router"
    old = publish(router_for(MODELS[0], tmp_path / "a"), folder)
    config = config_for(folder)
    routers = load_routers(config)
    new = publish(router_for(MODELS[1], tmp_path / "b"), folder)
    orchestrator = Orchestrator(config, {}, routers)
    decision = await orchestrator.decide(chat_request())
    assert (decision.experts[0], decision.router_release) == (MODELS[0], old)
    await until(orchestrator, MODELS[1])
    assert (await orchestrator.decide(chat_request())).router_release == new


async def test_embeddings_alone_take_up_a_release(tmp_path):
    folder = tmp_path / "router"
    publish(router_for("cook", tmp_path / "a"), folder)
    orchestrator = build(
        config_for(
            folder,
            experts=[{"name": "one", "engine": "scripted"}],
            routes={},
            embedders={name: {"encoder": "characters"} for name in MODELS},
            embedding_route={"router": "learned"},
        )
    )
    http = client(orchestrator)

    async def chosen() -> str:
        return str((await http.post("/v1/embeddings", json={"input": "hello"})).json()["model"])

    assert await chosen() == "cook"
    publish(router_for("lawyer", tmp_path / "b"), folder)
    async with asyncio.timeout(5):
        while await chosen() != "lawyer":
            await asyncio.sleep(0.01)


async def test_a_release_with_one_more_expert_keeps_what_was_learnt(tmp_path):
    folder = tmp_path / "router"
    publish(router_for("cook", tmp_path / "a", MODELS[:2]), folder)
    orchestrator = service(folder, routes=LEARNS)
    http = client(orchestrator)

    async def rated(reward: float) -> str:
        response = await http.post(CHAT, json=chat_body())
        assert orchestrator.learning.learn(response.headers["x-collegium-decision-id"], reward)
        return str(response.json()["model"])

    assert await rated(1.0) == "cook"
    publish(router_for("lawyer", tmp_path / "b"), folder)
    await until(orchestrator, "lawyer")
    assert await rated(1.0) == "lawyer"
    decision = await orchestrator.decide(chat_request())
    assert len(decision.candidates) == 3
    assert decision.detail["learning"]["observations"] == 2


async def test_a_release_with_one_expert_less_breaks_no_request_under_way(tmp_path):
    folder = tmp_path / "router"
    publish(router_for("cook", tmp_path / "a"), folder)
    rules = {"cook": {"delay_s": 1.0, "error": "unavailable"}}
    orchestrator = service(folder, rules, routes=LEARNS)
    answer = asyncio.ensure_future(client(orchestrator).post(CHAT, json=chat_body()))
    await eventually(lambda: expert(orchestrator, "cook").active == 1)
    publish(router_for("lawyer", tmp_path / "b", ("cook", "lawyer")), folder)
    await until(orchestrator, "lawyer")
    assert not answer.done()
    response = await answer
    assert (response.status_code, response.json()["model"]) == (200, "generalist")
    assert orchestrator.learning.learn(response.headers["x-collegium-decision-id"], 1.0)
    decision = await orchestrator.decide(chat_request())
    assert "generalist" not in decision.experts
    assert decision.detail["learning"]["observations"] == 1
