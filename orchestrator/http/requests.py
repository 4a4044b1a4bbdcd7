"""Bodies of requests: OpenAI's, and what Collegium adds to them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from experts.types import ChatRequest, CompletionRequest

__all__ = ["ChatBody", "CompletionBody"]


class _RoutingOptions(BaseModel):
    """What a request may say of its routing.

    Fields are excluded from dumps: they are ours, and must not travel on to an expert's API.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    cost_quality: Annotated[float | None, Field(ge=0, le=1, exclude=True)] = None
    """0 takes the cheapest expert, 1 the best; instead of the route's own setting."""


class ChatBody(ChatRequest, _RoutingOptions):
    """Body of ``POST /v1/chat/completions`` and of ``POST /v1/route``."""


class CompletionBody(CompletionRequest, _RoutingOptions):
    """Body of ``POST /v1/completions``."""
