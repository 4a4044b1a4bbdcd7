"""All strategies a route may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.strategies.chain import ChainStrategy
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.fusion import FusionStrategy
from orchestrator.strategies.hedge import HedgeStrategy
from orchestrator.strategies.single import SingleStrategy

__all__ = ["AnyStrategy"]

AnyStrategy = Annotated[
    SingleStrategy | FallbackStrategy | HedgeStrategy | FusionStrategy | ChainStrategy,
    Field(discriminator="type"),
]
