from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experts import errors
from experts.config import LatentExpertConfig
from experts.latent.artefact import load_latent, save_latent
from experts.latent.config import MemberConfig
from experts.latent.members import load_members
from experts.registry import open_experts
from experts.testing import expert_checks
from experts.types import ChatRequest, CompletionRequest, collect
from tests.experts.latent import tiny

# By name: architecture and size of the vocabulary.
MEMBERS = {"general": ("llama", 420), "maths": ("llama", 420), "other": ("gemma3", 300)}
CHECKS = [pytest.param(check, id=name) for name, check in expert_checks()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three experts and an artefact, on disk."""
    folder = tmp_path_factory.mktemp("latent")
    for seed, (name, (architecture, size)) in enumerate(MEMBERS.items()):
        tiny.save(folder / name, architecture, size, seed)
    torch.set_num_threads(1)
    members = load_members(_members(folder), n_stacks=3, dtype="float32", device="cpu")
    save_latent(folder / "artefact", tiny.latent_model(members), members, {})
    return folder


def _members(folder: Path) -> list[MemberConfig]:
    return [MemberConfig(name=name, model=str(folder / name)) for name in MEMBERS]


def _config(folder: Path, **fields: Any) -> LatentExpertConfig:
    defaults: dict[str, Any] = {
        "name": "thoughts",
        "engine": "latent",
        "artefact": str(folder / "artefact"),
        "members": _members(folder),
        "dtype": "float32",
        "max_batch_size": 8,
        "default_max_tokens": 32,
        "threads": 1,
    }
    return LatentExpertConfig.model_validate({**defaults, **fields})


@pytest.fixture
async def engine(home):
    """An engine of its own, since experts may be taken out."""
    from experts.latent.engine import LatentEngine

    opened = LatentEngine(_config(home))
    yield opened
    await opened.aclose()


@pytest.fixture(scope="module")
def shared(home):
    from experts.latent.engine import LatentEngine

    opened = LatentEngine(_config(home))
    yield opened
    asyncio.run(opened.aclose())


class Listening:
    """An expert that is asked with peers where a request names none."""

    def __init__(self, expert: Any, **peers: float) -> None:
        self._expert = expert
        self._peers = peers
        self.card = expert.card

    def stream(self, request: Any, *, timeout_s: float) -> Any:
        fields = {"peers": self._peers, **(request.model_extra or {})}
        return self._expert.stream(request.model_copy(update=fields), timeout_s=timeout_s)

    async def check_health(self) -> None:
        await self._expert.check_health()

    async def aclose(self) -> None:
        await self._expert.aclose()


@pytest.mark.parametrize("check", CHECKS)
async def test_expert_with_peers(check, shared):
    await check(Listening(shared.experts()["general"], maths=0.3, other=0.3))


def _chat(text: str = "hello world", **fields: Any) -> ChatRequest:
    defaults = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    messages = [{"role": "user", "content": text}]
    return ChatRequest.model_validate({"messages": messages, **defaults, **fields})


async def _ask(expert, text="hello world", **fields):
    return await collect(expert.stream(_chat(text, **fields), timeout_s=60))


async def test_answer_with_peers_is_another_than_alone_and_says_so(shared):
    expert = shared.experts()["general"]
    alone = await _ask(expert, max_tokens=12)
    peers = {"maths": 0.4, "other": 0.4}
    together = await _ask(expert, max_tokens=12, peers=peers)
    assert alone.choices[0].peers is None
    assert together.choices[0].peers == peers
    assert together.text != alone.text
