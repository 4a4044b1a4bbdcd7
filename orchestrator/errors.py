"""What the orchestrator itself may refuse.

RequestError
├── BadRequestError        a field is wrong
├── AuthenticationError    no key, or a wrong one
├── UnknownModelError      no expert or route has this name
├── UnknownDecisionError   no record of this decision
├── FeedbackExistsError    something else was said of it before
├── EmptyPoolError         no expert of the route can serve this request
├── CostLimitError         the next call would cost more than the request may
├── BodyTooLargeError
├── BodyTimeoutError       the body did not arrive in time
├── ContentTypeError
├── OverloadedError        too many requests in work
├── BudgetExhaustedError   the key has spent what it may today
└── MemoryUnavailableError what was asked for is in a store that does not answer
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = [
    "AuthenticationError",
    "BadRequestError",
    "BodyTimeoutError",
    "BodyTooLargeError",
    "BudgetExhaustedError",
    "ContentTypeError",
    "CostLimitError",
    "EmptyPoolError",
    "FeedbackExistsError",
    "MemoryUnavailableError",
    "OverloadedError",
    "RequestError",
    "UnknownDecisionError",
    "UnknownModelError",
]


class RequestError(Exception):
    """A request is refused before any expert is asked.

    Attributes:
        param: The offending field or header.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequestError(RequestError):
    """A field of the request is wrong."""


class AuthenticationError(RequestError):
    """No API key, or one we do not know."""

    def __init__(self) -> None:
        super().__init__(
            "this service asks for an API key: send 'Authorization: Bearer KEY' with a valid key",
            "authorization",
        )


class UnknownModelError(RequestError):
    """No expert and no route has this name."""

    def __init__(self, model: str, known: Iterable[str], param: str = "model") -> None:
        names = ", ".join(map(repr, known)) or "none"
        super().__init__(f"unknown {param} {model!r}; known: {names}", param)


class UnknownDecisionError(RequestError):
    """No decision of this id, or none of this key; old ones are dropped."""

    def __init__(self, id: str) -> None:
        super().__init__(f"unknown decision {id!r}; old ones are dropped", "decision_id")


class FeedbackExistsError(RequestError):
    """Other feedback was given before, and stays."""

    def __init__(self, id: str) -> None:
        super().__init__(f"other feedback on {id!r} was given before, and stays", "decision_id")


class EmptyPoolError(RequestError):
    """No expert can serve this request; says which requirement excluded which."""

    def __init__(self, model: str, excluded: Mapping[str, str]) -> None:
        reasons = "; ".join(f"{expert}: {reason}" for expert, reason in excluded.items())
        super().__init__(f"no expert of {model!r} can serve this request ({reasons})", "model")


class CostLimitError(RequestError):
    """The next call would cost more than the request may."""

    def __init__(self, expert: str, expected_usd: float, left_usd: float) -> None:
        super().__init__(
            f"asking {expert!r} is expected to cost {expected_usd:.3g} US dollars, and max_cost "
            f"leaves {max(left_usd, 0):.3g}; raise max_cost or lower max_tokens",
            "max_cost",
        )


class BodyTooLargeError(RequestError):
    """The body exceeds the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the body is larger than {limit_bytes} bytes", "body")


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the body did not arrive within {timeout_s:g} s", "body")


class ContentTypeError(RequestError):
    """The body is not announced as plain JSON."""

    def __init__(self, header: str, expected: str, got: str) -> None:
        super().__init__(f"{header} must be {expected!r}, got {got!r}", header)


class OverloadedError(RequestError):
    """Too many requests are in work already."""

    def __init__(self, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{limit} requests are in work already; try again in a moment")
        self.retry_after_s = retry_after_s


class BudgetExhaustedError(RequestError):
    """The key has spent its budget of the day."""

    def __init__(self, usd_per_day: float, retry_after_s: float) -> None:
        super().__init__(
            f"the budget of {usd_per_day:g} US dollars a day is spent; there is a new one at "
            "midnight UTC"
        )
        self.retry_after_s = retry_after_s


class MemoryUnavailableError(RequestError):
    """What was asked for is in a store that does not answer."""

    def __init__(self) -> None:
        super().__init__("the service's memory does not answer; try again in a moment")
