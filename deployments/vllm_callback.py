"""A Ray Serve LLM callback for weights that are already here.

Imported by name, in the replica only: its base class brings in vLLM.
"""

from __future__ import annotations

from ray.llm._internal.common.callbacks.base import CallbackBase

__all__ = ["NoDownload"]


class NoDownload(CallbackBase):
    """Skips Ray's download task, whose worker would keep half a gigabyte for nothing."""

    async def on_before_node_init(self) -> None:
        """Called before Ray would download weights."""
        self.ctx.run_init_node = False
