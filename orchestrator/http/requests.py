"""Bodies of requests: OpenAI's, and what Collegium adds to them; the same options in headers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.requests import Request

from experts.types import ChatRequest, CompletionRequest
from orchestrator.config import ServerConfig
from orchestrator.errors import BadRequestError
from orchestrator.options import RoutingOptions

__all__ = ["OPTION_HEADERS", "PREFIX", "ChatBody", "CompletionBody", "client_of", "options_of"]

PREFIX = "x-collegium-"

# Header to the option it sets.
OPTION_HEADERS = {PREFIX + name.replace("_", "-"): name for name in RoutingOptions.model_fields}


class ChatBody(ChatRequest, RoutingOptions):
    """Body of ``POST /v1/chat/completions`` and of ``POST /v1/route``."""


class CompletionBody(CompletionRequest, RoutingOptions):
    """Body of ``POST /v1/completions``."""


def client_of(http: Request, config: ServerConfig) -> str | None:
    """A hash of the client's API key.

    None where no key is asked for: what clients send then may be the same for all of them.
    """
    if config.api_keys_env is None:
        return None
    return hashlib.sha256(http.headers.get("authorization", "").encode()).hexdigest()[:16]


def options_of(http: Request, body: RoutingOptions) -> RoutingOptions:
    """The request's routing options; the body's go before the headers'.

    Raises:
        BadRequestError: A header's value is wrong.
    """
    given = _from_headers(http.headers)
    if not given:
        return body
    try:
        return body.or_else(RoutingOptions.model_validate(given))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        option = str(problem["loc"][0])
        header = PREFIX + option.replace("_", "-")
        raise BadRequestError(
            f"{header}: {problem['msg']}, got {http.headers[header]!r}", header
        ) from None


def _from_headers(headers: Mapping[str, str]) -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = {}
    for header, name in OPTION_HEADERS.items():
        if (text := headers.get(header)) is not None:
            listed = [part.strip() for part in text.split(",")]
            found[name] = listed if name == "allowed_models" else text.strip()
    return found
