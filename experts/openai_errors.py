"""What an OpenAI-compatible API's refusals mean: the one table from status to expert error."""

from __future__ import annotations

import datetime
import json
from email.utils import parsedate_to_datetime
from typing import Any

from experts.config import OpenAIExpertConfig
from experts.errors import (
    ExpertAuthError,
    ExpertConfigError,
    ExpertError,
    ExpertFailedError,
    ExpertOverloadedError,
    ExpertTimeoutError,
    ExpertUnavailableError,
    InvalidRequestError,
)

__all__ = ["error_event", "error_of_status"]

_DEFAULT_RETRY_AFTER_S = 1.0
_LONGEST_REASON = 500


def error_of_status(
    config: OpenAIExpertConfig,
    status: int,
    body: str,
    retry_after: str | None,
    timeout_s: float,
) -> ExpertError:
    """The expert error that an HTTP refusal means.

    Args:
        config: The expert that was asked.
        status: HTTP status.
        body: The answer's body, an OpenAI error object if all is well.
        retry_after: The header of that name: seconds or a date.
        timeout_s: The request's own deadline, for timeouts.
    """
    message, param = _message_of(body)
    name = config.name
    if status in (401, 403):
        return ExpertAuthError(name, config.api_key_env)
    if status == 404:
        # Nobody can mend it by asking again: the name or the URL in the config is wrong.
        return ExpertConfigError(
            f"expert {name!r}: {config.base_url} has no model {config.model!r}: {message}"
        )
    if status in (408, 504):
        return ExpertTimeoutError(name, timeout_s)
    if status in (425, 429):
        return ExpertOverloadedError(name, _seconds(retry_after))
    if 400 <= status < 500:
        return InvalidRequestError(message, param)
    return ExpertUnavailableError(name, f"its upstream answered {status}: {message}")


def error_event(config: OpenAIExpertConfig, error: Any, timeout_s: float) -> ExpertError:
    """The expert error that an error inside a stream means."""
    facts = error if isinstance(error, dict) else {"message": str(error)}
    code = facts.get("code")
    if isinstance(code, int) and 400 <= code < 500:
        return error_of_status(config, code, json.dumps({"error": facts}), None, timeout_s)
    return ExpertFailedError(config.name, str(facts.get("message"))[:_LONGEST_REASON])


def _message_of(body: str) -> tuple[str, str | None]:
    """Message and offending field, from the shapes that servers use."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return body.strip()[:_LONGEST_REASON] or "no reason given", None
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(error, dict):
        return str(error)[:_LONGEST_REASON], None
    message = error.get("message") or error.get("detail") or "no reason given"
    param = error.get("param")
    return str(message)[:_LONGEST_REASON], param if isinstance(param, str) else None


def _seconds(retry_after: str | None) -> float:
    if not retry_after:
        return _DEFAULT_RETRY_AFTER_S
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        now = datetime.datetime.now(datetime.UTC)
        return max((parsedate_to_datetime(retry_after) - now).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return _DEFAULT_RETRY_AFTER_S
