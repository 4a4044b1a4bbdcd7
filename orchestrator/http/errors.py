"""The one table from exception to HTTP status and OpenAI error object."""

from __future__ import annotations

import logging
import math
from typing import Any

from starlette.requests import Request

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
    BodyTimeoutError,
    BodyTooLargeError,
    BudgetExhaustedError,
    ContentTypeError,
    CostLimitError,
    EmptyPoolError,
    FeedbackExistsError,
    MemoryUnavailableError,
    OverloadedError,
    RequestError,
    UnknownDecisionError,
    UnknownModelError,
)
from orchestrator.http.encoding import JSONBytes

__all__ = ["ERRORS", "INTERNAL", "error_object", "error_response", "public_message", "status_of"]

logger = logging.getLogger("collegium.http")

INTERNAL = (500, "server_error", "internal_error")

# Exception to (status, OpenAI type, code); the nearest class along the MRO counts.
ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    RequestError: (400, "invalid_request_error", "invalid_request"),
    BadRequestError: (400, "invalid_request_error", "invalid_request"),
    EmptyPoolError: (400, "invalid_request_error", "no_capable_expert"),
    CostLimitError: (400, "invalid_request_error", "max_cost_too_low"),
    AuthenticationError: (401, "authentication_error", "invalid_api_key"),
    UnknownModelError: (404, "invalid_request_error", "model_not_found"),
    UnknownDecisionError: (404, "invalid_request_error", "decision_not_found"),
    BodyTimeoutError: (408, "invalid_request_error", "body_timeout"),
    FeedbackExistsError: (409, "invalid_request_error", "feedback_exists"),
    BodyTooLargeError: (413, "invalid_request_error", "body_too_large"),
    ContentTypeError: (415, "invalid_request_error", "unsupported_content_type"),
    OverloadedError: (429, "rate_limit_error", "overloaded"),
    BudgetExhaustedError: (429, "insufficient_quota", "budget_exhausted"),
    MemoryUnavailableError: (503, "server_error", "memory_unavailable"),
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


def public_message(error: BaseException) -> str:
    """What clients may read of an exception."""
    code = _entry(error)[2]
    return _PUBLIC.get(code) or getattr(error, "message", None) or str(error)


def error_object(error: BaseException, decision_id: str | None = None) -> dict[str, Any]:
    """The OpenAI error object for an exception; details of 5xx stay in the log."""
    _, kind, code = _entry(error)
    message = public_message(error)
    if code in _PUBLIC and decision_id:
        message = f"{message} ({decision_id})"
    param = getattr(error, "param", None)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    error: BaseException, headers: dict[str, str] | None = None, decision_id: str | None = None
) -> JSONBytes:
    """The response for an exception, with ``Retry-After`` where it says when to come back."""
    status = status_of(error)
    if status >= 500:
        logger.error("request failed (%s)", decision_id or "no decision", exc_info=error)
    headers = dict(headers or {})
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 429:
        # An upstream may have sent any number.
        longest_s = 3600.0 if isinstance(error, ExpertError) else 86400.0
        headers["retry-after"] = _whole_seconds(getattr(error, "retry_after_s", 1.0), longest_s)
    return JSONBytes(error_object(error, decision_id), status, headers)


def _whole_seconds(wait_s: float, longest_s: float) -> str:
    # Clients read whole seconds only.
    return str(math.ceil(min(max(wait_s, 1.0), longest_s)) if math.isfinite(wait_s) else 1)


async def handle(request: Request, error: Exception) -> JSONBytes:
    """Exception handler for everything an endpoint does not handle itself."""
    return error_response(error)
