from __future__ import annotations

import asyncio
import logging

from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from routers.baselines import BestSingleRouter
from routers.outcomes import OutcomeTable
from routers.releases import publish, rollback
from routers.testing import MODELS, example_table
from tests.orchestrator.support import CHAT, build, chat_body, chat_request, client


def router_for(best: str, path, models=MODELS):
    """An artefact that always prefers one of the example table's models."""
    table = example_table(per_split=20)
    scores = table.scores("all")
    scores[:, MODELS.index(best)] = 1.0
    preferring = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    BestSingleRouter().fit(preferring.restricted_to(models)).save(path)
    return path


def service(folder) -> Orchestrator:
    experts = [
        {"name": name, "engine": "scripted", "rules": [{"delay_s": 0.01}]} for name in MODELS
    ]
    routers = {"learned": {"type": "artefact", "path": str(folder), "reload_s": 0.02}}
    routes = {"auto": {"router": "learned"}}
    return build(parse_config({"experts": experts, "routers": routers, "routes": routes}))


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


async def test_models_show_the_experts_of_the_release_in_use(tmp_path):
    folder = tmp_path / "router"
    publish(router_for(MODELS[0], tmp_path / "a"), folder)
    orchestrator = service(folder)
    publish(router_for(MODELS[1], tmp_path / "b", MODELS[:2]), folder)
    await until(orchestrator, MODELS[1])
    entry = (await client(orchestrator).get("/v1/models/auto")).json()
    assert entry["experts"] == list(MODELS[:2])
