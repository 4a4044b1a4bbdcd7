"""The deployment that hosts one vLLM engine: a Ray Serve LLM server and its adapters.

Importing this module imports neither vLLM nor ``ray.serve.llm``: that takes ten seconds and half a
gigabyte, which only the replica should pay.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from http import HTTPStatus
from typing import Any

from deployments.batching import Batch, in_batches
from experts.base import AnyRequest
from experts.config import VLLMExpertConfig
from experts.errors import (
    ContextLengthError,
    ExpertConfigError,
    ExpertFailedError,
    ExpertOverloadedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    InvalidRequestError,
)
from experts.types import ChatRequest, Chunk, Usage
from orchestrator.options import RoutingOptions

__all__ = ["VLLMServer", "is_remote", "llm_config", "multiplexed_model_id", "vllm_environment"]

# LoRA ranks that vLLM has kernels for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NO_DOWNLOAD = "deployments.vllm_hooks:NoDownload"
_REMOTE = ("s3://", "gs://", "abfss://", "azure://")


def is_remote(path: str) -> bool:
    """Whether a path names cloud storage, which Ray Serve LLM reads by itself."""
    return path.startswith(_REMOTE)


def multiplexed_model_id(model: str, adapter_path: str) -> str:
    """What Ray Serve LLM calls a cloud adapter: its folder's name is where it is loaded from."""
    return f"{model}:{adapter_path.rstrip('/').rpartition('/')[2]}"


