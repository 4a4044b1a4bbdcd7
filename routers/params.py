"""What every router checks alike: hyper-parameters, candidates, being fitted."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from routers.base import RouterError

__all__ = [
    "candidate_columns",
    "check_bool",
    "check_count",
    "check_known_params",
    "check_number",
    "check_one_of",
    "check_text",
    "not_fitted",
    "parse_settings",
]


def check_count(owner: object, name: str, value: object, low: int) -> None:
    """Refuse a hyper-parameter that is no whole number, or too small a one."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= low:
        return
    raise RouterError(_wrong(owner, name, f"a whole number in the range [{low}, inf)", value))


def check_number(
    owner: object,
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
) -> None:
    """Refuse a hyper-parameter that is no number or out of range.

    Raises:
        RouterError: In scikit-learn's phrasing.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and low <= value <= high and value < math.inf:  # type: ignore[operator]
        if not (low_open and value == low):
            return
    span = f"{'(' if low_open else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
    raise RouterError(_wrong(owner, name, f"a number in the range {span}", value))


def check_bool(owner: object, name: str, value: object) -> None:
    """Refuse a hyper-parameter that is not true or false."""
    if not isinstance(value, bool):
        raise RouterError(_wrong(owner, name, "true or false", value))


def check_one_of(owner: object, name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a hyper-parameter that is none of the known texts."""
    if value not in known:
        raise RouterError(_wrong(owner, name, f"one of {', '.join(map(repr, known))}", value))


def check_text(owner: object, name: str, value: object) -> None:
    """Refuse a hyper-parameter that is not a text of at least one character."""
    if not isinstance(value, str) or not value:
        raise RouterError(_wrong(owner, name, "a non-empty text", value))


def _wrong(owner: object, name: str, expected: str, value: object) -> str:
    return (
        f"The {name!r} parameter of {type(owner).__name__} must be {expected}. "
        f"Got {value!r} instead."
    )


def check_known_params(router_class: type, params: Mapping[str, Any]) -> None:
    """Refuse hyper-parameters that a router's constructor does not take.

    Raises:
        RouterError: Naming the known ones.
    """
    known = list(inspect.signature(router_class).parameters)
    for name in params:
        if name not in known:
            listed = ", ".join(map(repr, known)) or "none"
            raise RouterError(
                f"unknown parameter {name!r} of {router_class.__name__}; known: {listed}"
            )


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts; a value is JSON where it parses as such, else the text itself.

    Raises:
        RouterError: A setting has no ``=`` or no key, or a key comes twice.

    Examples:
        >>> parse_settings(["C=3", "soft=true", "general_texts=a.jsonl"])
        {'C': 3, 'soft': True, 'general_texts': 'a.jsonl'}
    """
    params: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise RouterError(f"a setting must be KEY=VALUE, not {setting!r}")
        if key.strip() in params:
            raise RouterError(f"the setting {key.strip()!r} is given twice")
        try:
            params[key.strip()] = json.loads(value)
        except ValueError:
            params[key.strip()] = value
    return params


def not_fitted(router: object) -> RouterError:
    """The error of a router that is asked before it has learnt."""
    return RouterError(f"this {type(router).__name__} is not fitted; call 'fit' or 'load' first")


def candidate_columns(models: Sequence[str], candidates: Sequence[str]) -> list[int]:
    """Positions of candidates among the fitted models.

    Raises:
        RouterError: A candidate is unknown, or there is none.
    """
    if not candidates:
        raise RouterError("no candidates to predict for")
    position = {name: number for number, name in enumerate(models)}
    for name in candidates:
        if name not in position:
            known = ", ".join(map(repr, models))
            raise RouterError(f"unknown model {name!r}; known: {known}")
    return [position[name] for name in candidates]
