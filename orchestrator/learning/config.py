"""What a config may say of learning from feedback."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from orchestrator.strict import StrictModel
from routers.base import RouterError
from routers.encoders import DEFAULT_ENCODER, get_encoder

__all__ = ["LearningConfig"]


class LearningConfig(StrictModel):
    """How a route learns from feedback."""

    type: Literal["linucb"] = "linucb"
    """Which kind of bandit."""
    alpha: float = Field(default=0.1, ge=0, le=10)
    """Points of quality that an explored request grants an expert per unit of uncertainty."""
    forgetting: float = Field(default=0.998, ge=0.9, le=1)
    """What an observation counts one observation later; 0.998 halves it after 346, 1 keeps all."""
    penalty: float = Field(default=10.0, ge=0.01)
    """How many observations the router's prediction counts for; less learns faster from little."""
    dimensions: int = Field(default=32, ge=1, le=64)
    """How many numbers it knows of a request."""
    encoder: str = DEFAULT_ENCODER
    """Which encoder makes them; the router's own costs nothing more."""
    exploration_share: float = Field(default=0.0, ge=0, le=1)
    """Share of requests that may go to an expert because too little is known of it."""
    exploration_max_cost_usd: float | None = Field(default=None, ge=0)
    """Experts whose answer is expected to cost more US dollars are not explored."""
    error_weight: float = Field(default=0.0, ge=0, le=1)
    """What an expert's failure counts for, as an answer worth 0; 0 learns nothing from failures."""
    retry_weight: float = Field(default=0.0, ge=0, le=1)
    """What the same client's identical request counts for, as a sign that the answer was worth
    0; 0 learns nothing from it."""
    retry_within_s: float = Field(default=60.0, gt=0)
    """Seconds after an answer in which an identical request is a sign against it."""

    @field_validator("encoder")
    @classmethod
    def _known(cls, encoder: str) -> str:
        try:
            get_encoder(encoder)
        except RouterError as error:
            raise ValueError(str(error)) from None
        return encoder
