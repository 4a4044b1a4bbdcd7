"""From a config entry to experts in this process. Engines are imported when one is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from experts.base import Expert
from experts.config import ExpertConfig, RetrieverExpertConfig, VLLMExpertConfig
from experts.errors import ExpertConfigError

if TYPE_CHECKING:
    from experts.retrieval.index import EncoderSource

__all__ = ["ENGINES", "experts_of", "open_engine", "open_experts", "open_retrievers"]

ENGINES = {
    "latent": "experts.latent.engine:LatentEngine",
    "openai": "experts.openai_engine:OpenAIExpert",
    "scripted": "experts.scripted:ScriptedExpert",
    "transformers": "experts.transformers_engine:TransformersEngine",
}
"""Class that runs each engine in process."""


def open_experts(config: ExpertConfig) -> dict[str, Expert]:
    """Open all experts of one config entry.

    Returns:
        Expert by name: the entry's own, then its adapters'; of a latent engine its members'. Close
        each when done.

    Raises:
        ExpertConfigError: The engine cannot run in process, or its setup is wrong.
    """
    return experts_of(open_engine(config))


def open_engine(config: ExpertConfig) -> Any:
    """Open the engine of one config entry: its only expert, or what gives several.

    Raises:
        ExpertConfigError: The engine cannot run in process, or its setup is wrong.
    """
    if isinstance(config, VLLMExpertConfig):
        raise ExpertConfigError(
            f"expert {config.name!r}: vLLM experts are hosted by Ray Serve LLM; run "
            "`collegium serve`, or use engine transformers"
        )
    if isinstance(config, RetrieverExpertConfig):
        raise ExpertConfigError(
            f"expert {config.name!r}: a retriever is opened after its reader, by open_retrievers"
        )
    module, _, name = ENGINES[config.engine].partition(":")
    return getattr(import_module(module), name)(config)


def experts_of(engine: Any) -> dict[str, Expert]:
    """The experts of an opened engine, by name."""
    if hasattr(engine, "experts"):
        return dict(engine.experts())
    return {engine.card.name: engine}


def open_retrievers(
    entries: Iterable[ExpertConfig], opened: Mapping[str, Expert], encoders: EncoderSource
) -> dict[str, Expert]:
    """Open the retrievers among config entries, each over its reader.

    A reader is any expert that is open already, in this process or behind a handle; it stays
    whoever's it was, and closing the retriever does not close it.

    Args:
        entries: Config entries; others than retrievers are passed over.
        opened: Experts by name.
        encoders: Finds the encoders that indexes were made with.

    Returns:
        Retriever by name.

    Raises:
        ExpertConfigError: A reader is not open, or an index cannot be used.
    """
    retrievers: dict[str, Expert] = {}
    for entry in entries:
        if not isinstance(entry, RetrieverExpertConfig):
            continue
        from experts.paths import resolve_path
        from experts.retrieval.expert import RetrieverExpert
        from experts.retrieval.index import PassageIndex

        if entry.reader is not None and entry.reader not in opened:
            raise ExpertConfigError(
                f"expert {entry.name!r}: its reader {entry.reader!r} is not open"
            )
        reader = None if entry.reader is None else opened[entry.reader]
        try:
            index = PassageIndex.load(resolve_path(entry.index), encoders)
        except ExpertConfigError as error:
            raise ExpertConfigError(f"expert {entry.name!r}: {error}") from error
        retrievers[entry.name] = RetrieverExpert(entry, index, reader)
    return retrievers
