"""Everything an expert may raise. Knows nothing of HTTP.

    ExpertError
    ├── ExpertConfigError            the setup is wrong; somebody must change it
    ├── InvalidRequestError          the request is wrong for every expert
    │   ├── ContextLengthError       ... too long for this expert
    │   └── UnsupportedFeatureError  ... this expert lacks the feature
    ├── ExpertAuthError              the upstream refused the key
    ├── ExpertUnavailableError  (retryable)  nothing answers: dead replica, refused connection
    ├── ExpertTimeoutError      (retryable)  the deadline passed
    ├── ExpertOverloadedError   (retryable)  too many requests, try again later
    └── ExpertFailedError       (retryable)  the engine broke while answering

``retryable`` means: another expert, or the same one later, may well answer this same request.
All of them survive pickling, because they cross process borders between Serve replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

__all__ = [
    "ContextLengthError",
    "ExpertAuthError",
    "ExpertConfigError",
    "ExpertError",
    "ExpertFailedError",
    "ExpertOverloadedError",
    "ExpertTimeoutError",
    "ExpertUnavailableError",
    "InvalidRequestError",
    "UnsupportedFeatureError",
]


def _rebuild(cls: Callable[..., ExpertError], facts: dict[str, Any]) -> ExpertError:
    return cls(**facts)


class ExpertError(Exception):
    """An expert failed in a way that no other error names.

    The base of all expert errors; subclasses take facts and build their own sentence.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, /, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self._facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would replay the finished sentence into a constructor that takes facts.
        return _rebuild, (type(self), self._facts)


class ExpertConfigError(ExpertError):
    """The setup is wrong: missing weights, an unknown engine, too little memory."""

    def __init__(self, message: str) -> None:
        super().__init__(message, message=message)


class InvalidRequestError(ExpertError):
    """The request itself is wrong, whoever answers it.

    Args:
        message: What is wrong, what was expected, what to do.
        param: The offending field of the request, dotted.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, message=message, param=param)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt and requested answer do not fit into the expert's context."""

    def __init__(self, expert: str, tokens: int, limit_tokens: int) -> None:
        message = (
            f"this request needs at least {tokens} tokens but expert {expert!r} has a context of "
            f"{limit_tokens}; shorten the messages or lower max_tokens"
        )
        super().__init__(message, "messages")
        self._facts = {"expert": expert, "tokens": tokens, "limit_tokens": limit_tokens}


class UnsupportedFeatureError(InvalidRequestError):
    """The expert lacks a feature the request asks for."""

    def __init__(self, expert: str, feature: str, param: str | None = None) -> None:
        super().__init__(f"expert {expert!r} does not support {feature}", param or feature)
        self._facts = {"expert": expert, "feature": feature, "param": param}


class ExpertAuthError(ExpertError):
    """The upstream refused our key."""

    def __init__(self, expert: str, key_env: str | None = None) -> None:
        hint = f"check the environment variable {key_env}" if key_env else "it needs an api_key_env"
        super().__init__(
            f"the upstream of expert {expert!r} refused the key; {hint}",
            expert=expert,
            key_env=key_env,
        )


class ExpertUnavailableError(ExpertError):
    """Nothing answers for this expert."""

    retryable = True

    def __init__(self, expert: str, reason: str = "no replica answers") -> None:
        super().__init__(
            f"expert {expert!r} is unavailable: {reason}", expert=expert, reason=reason
        )


class ExpertTimeoutError(ExpertError):
    """The expert did not finish within its deadline."""

    retryable = True

    def __init__(self, expert: str, timeout_s: float) -> None:
        super().__init__(
            f"expert {expert!r} did not answer within {timeout_s:g} s",
            expert=expert,
            timeout_s=timeout_s,
        )


class ExpertOverloadedError(ExpertError):
    """The expert takes no more requests for now."""

    retryable = True

    def __init__(self, expert: str, retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"expert {expert!r} is overloaded; retry after {retry_after_s:g} s",
            expert=expert,
            retry_after_s=retry_after_s,
        )
        self.retry_after_s = retry_after_s


class ExpertFailedError(ExpertError):
    """The engine broke while answering. The reason goes to logs, never to clients."""

    retryable = True

    def __init__(self, expert: str, reason: str = "the engine failed") -> None:
        super().__init__(f"expert {expert!r} failed: {reason}", expert=expert, reason=reason)
