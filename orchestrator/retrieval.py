"""Retrievers of a config: readers from the experts, encoders from the routers' own."""

from __future__ import annotations

from collections.abc import Mapping

from experts.base import Expert
from experts.errors import ExpertConfigError
from experts.registry import open_retrievers
from orchestrator.config import CollegiumConfig, ConfigError
from routers.base import RouterError

__all__ = ["with_retrievers"]


def with_retrievers(config: CollegiumConfig, experts: Mapping[str, Expert]) -> dict[str, Expert]:
    """The experts and the config's retrievers over them.

    Args:
        config: The config.
        experts: All other experts by name.

    Raises:
        ConfigError: An index or its encoder cannot be used.
    """
    from routers.encoders import get_encoder

    try:
        return {**experts, **open_retrievers(config.experts, experts, get_encoder)}
    except (ExpertConfigError, RouterError) as error:
        raise ConfigError(str(error)) from error