def vllm_environment(config: VLLMExpertConfig) -> dict[str, str]:
    """Environment variables a replica of this engine needs before vLLM is imported."""
    env = {
        # Prompts are not logged.
        "RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if config.device == "cpu":
        # Binding threads to cores would fight with every other process on a small machine.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
        if _executor(config) == "uni":
            # vLLM takes "uni" for "mp" otherwise; the engine keeps a process of its own either way.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
    return env


def llm_config(config: VLLMExpertConfig, model_source: str, adapter_paths: dict[str, str]) -> Any:
    """The ``ray.serve.llm.LLMConfig`` of a config entry.

    Args:
        config: The entry.
        model_source: The resolved model: a local folder, a hub name or a cloud address.
        adapter_paths: Resolved folder of each local adapter, by expert name.

    Raises:
        ExpertConfigError: Ray or vLLM does not accept it.
    """
    from ray.serve.llm import LLMConfig

    engine_kwargs: dict[str, Any] = {}
    if config.context_length:
        engine_kwargs["max_model_len"] = config.context_length
    if config.device == "cpu":
        # Compiling takes two minutes at the first start and gains little on small models.
        engine_kwargs["enforce_eager"] = True
        engine_kwargs["distributed_executor_backend"] = _executor(config)
    if config.adapters:
        engine_kwargs["enable_lora"] = True
        engine_kwargs["max_loras"] = _adapter_slots(config)
        if adapter_paths:
            # Ranks of cloud adapters are not known here; 16 is vLLM's default.
            least = 16 if any(is_remote(adapter.path) for adapter in config.adapters) else 8
            engine_kwargs["max_lora_rank"] = max(least, _max_rank(adapter_paths))
    fields: dict[str, Any] = {
        "model_loading_config": {"model_id": config.name, "model_source": model_source},
        "engine_kwargs": {**engine_kwargs, **config.engine_kwargs},
        # Batches are made in deployments.batching, which does not hold back the first token.
        "experimental_configs": {"stream_batching_interval_ms": 0},
        **(
            {"callback_config": {"callback_class": _NO_DOWNLOAD}}
            if os.path.isdir(model_source)
            else {}
        ),
        "runtime_env": {"env_vars": vllm_environment(config)},
        **({"accelerator_config": {"kind": "cpu"}} if config.device == "cpu" else {}),
        **_remote_lora(config),
        **config.llm_config,
    }
    try:
        return LLMConfig(**fields)
    except ValueError as error:
        problem = " ".join(str(error).split())
        raise ExpertConfigError(
            f"expert {config.name!r}: Ray refuses the config: {problem}"
        ) from error


def _executor(config: VLLMExpertConfig) -> str:
    """How vLLM reaches its model on a CPU: ``uni``, in the engine's process, unless told otherwise.

    With ``mp`` the engine and its worker wait for each other in loops that yield the processor and
    take it again. On two cores everything else then stands still for seconds, streams included.
    """
    kwargs = config.engine_kwargs
    parallel = max(kwargs.get("tensor_parallel_size", 1), kwargs.get("pipeline_parallel_size", 1))
    executor = kwargs.get("distributed_executor_backend", "mp" if parallel > 1 else "uni")
    return str(executor)


def _adapter_slots(config: VLLMExpertConfig) -> int:
    if config.device == "gpu":
        return min(len(config.adapters), 8)
    # vLLM's CPU kernels take "no adapter" (index -1) for the last slot, so that in a mixed batch
    # the base model would answer with whatever adapter lies there. One more slot than adapters
    # keeps the last one empty, which is the same as none.
    return len(config.adapters) + 1


def _max_rank(adapter_paths: dict[str, str]) -> int:
    ranks = [8]
    for path in adapter_paths.values():
        try:
            with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
                ranks.append(int(json.load(file)["r"]))
        except (OSError, ValueError, KeyError) as error:
            raise ExpertConfigError(
                f"{path!r} is no PEFT adapter: it needs an adapter_config.json with 'r'"
            ) from error
    if max(ranks) > _RANKS[-1]:
        raise ExpertConfigError(
            f"an adapter has rank {max(ranks)}; vLLM takes {_RANKS[-1]} at most"
        )
    return next(rank for rank in _RANKS if rank >= max(ranks))


def _remote_lora(config: VLLMExpertConfig) -> dict[str, Any]:
    remote = {a.path.rstrip("/").rpartition("/")[0] for a in config.adapters if is_remote(a.path)}
    if not remote:
        return {}
    if len(remote) > 1:
        raise ExpertConfigError(
            f"expert {config.name!r}: its cloud adapters must lie in one folder, not in "
            f"{', '.join(sorted(remote))}"
        )
    return {
        "lora_config": {
            "dynamic_lora_loading_path": remote.pop(),
            "max_num_adapters_per_replica": max(16, len(config.adapters)),
        }
    }


class VLLMServer:
    """Answers for a vLLM model and its adapters through a Ray Serve LLM server it holds.

    Args:
        entry: The config entry as JSON-able data; names in it are resolved in this process.
    """

    # Ray Serve awaits constructors.
    async def __init__(self, entry: dict[str, Any]) -> None:  # type: ignore[misc]
        self._config = VLLMExpertConfig.model_validate(entry)
        # The environment must stand before the first import of vLLM.
        os.environ.update(vllm_environment(self._config))
        from experts.paths import resolve_path
        from experts.weights import resolve_model

        source = self._config.model
        self._source = source if is_remote(source) else str(resolve_model(source))
        self._adapters = {
            adapter.name: str(resolve_path(adapter.path))
            for adapter in self._config.adapters
            if not is_remote(adapter.path)
        }
        self._remote = {
            adapter.name: multiplexed_model_id(self._config.name, adapter.path)
            for adapter in self._config.adapters
            if is_remote(adapter.path)
        }
        await self._start()

    async def _start(self) -> None:
        from ray.serve.llm.deployment import LLMServer

        config = llm_config(self._config, self._source, self._adapters)
        if self._config.device == "cpu":
            from deployments.vllm_hooks import keep_executor

            keep_executor(config)
        self._server = LLMServer.sync_init(config)
        await self._server.start()
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig

        for number, (name, path) in enumerate(self._adapters.items(), start=1):
            await self._server.engine.resolve_lora(
                DiskMultiplexConfig(
                    model_id=name,
                    max_total_tokens=None,
                    local_path=path,
                    lora_assigned_int_id=number,
                )
            )

    def stream(
        self, expert: str, request: AnyRequest, timeout_s: float
    ) -> AsyncGenerator[Batch, None]:
        """Stream one expert's answer in batches."""
        return in_batches(self._stream(expert, request, timeout_s), expert)

    async def _stream(
        self, expert: str, request: AnyRequest, timeout_s: float
    ) -> AsyncIterator[Chunk]:
        import asyncio

        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        answer = await self._ask(expert, request)
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        items = await anext(answer, None)
                except TimeoutError:
                    raise ExpertTimeoutError(expert, timeout_s) from None
                if items is None:
                    return
                for item in items if isinstance(items, list) else [items]:
                    for chunk in _chunks(expert, item):
                        yield chunk
        finally:
            await answer.aclose()

    async def _ask(self, expert: str, request: AnyRequest) -> Any:
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        body = request.model_dump(exclude_unset=True, by_alias=True)
        body["model"] = expert
        if expert in self._remote:
            body["model"] = self._remote[expert]
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
        if request.token_limit is None:
            body["max_tokens"] = self._config.default_max_tokens
        if self._config.engine_kwargs.get("scheduling_policy") == "priority":
            # The least number goes first; vLLM's other policy refuses any but 0.
            low = isinstance(request, RoutingOptions) and request.priority == "low"
            body["priority"] = int(low)
        try:
            if isinstance(request, ChatRequest):
                return await self._server.chat(ChatCompletionRequest(**body))
            return await self._server.completions(CompletionRequest(**body))
        except ValueError as error:
            raise InvalidRequestError(" ".join(str(error).split())) from error

    async def healthy(self, expert: str) -> None:
        """Return if the engine can answer now, raise if not."""
        await self._server.check_health()

    async def check_health(self) -> None:
        """Ray Serve's own question; a replica that fails it is replaced."""
        await self._server.check_health()


def _chunks(expert: str, item: Any) -> list[Chunk]:
    """Chunks of one item of Ray Serve LLM's stream: server-sent events as text, or an error."""
    if not isinstance(item, str):
        raise _error(expert, item.model_dump())
    chunks = []
    for line in item.splitlines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        body = json.loads(data)
        if "error" in body:
            raise _error(expert, body)
        usage = body.get("usage")
        for choice in body.get("choices", []):
            delta = choice.get("delta") or {}
            chunks.append(
                Chunk(
                    index=choice["index"],
                    text=choice.get("text") or delta.get("content") or "",
                    tool_calls=delta.get("tool_calls") or None,
                    finish_reason=choice.get("finish_reason"),
                    logprobs=choice.get("logprobs"),
                )
            )
        if usage and not body.get("choices"):
            chunks.append(
                Chunk(usage=Usage.of(usage["prompt_tokens"], usage.get("completion_tokens") or 0))
            )
    return chunks


def _error(expert: str, body: dict[str, Any]) -> Exception:
    error = body.get("error", body)
    message, status = str(error.get("message", "")), error.get("code")
    if status == HTTPStatus.REQUEST_TIMEOUT:
        return ExpertUnavailableError(expert, message)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return ExpertOverloadedError(expert)
    if isinstance(status, int) and 400 <= status < 500:
        if limit := re.search(r"context length (?:is|of) (\d+)", message):
            # A prompt of very many characters is refused before its tokens are counted.
            counted = re.search(r"total of (?:at least )?(\d+) tokens", message) or re.search(
                r"contains (?:at least )?(\d+) (?:input )?tokens", message
            )
            least = int(limit[1]) + 1
            return ContextLengthError(
                expert, max(least, int(counted[1]) if counted else 0), int(limit[1])
            )
        return InvalidRequestError(message, error.get("param"))
    return ExpertFailedError(expert, message)
