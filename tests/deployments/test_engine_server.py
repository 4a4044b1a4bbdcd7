"""One deployment that hosts several experts, without Ray."""

from __future__ import annotations

import pytest

from experts.errors import ExpertConfigError, ExpertUnavailableError
from experts.scripted import ScriptedExpert
from tests.deployments.latent_pool import Server
from tests.orchestrator.composing import scripted

ENTRY = {"name": "a", "engine": "scripted"}


class Engine:
    """Hosts several scripted experts, none of which has the entry's name."""

    def __init__(self, _: object) -> None:
        self.members = {name: scripted(name) for name in ("general", "maths")}
        self.dropped: list[str] = []

    def experts(self) -> dict[str, ScriptedExpert]:
        return self.members

    def drop(self, member: str) -> None:
        self.dropped.append(member)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr("experts.scripted.ScriptedExpert", Engine)
    return Server(ENTRY)


async def test_an_engine_is_replaced_when_none_of_its_experts_can_answer(server: Server):
    general, maths = server._experts.values()
    await server.check_health()
    await general.aclose()
    await server.check_health()
    with pytest.raises(ExpertUnavailableError, match="general"):
        await server.healthy("general")
    await maths.aclose()
    with pytest.raises(ExpertUnavailableError, match="general"):
        await server.check_health()


async def test_a_member_can_be_taken_out(server: Server):
    await server.drop("maths")
    assert server._engine.dropped == ["maths"]


async def test_only_members_can_be_taken_out():
    with pytest.raises(ExpertConfigError, match="has no members"):
        await Server(ENTRY).drop("a")
