"""All strategies a route may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.strategies.best_of import BestOfStrategy
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.single import SingleStrategy
from orchestrator.strategies.vote import VoteStrategy

__all__ = ["AnyStrategy"]

AnyStrategy = Annotated[
    SingleStrategy | FallbackStrategy | VoteStrategy | BestOfStrategy, Field(discriminator="type")
]
