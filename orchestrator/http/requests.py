"""Bodies of requests: OpenAI's, and what Collegium adds to them; the same options in headers."""

from __future__ import annotations

from pydantic import ValidationError
from starlette.requests import Request

from experts.types import ChatRequest, CompletionRequest
from orchestrator.errors import BadRequestError
from orchestrator.options import RoutingOptions

__all__ = ["OPTION_HEADERS", "PREFIX", "ChatBody", "CompletionBody", "option_header", "options_of"]

PREFIX = "x-collegium-"


def option_header(name: str) -> str:
    """The header that sets a routing option."""
    return PREFIX + name.replace("_", "-")


# Header to the option it sets.
OPTION_HEADERS = {option_header(name): name for name in RoutingOptions.model_fields}


class ChatBody(ChatRequest, RoutingOptions):
    """Body of ``POST /v1/chat/completions`` and of ``POST /v1/route``."""


class CompletionBody(CompletionRequest, RoutingOptions):
    """Body of ``POST /v1/completions``."""


def options_of(http: Request, body: RoutingOptions) -> RoutingOptions:
    """The request's routing options; the body's go before the headers'.

    Raises:
        BadRequestError: A header's value is wrong.
    """
    headers = http.headers
    given = {name: headers[h].strip() for h, name in OPTION_HEADERS.items() if h in headers}
    if not given:
        return body
    try:
        return body.or_else(RoutingOptions.from_texts(given))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        header = option_header(str(problem["loc"][0]))
        raise BadRequestError(
            f"{header}: {problem['msg']}, got {headers[header]!r}", header
        ) from None
