"""JSON on its way out: the one encoder of all responses and events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python
from starlette.responses import Response

__all__ = ["JSONBytes", "encode"]


def encode(value: Any) -> bytes:
    """A value as compact JSON: plain data, dataclasses, pydantic models, numbers of numpy.

    JSON has no NaN and no infinity; they become null.
    """
    try:
        return to_json(value, inf_nan_mode="null", fallback=_plain)
    except PydanticSerializationError:
        # Some engines cut an emoji in two: lone surrogates have no UTF-8, but a JSON escape.
        plain = to_jsonable_python(value, inf_nan_mode="null", fallback=_plain)
        return json.dumps(plain, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    # Routers explain themselves in whatever numbers they compute with.
    return value.tolist() if hasattr(value, "tolist") else str(value)


class JSONBytes(Response):
    """A response whose body is JSON."""

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(encode(content), status_code, headers)
