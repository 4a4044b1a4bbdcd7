"""A library behind one endpoint: its adapters, routes that choose or mix, token routers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("peft")

from evals.moerging.cli import library_command
from experts.library.manifest import Library, LibraryExpert
from experts.registry import open_experts
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator, load_routers
from routers.centroids import CentroidsRouter
from routers.outcomes import OutcomeTable
from tests.experts.library.conftest import home  # noqa: F401
from tests.orchestrator.support import CHAT, client

SAMPLES = {
    "one": ["the quick brown fox", "a lazy dog", "a brown dog"],
    "two": ["count one two three", "count from four to five", "two and three"],
}


@pytest.fixture(scope="module")
def library(home: Path) -> Library:  # noqa: F811
    library = Library.at(home / "served")
    for name, texts in SAMPLES.items():
        file = home / f"served_{name}.jsonl"
        file.write_text("".join(json.dumps({"prompt": t, "answer": "hello"}) + "\n" for t in texts))
        library.experts[name] = LibraryExpert(
            name=name, base=str(home / "base"), path=str(home / name), samples=str(file)
        )
    library.save()
    return library


@pytest.fixture(scope="module")
def orchestrator(library: Library, home: Path, tmp_path_factory):  # noqa: F811
    work = tmp_path_factory.mktemp("route")
    command = ["table", "--library", str(library.folder), "--base-name", "smol",
               "--out", str(work / "table")]  # fmt: skip
    made = CliRunner().invoke(library_command, command)
    assert made.exit_code == 0, made.output
    table = OutcomeTable.load(work / "table")
    CentroidsRouter(encoder="characters", threshold=0.3).fit(table).save(work / "adapters")
    config = parse_config(
        {
            "experts": [
                {"name": "smol", "engine": "transformers", "model": str(home / "base"),
                 "library": str(library.folder), "dtype": "float32", "threads": 1,
                 "token_routers": [{"name": "arrow", "method": "arrow", "top_k": 2}]}
            ],
            "routers": {"adapters": {"path": str(work / "adapters")}},
            "routes": {
                "auto": {"router": "adapters", "strategy": {"type": "single"}},
                "mixed": {"router": "adapters", "strategy": {"type": "mix", "base": "smol"}},
            },
        }
    )  # fmt: skip
    (entry,) = config.experts
    experts = open_experts(entry)
    yield Orchestrator(config, experts, load_routers(config))

    async def close() -> None:
        for expert in experts.values():
            await expert.aclose()

    asyncio.run(close())


async def _ask(orchestrator: Orchestrator, model: str, text: str) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 6,
            "temperature": 0}  # fmt: skip
    response = await client(orchestrator).post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response


def _text(response: Any) -> str:
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


async def test_base_adapters_routers_and_routes_are_listed(orchestrator):
    listed = (await client(orchestrator).get("/v1/models")).json()["data"]
    assert {"smol", "one", "two", "arrow", "auto", "mixed"} <= {model["id"] for model in listed}


async def test_a_route_asks_the_adapter_whose_samples_are_nearest(orchestrator):
    for name, text in (("one", "a quick brown dog"), ("two", "count to three")):
        routed = await _ask(orchestrator, "auto", text)
        assert routed.headers["x-collegium-model"] == name
        assert _text(routed) == _text(await _ask(orchestrator, name, text))


async def test_a_route_mixes_adapters_and_the_base_answers_what_is_near_none(orchestrator):
    text = "a quick brown dog"
    mixed = await _ask(orchestrator, "mixed", text)
    shares = dict(part.split("=") for part in mixed.headers["x-collegium-adapters"].split(","))
    assert float(shares["one"]) > float(shares.get("two", 0))
    assert sum(map(float, shares.values())) == pytest.approx(1, abs=1e-3)
    assert mixed.headers["x-collegium-merging"] == "outputs"
    far = await _ask(orchestrator, "mixed", "zzzz 99")
    assert far.headers["x-collegium-adapters"] == "none"
    assert _text(far) == _text(await _ask(orchestrator, "smol", "zzzz 99"))


async def test_a_token_router_is_an_expert_of_its_own(orchestrator):
    answers = {
        name: _text(await _ask(orchestrator, name, "a quick brown dog"))
        for name in ("smol", "one", "two", "arrow")
    }
    assert answers["arrow"] not in (answers["smol"], answers["one"], answers["two"])
