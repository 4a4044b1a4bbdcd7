from __future__ import annotations

import json
import subprocess
import sys

import pytest

from experts.config import OpenAIExpertConfig, ScriptedExpertConfig, VLLMExpertConfig
from experts.errors import ExpertConfigError
from experts.registry import open_experts


async def test_opens_experts_by_engine():
    scripted = open_experts(ScriptedExpertConfig(name="s", engine="scripted"))
    remote = open_experts(
        OpenAIExpertConfig(name="r", engine="openai", base_url="http://127.0.0.1:9/v1", model="m")
    )
    assert [*scripted, *remote] == ["s", "r"]
    assert remote["r"].card.base_model == "m"


def test_vllm_experts_are_refused_with_what_to_do():
    with pytest.raises(ExpertConfigError, match="run `collegium serve`, or use engine transfo"):
        open_experts(VLLMExpertConfig(name="v", engine="vllm", model="m"))


def test_engines_import_nothing_heavy():
    code = (
        "import sys, json, experts.registry, experts.scripted, experts.openai_engine, "
        "experts.transformers_engine, experts.testing; print(json.dumps(list(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "aiohttp", "openai"} & set(json.loads(output))
