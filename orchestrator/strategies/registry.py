"""All strategies a route may use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.strategies.best_of import BestOfStrategy
from orchestrator.strategies.cascade import CascadeStrategy
from orchestrator.strategies.chain import ChainStrategy
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.fusion import FusionStrategy
from orchestrator.strategies.hedge import HedgeStrategy
from orchestrator.strategies.latent import LatentStrategy
from orchestrator.strategies.mix import MixStrategy
from orchestrator.strategies.single import SingleStrategy
from orchestrator.strategies.vote import VoteStrategy
from orchestrator.strict import default_type

__all__ = ["AnyStrategy"]


AnyStrategy = Annotated[
    SingleStrategy
    | FallbackStrategy
    | CascadeStrategy
    | VoteStrategy
    | BestOfStrategy
    | FusionStrategy
    | HedgeStrategy
    | ChainStrategy
    | LatentStrategy
    | MixStrategy,
    Field(discriminator="type"),
    default_type("fallback"),
]
