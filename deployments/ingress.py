"""The ingress deployment: HTTP and all routers in one process, experts behind handles."""

from __future__ import annotations

import logging
import sys
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.handles import HandleExpert
from deployments.vllm_server import is_remote, multiplexed_model_id
from experts.base import Expert
from experts.config import RetrieverExpertConfig, cards_of
from experts.registry import open_experts
from orchestrator.config import CollegiumConfig, parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.http.app import create_app
from orchestrator.memory.opening import open_memory
from orchestrator.retrieval import with_retrievers
from orchestrator.settings import api_keys

__all__ = ["Ingress"]


class Ingress:
    """Serves the OpenAI-compatible API.

    Args:
        config: The whole config as JSON-able data.
        handles: Handle of each config entry's deployment, in the order of ``config.experts``; none
            for entries whose experts live in the ingress itself.
    """

    def __init__(self, config: dict[str, Any], *handles: DeploymentHandle | None) -> None:
        self._config = parse_config(config)
        _log_to_stderr(self._config.server.log_level)
        self._orchestrator = Orchestrator(
            self._config,
            _experts(self._config, handles),
            load_routers(self._config),
            open_memory(self._config.memory),
        )

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Ray Serve once per replica."""
        return create_app(self._orchestrator, api_keys=api_keys(self._config.server.api_keys_env))


def _log_to_stderr(level: str) -> None:
    """Write our log where Ray collects it: the worker's error stream."""
    logger = logging.getLogger("collegium")
    logger.setLevel(level.upper())
    if not logger.handlers:
        # In throughput mode sys.stderr is Ray's, which walks the stack for every line, a fifth of
        # what a request costs here, and keeps lines back until it has a thousand of them.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _experts(
    config: CollegiumConfig, handles: tuple[DeploymentHandle | None, ...]
) -> dict[str, Expert]:
    experts: dict[str, Expert] = {}
    for entry, handle in zip(config.experts, handles, strict=True):
        if isinstance(entry, RetrieverExpertConfig):
            continue
        if handle is None:
            experts |= open_experts(entry)
            continue
        for card in cards_of(entry):
            remote = card.adapter is not None and is_remote(card.adapter)
            model_id = multiplexed_model_id(entry.name, card.adapter or "") if remote else None
            experts[card.name] = HandleExpert(card, handle, multiplexed_model_id=model_id)
    return with_retrievers(config, experts)
