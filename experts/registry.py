"""From a config entry to experts in this process. Engines are imported when one is opened."""

from __future__ import annotations

from importlib import import_module

from experts.base import Expert
from experts.config import ExpertConfig, VLLMExpertConfig
from experts.errors import ExpertConfigError

__all__ = ["ENGINES", "open_experts"]

ENGINES = {
    "openai": "experts.openai_engine:OpenAIExpert",
    "scripted": "experts.scripted:ScriptedExpert",
    "transformers": "experts.transformers_engine:TransformersEngine",
}
"""Class that runs each engine in process."""


def open_experts(config: ExpertConfig) -> dict[str, Expert]:
    """Open all experts of one config entry.

    Returns:
        Expert by name: the entry's own, then its adapters'. Close each when done.

    Raises:
        ExpertConfigError: The engine cannot run in process, or its setup is wrong.
    """
    if isinstance(config, VLLMExpertConfig):
        raise ExpertConfigError(
            f"expert {config.name!r}: vLLM experts are hosted by Ray Serve LLM; run "
            "`collegium serve`, or use engine transformers"
        )
    module, _, name = ENGINES[config.engine].partition(":")
    opened = getattr(import_module(module), name)(config)
    if hasattr(opened, "experts"):
        return dict(opened.experts())
    return {opened.card.name: opened}
