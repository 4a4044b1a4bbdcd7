"""All strategies a route may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.strategies.cascade import CascadeStrategy
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.single import SingleStrategy

__all__ = ["AnyStrategy"]

AnyStrategy = Annotated[
    SingleStrategy | FallbackStrategy | CascadeStrategy, Field(discriminator="type")
]
