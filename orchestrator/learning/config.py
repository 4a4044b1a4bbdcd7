"""What a config may say of learning from feedback."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from orchestrator.strict import StrictModel
from routers.base import RouterError
from routers.encoders import DEFAULT_ENCODER, get_encoder

__all__ = ["ExperimentConfig", "LearningConfig", "ShadowConfig"]

Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]

# What predictions count for: numbers somebody wrote down, and what a router learnt from answers.
GUESSED, LEARNT = 1.0, 30.0


class LearningConfig(StrictModel):
    """How a route learns from feedback."""

    type: Literal["linucb"] = "linucb"
    """Which kind of bandit."""
    alpha: float = Field(default=0.1, ge=0, le=10)
    """Points of quality that an explored request grants an expert per unit of uncertainty."""
    forgetting: float = Field(default=0.998, ge=0.9, le=1)
    """What an observation counts one observation later; 0.998 halves it after 346, 1 keeps all."""
    penalty: float | None = Field(default=None, ge=0.01)
    """How many observations the router's prediction counts for; less learns faster from little.
    None takes 1 for a static router and 30 for others."""
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


class ShadowConfig(StrictModel):
    """A second route that gets copies of some requests, for comparison; users notice nothing."""

    route: Name
    """The route that answers the copies."""
    share: float = Field(default=0.01, gt=0, le=1)
    """Share of requests that are copied, once they are answered."""
    judge: Name
    """The expert that says which of both answers is better, without knowing whose they are."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds for a copy's answer and the judge together."""
    max_cost_usd: float | None = Field(default=None, ge=0)
    """US dollars that a copy and the judge are expected to cost at most."""
    max_in_flight: int = Field(default=4, ge=1)
    """Copies in work at the same time; further ones are dropped."""


class ExperimentConfig(StrictModel):
    """A name users can put in ``model`` that stands for one of two routes, and compares them."""

    description: str = ""
    """What it is for, in a sentence; shown in ``/v1/models``."""
    a: Name
    """The one route."""
    b: Name
    """The other."""
    share_b: float = Field(default=0.5, gt=0, lt=1)
    """Share of clients that get ``b``."""
    by: Literal["key", "session", "request"] = "key"
    """What a client is, which gets the same route every time: an API key, a session id, or each
    request by itself. Who sends none of it is known by the next one."""
    error: float = Field(default=0.05, gt=0, lt=0.5)
    """Probability of naming a better route though both are equally good, however often one looks.
    """
