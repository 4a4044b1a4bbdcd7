"""What one request may say of its routing, instead of the route's own settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = ["RoutingOptions", "below_quality", "not_allowed"]

Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class RoutingOptions(BaseModel):
    """A request's own routing options.

    Fields are excluded from dumps: they are ours, and must not travel on to an expert's API.
    """

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)

    route: Annotated[str | None, Field(max_length=128, exclude=True)] = None
    """A route to use in place of ``model``, for clients that cannot change the model's name."""
    cost_quality: Annotated[float | None, Field(ge=0, le=1, exclude=True)] = None
    """0 takes the cheapest expert, 1 the best; instead of the route's own setting."""
    max_cost: Annotated[float | None, Field(ge=0, exclude=True)] = None
    """US dollars that all calls for this request together are expected to cost at most."""
    allowed_models: Annotated[
        list[Pattern] | None, Field(min_length=1, max_length=64, exclude=True)
    ] = None
    """Names of the experts that may answer; ``*`` stands for any characters."""
    min_quality: Annotated[float | None, Field(ge=0, le=1, exclude=True)] = None
    """Leave out experts whose predicted quality is lower."""
    top_k: Annotated[int | None, Field(ge=1, exclude=True)] = None
    """How many experts shall answer, up to 16, for strategies that compose several answers. A named
    expert gets it as its engine's sampling parameter of that name."""
    deadline_ms: Annotated[int | None, Field(ge=1, le=86_400_000, exclude=True)] = None
    """Milliseconds for the whole request; the service's own limit holds too."""
    priority: Annotated[Literal["normal", "low"] | None, Field(exclude=True)] = None
    """``low`` is refused first under load: as soon as half of the service's places are taken. vLLM
    experts with ``scheduling_policy: priority`` in their ``engine_kwargs`` also begin its answers
    last; verdicts of judges are not put off."""
    session_id: Annotated[
        Annotated[str, StringConstraints(min_length=1, max_length=256)] | None, Field(exclude=True)
    ] = None
    """An opaque name of the conversation, by which its requests are recognised."""
    cache: Annotated[bool | None, Field(exclude=True)] = None
    """False answers anew: the response cache neither gives nor keeps an answer."""

    @classmethod
    def from_texts(cls, given: Mapping[str, str]) -> RoutingOptions:
        """Options from headers or a command line; lists are separated by commas.

        Raises:
            ValidationError: A value is wrong.
        """
        values: dict[str, str | list[str]] = dict(given)
        if listed := given.get("allowed_models"):
            values["allowed_models"] = [part.strip() for part in listed.split(",")]
        return cls.model_validate(values)

    def or_else(self, other: RoutingOptions) -> RoutingOptions:
        """These options, the other's where these say nothing."""
        fields = RoutingOptions.model_fields
        own = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return other.model_copy(update=own)


def not_allowed(names: Iterable[str], patterns: Iterable[str]) -> dict[str, str]:
    """Experts that no pattern allows, each with the reason."""
    listed = list(patterns)
    return {
        name: "allowed_models does not name it"
        for name in names
        if not any(_matches(name, pattern) for pattern in listed)
    }


def _matches(name: str, pattern: str) -> bool:
    # Patterns come from clients: fnmatch would make and keep a regular expression of each.
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    *middle, last = rest
    at = len(first)
    if not name.startswith(first):
        return False
    for part in middle:
        at = name.find(part, at) + len(part)
        if at < len(part):
            return False
    return len(name) - at >= len(last) and name.endswith(last)


def below_quality(quality: Iterable[float], names: Iterable[str], least: float) -> dict[str, str]:
    """Experts predicted worse than that, each with the reason."""
    return {
        name: f"its predicted quality of {predicted:.2f} is below min_quality"
        for name, predicted in zip(names, quality, strict=True)
        if predicted < least
    }
