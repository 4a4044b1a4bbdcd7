"""The base of everything users write into a config: unknown keys are errors."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

__all__ = ["StrictModel", "default_type"]


class StrictModel(BaseModel):
    """Part of a config. Immutable; docstrings of its fields go into the JSON schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def default_type(name: str) -> BeforeValidator:
    """Of models told apart by their ``type``: which one a mapping without it is."""

    def typed(fields: Any) -> Any:
        return {"type": name, **fields} if isinstance(fields, dict) else fields

    return BeforeValidator(typed)
