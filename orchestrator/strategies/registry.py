"""All strategies a route may use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator.strategies.best_of import BestOfStrategy
from orchestrator.strategies.cascade import CascadeStrategy
from orchestrator.strategies.chain import ChainStrategy
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.fusion import FusionStrategy
from orchestrator.strategies.hedge import HedgeStrategy
from orchestrator.strategies.single import SingleStrategy
from orchestrator.strategies.vote import VoteStrategy

__all__ = ["AnyStrategy"]


def _typed(fields: Any) -> Any:
    """A strategy without a type is a fallback."""
    return {"type": "fallback", **fields} if isinstance(fields, dict) else fields


AnyStrategy = Annotated[
    SingleStrategy
    | FallbackStrategy
    | CascadeStrategy
    | VoteStrategy
    | BestOfStrategy
    | FusionStrategy
    | HedgeStrategy
    | ChainStrategy,
    Field(discriminator="type"),
    BeforeValidator(_typed),
]
