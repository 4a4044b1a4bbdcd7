"""The one table from exception to HTTP status and OpenAI error object."""

from __future__ import annotations

import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from experts.errors import (
    ContextLengthError,
    ExpertAuthError,
    ExpertConfigError,
    ExpertError,
    ExpertFailedError,
    ExpertOverloadedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    InvalidRequestError,
    UnsupportedFeatureError,
)
from orchestrator.errors import (
    AuthenticationError,
    BadRequestError,
    BodyTooLargeError,
    ContentTypeError,
    EmptyPoolError,
    OverloadedError,
    RequestError,
    UnknownModelError,
)

__all__ = ["ERRORS", "INTERNAL", "error_object", "error_response", "status_of"]

logger = logging.getLogger("collegium.http")

INTERNAL = (500, "server_error", "internal_error")

# Exception to (status, OpenAI type, code); the nearest class along the MRO counts.
ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    RequestError: (400, "invalid_request_error", "invalid_request"),
    BadRequestError: (400, "invalid_request_error", "invalid_request"),
    EmptyPoolError: (400, "invalid_request_error", "no_capable_expert"),
    AuthenticationError: (401, "authentication_error", "invalid_api_key"),
    UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    BodyTooLargeError: (413, "invalid_request_error", "body_too_large"),
    ContentTypeError: (415, "invalid_request_error", "unsupported_content_type"),
    OverloadedError: (429, "rate_limit_error", "overloaded"),
    ExpertError: (502, "server_error", "expert_error"),
    ExpertConfigError: (502, "server_error", "expert_misconfigured"),
    ExpertAuthError: (502, "server_error", "expert_refused_key"),
    ExpertFailedError: (502, "server_error", "expert_failed"),
    ExpertUnavailableError: (503, "server_error", "expert_unavailable"),
    ExpertTimeoutError: (504, "server_error", "expert_timeout"),
    ExpertOverloadedError: (429, "rate_limit_error", "expert_overloaded"),
    InvalidRequestError: (400, "invalid_request_error", "invalid_request"),
    ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
    UnsupportedFeatureError: (400, "invalid_request_error", "unsupported_feature"),
}

# Sentences for failures whose own message may hold addresses, keys' names or engine internals.
_PUBLIC = {
    "expert_error": "the expert failed",
    "expert_misconfigured": "the expert is not set up correctly; the operator must look at it",
    "expert_refused_key": "the expert's upstream refused the service's key",
    "expert_failed": "the expert failed while answering",
    "expert_unavailable": "the expert is not available at the moment",
    "internal_error": "internal error",
}


def _entry(error: BaseException) -> tuple[int, str, str]:
    return next((ERRORS[cls] for cls in type(error).__mro__ if cls in ERRORS), INTERNAL)


def status_of(error: BaseException) -> int:
    """The HTTP status an exception becomes."""
    return _entry(error)[0]


def error_object(error: BaseException, decision_id: str | None = None) -> dict[str, Any]:
    """The OpenAI error object for an exception; details of 5xx stay in the log."""
    _, kind, code = _entry(error)
    message = _PUBLIC.get(code) or getattr(error, "message", None) or str(error)
    if code in _PUBLIC and decision_id:
        message = f"{message} ({decision_id})"
    param = getattr(error, "param", None)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    error: BaseException, headers: dict[str, str] | None = None, decision_id: str | None = None
) -> JSONResponse:
    """The response for an exception, with ``Retry-After`` where it says when to come back."""
    status = status_of(error)
    if status >= 500:
        logger.error("request failed (%s)", decision_id or "no decision", exc_info=error)
    retry_after_s = getattr(error, "retry_after_s", None)
    headers = dict(headers or {})
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(retry_after_s)))
    return JSONResponse(error_object(error, decision_id), status, headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Exception handler for everything an endpoint does not handle itself."""
    return error_response(error)
