"""What is said of a latent engine before it is started, and how it is hosted; without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deployments import preflight
from deployments.builders import build
from experts.types import Chunk
from orchestrator.cli import main
from orchestrator.config import ConfigError, load_config, parse_config
from tests.deployments.latent_pool import MEMBERS, Server, latent_entry
from tests.deployments.service import ROOT
from tests.orchestrator.support import chat_request

pytest.importorskip("experts.latent.engine")

QUALITY = {"general": 0.8, "maths": 0.7, "extract": 0.6, "other": 0.5}


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return latent_entry(tmp_path_factory.mktemp("latent"))


def _content(*entries: dict[str, Any], experts: list[str] | None = None) -> dict[str, Any]:
    route = {"router": "fixed", "experts": experts, "strategy": {"type": "latent"}}
    return {
        "experts": list(entries),
        "routers": {"fixed": {"type": "static", "quality": QUALITY}},
        "routes": {"auto": route},
    }


def _doctor(tmp_path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    file = tmp_path / "config.yaml"
    content = content if "experts" in content else {"experts": [content]}
    file.write_text(json.dumps({**content, "server": {"port": 0}}))
    result = CliRunner().invoke(main, ["doctor", "--config", str(file), "--json"])
    return {row["what"]: row for row in json.loads(result.output)}


def test_all_members_are_one_deployment(entry):
    config = parse_config({"experts": [entry]})
    assert list(config.cards()) == list(MEMBERS)
    _, hosting = build(config)._bound_deployment.init_args
    assert hosting._bound_deployment.name == "expert-thoughts"


def test_a_route_keeps_to_one_engine(entry):
    other = {"name": "other", "engine": "scripted"}
    parse_config(_content(entry, other, experts=list(MEMBERS)))
    with pytest.raises(ConfigError, match="one entry with engine 'latent' hosts together"):
        parse_config(_content(entry, other, experts=["general", "other"]))


def test_an_artefact_is_found_beside_the_config(entry, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"experts": [{**entry, "artefact": "thoughts"}]}))
    (found,) = load_config(file).model_dump()["experts"]
    assert found["artefact"] == str(tmp_path / "thoughts")


def test_members_that_do_not_fit_are_refused_with_figures(entry, monkeypatch):
    # Ray, the engine, and three members of 6.6 million bytes in bfloat16.
    assert preflight.needed_gib(parse_config({"experts": [entry]})) == pytest.approx(
        2.018, abs=1e-3
    )
    monkeypatch.setattr(preflight, "available_bytes", lambda: 1.5 * 2**30)
    with pytest.raises(ConfigError, match=r"at least 2\.0 GiB of memory, 1\.5 GiB are available"):
        preflight.check_memory(parse_config({"experts": [entry]}))


def test_the_memory_check_leaves_no_torch_behind(entry, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"experts": [entry]}))
    script = (
        "import sys; from deployments.preflight import needed_gib; "
        "from orchestrator.config import load_config; "
        f"assert needed_gib(load_config({str(file)!r})) > 2.01; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, cwd=ROOT)


def test_doctor_names_what_members_lack(entry, tmp_path):
    assert _doctor(tmp_path, entry)["weights"]["ok"]
    first, *others = entry["members"]
    gone = {**entry, "members": [{**first, "model": "/nowhere/model"}, *others]}
    rows = _doctor(tmp_path, gone)
    assert "expert 'thoughts': '/nowhere/model' does not exist" in rows["weights"]["found"]
    assert "memory" in rows
    unlearnt = {**entry, "artefact": "/nowhere/thoughts"}
    assert "'/nowhere/thoughts'" in _doctor(tmp_path, unlearnt)["weights"]["found"]


def test_doctor_tells_a_collaboration_of_other_experts(entry, tmp_path):
    first, *others = entry["members"]
    renamed = {**entry, "members": [{**first, "name": "sums"}, *others]}
    assert (
        "was trained for the experts general, maths, extract, not for sums, maths, extract"
        in _doctor(tmp_path, renamed)["weights"]["found"]
    )
    empty = {**entry, "artefact": str(tmp_path)}
    assert "latent.json is missing" in _doctor(tmp_path, empty)["weights"]["found"]


def test_doctor_tells_routes_whose_router_knows_others(entry, tmp_path):
    content = _content(entry, {"name": "other", "engine": "scripted"})
    found = _doctor(tmp_path, content)["routers"]["found"]
    assert "'general', 'maths', 'extract', 'other' are not" in found


async def test_the_deployment_answers_for_every_member(entry):
    server = Server(parse_config({"experts": [entry]}).experts[0].model_dump(mode="json"))
    try:
        for name in MEMBERS:
            await server.healthy(name)
        peers = {"maths": 0.3, "extract": 0.2}
        assert await _listened_to(server, peers) == [peers]
        await server.drop("maths")
        await server.check_health()
        assert [list(one) for one in await _listened_to(server, peers)] == [["extract"]]
    finally:
        for expert in server._experts.values():
            await expert.aclose()


async def _listened_to(server: Server, peers: dict[str, float]) -> list[dict[str, float]]:
    request = chat_request("hello", max_tokens=8, peers=peers)
    chunks = [chunk async for batch in server.stream("general", request, 30) for chunk in batch]
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    return [one.peers for one in chunks if isinstance(one, Chunk) and one.peers is not None]
