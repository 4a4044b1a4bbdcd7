"""What a vLLM replica is asked and what its errors mean, without an engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deployments.vllm_server import VLLMServer, _error, _max_rank, multiplexed_model_id
from experts.config import VLLMExpertConfig
from experts.errors import (
    ContextLengthError,
    ExpertConfigError,
    ExpertFailedError,
    ExpertOverloadedError,
    ExpertUnavailableError,
    InvalidRequestError,
)
from experts.types import ChatRequest
from orchestrator.http.requests import ChatBody
from tests.orchestrator.support import chat_body

ENTRY = {"name": "base", "engine": "vllm", "model": "some/model", "device": "cpu"}


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        (
            "This model's maximum context length is 2048 tokens. However, your prompt contains "
            "at least 2049 input tokens, which exceeds this limit even without any output tokens.",
            2049,
        ),
        (
            "This model's maximum context length is 2048 tokens. However, your prompt contains "
            "99999 characters (more than 81920 characters, which is the upper bound for 2048 input "
            "tokens). Please reduce the length of the input prompt.",
            2049,
        ),
        (
            "This model's maximum context length is 2048 tokens. However, you requested 500 output "
            "tokens and your prompt contains at least 1600 input tokens, for a total of at least "
            "2100 tokens.",
            2100,
        ),
    ],
)
def test_a_prompt_that_is_too_long_says_by_how_much(message, tokens):
    error = _error("base", {"error": {"message": message, "code": 400}})
    assert isinstance(error, ContextLengthError)
    assert error.message == ContextLengthError("base", tokens, 2048).message


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, InvalidRequestError),
        (408, ExpertUnavailableError),
        (429, ExpertOverloadedError),
        (500, ExpertFailedError),
        (None, ExpertFailedError),
    ],
)
def test_whose_fault_an_error_is_depends_on_its_status(code, kind):
    error = _error("base", {"message": "no tokens today", "code": code})
    assert type(error) is kind


@pytest.mark.parametrize(
    "path", ["s3://bucket/adapters/sql-2024", "s3://bucket/adapters/sql-2024/"]
)
def test_a_cloud_adapter_is_called_by_its_folder(path):
    assert multiplexed_model_id("base", path) == "base:sql-2024"


@pytest.mark.parametrize(("rank", "taken"), [(4, 8), (48, 64), (512, 512), (513, None)])
def test_an_adapter_needs_a_rank_that_vllm_takes(tmp_path, rank, taken):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    paths = {"sql": str(tmp_path)}
    if taken is None:
        with pytest.raises(ExpertConfigError, match="rank 513; vLLM takes 512 at most"):
            _max_rank(paths)
    else:
        assert _max_rank(paths) == taken


class Engine:
    """Keeps what it is asked, in the place of Ray Serve LLM's server."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def chat(self, request):
        """Ray's own request, as the engine gets it."""
        self.asked.append(request)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "priorities"), [("priority", [1, 0, 0, 0]), ("fcfs", [0] * 4), (None, [0] * 4)]
)
async def test_priority_reaches_an_engine_that_schedules_by_it(policy, priorities):
    pytest.importorskip("vllm")
    server = object.__new__(VLLMServer)
    kwargs = {"scheduling_policy": policy} if policy else {}
    server._config = VLLMExpertConfig.model_validate({**ENTRY, "engine_kwargs": kwargs})
    server._remote = {"sql": "base:sql-2024"}
    server._server = engine = Engine()
    for priority in ("low", "normal", None):
        await server._ask("base", ChatBody.model_validate(chat_body(priority=priority)))
    await server._ask("sql", ChatRequest.model_validate(chat_body()))
    assert [request.priority for request in engine.asked] == priorities
    sent = "priority" in engine.asked[0].model_fields_set
    assert sent is (policy == "priority")
    assert engine.asked[-1].model == "base:sql-2024"
