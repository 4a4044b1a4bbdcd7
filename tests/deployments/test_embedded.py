"""The embedded pool on real vLLM, started as users start it, judged through its HTTP side.

Weights are run in float32 here: there vLLM and transformers must write the same text.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.cli import with_engine
from experts.base import Expert
from experts.config import OpenAIExpertConfig, TransformersExpertConfig
from experts.openai_engine import OpenAIExpert
from experts.testing import expert_checks
from experts.types import ChatRequest, Message, collect
from orchestrator.config import load_config
from tests.deployments.service import ROOT, Service, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTIONS = {
    "general": ["What is the capital of Italy?", "Write a short poem about rain."],
    "maths": ["What is 17 + 25?", "How many metres are 3 kilometres?"],
    "intents": ["Which intent is this request: freeze my bank account please"],
    "docstrings": ["Summarise in one line: def area(radius): return 3.14159 * radius ** 2"],
    "extract": ["Turn this into JSON: two tickets for Ada Lovelace on 3 May, 40 euros"],
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pytest.importorskip("vllm")
    config = load_config().model_dump(mode="json", by_alias=True)
    config["experts"][0]["engine_kwargs"]["dtype"] = "float32"
    with running(config, tmp_path_factory.mktemp("embedded")) as running_service:
        yield running_service


def _expert(service: Service, name: str) -> OpenAIExpert:
    card = load_config().cards()[name]
    return OpenAIExpert(
        OpenAIExpertConfig(
            name=name,
            engine="openai",
            base_url=service.url + "/v1",
            model=name,
            capabilities=card.capabilities,
            context_length=card.context_length,
            max_retries=0,
        )
    )


def _request(text: str) -> ChatRequest:
    return ChatRequest(
        messages=[Message(role="user", content=text)], temperature=0.0, max_tokens=24, seed=0
    )


async def _text(expert: Expert, text: str) -> str:
    return (await collect(expert.stream(_request(text), timeout_s=120))).text


def test_ask_prints_the_answer_and_the_decision(service: Service) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "ask", "What is 17 + 25?"]
    result = subprocess.run(
        [*command, "--url", service.url], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "42" in result.stdout
    assert "model maths" in result.stderr
    assert "category maths" in result.stderr


def test_the_model_runs_in_the_engines_process(service: Service) -> None:
    """A worker process of its own would spin against the engine; see deployments.vllm_hooks."""
    (replica,) = service.replicas("expert-general")
    names = [child.name() for child in replica.children(recursive=True)]
    assert any(name.startswith("VLLM::EngineCor") for name in names), names
    assert not any(name.startswith("VLLM::Worker") for name in names), names


def test_the_service_fits_into_six_gib(service: Service) -> None:
    assert service.pss_gib() <= 6.0


@pytest.mark.parametrize("check", [pytest.param(c, id=name) for name, c in expert_checks()])
async def test_vllm_expert(check, service: Service) -> None:
    expert = _expert(service, "general")
    await check(expert)
    await expert.aclose()


async def test_greedy_float32_text_equals_the_transformers_engine(service: Service) -> None:
    from experts.registry import open_experts

    entry = with_engine(load_config(), "transformers").experts[0]
    assert isinstance(entry, TransformersExpertConfig)
    reference = open_experts(entry.model_copy(update={"dtype": "float32"}))
    experts = {name: _expert(service, name) for name in QUESTIONS}
    pairs = [(name, text) for name, texts in QUESTIONS.items() for text in texts]
    expected = [await _text(reference[name], text) for name, text in pairs]
    alone = [await _text(experts[name], text) for name, text in pairs]
    # All adapters and the base model in one batch.
    together = await asyncio.gather(*(_text(experts[name], text) for name, text in pairs))
    for expert in (*experts.values(), reference["general"]):
        await expert.aclose()
    # One at a time: a list's own message would show the first difference only.
    for pair, text, lone, joint in zip(pairs, expected, alone, together, strict=True):
        assert (lone, joint) == (text, text), pair


def test_lm_eval_runs_against_the_route(service: Service, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lm_eval_smoke", "--url", service.url,
               "--limit", "8", "--out", str(tmp_path)]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, timeout=280)
    (result,) = tmp_path.rglob("results*.json")
    scores = json.loads(result.read_text())["results"]["collegium_facts"]
    assert 0.0 <= scores["exact_match,none"] <= 1.0
