"""What Ray Serve LLM does not let its config say.

Imported by name, in the replica only: its base classes bring in vLLM.
"""

from __future__ import annotations

from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig
from ray.serve.llm import LLMConfig

__all__ = ["NoDownload", "keep_executor"]


class NoDownload(CallbackBase):
    """Skips Ray's download task, whose worker would keep half a gigabyte for nothing."""

    async def on_before_node_init(self) -> None:
        """Called before Ray would download weights."""
        self.ctx.run_init_node = False


def keep_executor(config: LLMConfig) -> None:
    """Let ``engine_kwargs`` choose vLLM's executor on a CPU, where Ray always takes ``mp``."""
    config._engine_config = _KeepsExecutor(**dict(VLLMEngineConfig.from_llm_config(config)))


class _KeepsExecutor(VLLMEngineConfig):
    def get_initialization_kwargs(self) -> dict[str, Any]:
        chosen = self.engine_kwargs["distributed_executor_backend"]
        return {**super().get_initialization_kwargs(), "distributed_executor_backend": chosen}
