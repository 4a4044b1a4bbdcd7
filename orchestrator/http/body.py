"""From a raw HTTP body to a checked request, or a refusal that names the field."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from orchestrator.errors import (
    BadRequestError,
    BodyTimeoutError,
    BodyTooLargeError,
    ContentTypeError,
)

__all__ = ["parse_body"]

Model = TypeVar("Model", bound=BaseModel)


async def parse_body(
    request: Request, model: type[Model], *, max_bytes: int, timeout_s: float
) -> Model:
    """Read and check a JSON body.

    Types are checked strictly: ``"5"`` is no number. What JSON readers disagree about, namely
    repeated keys, NaN and numbers beyond a double, is refused, in unknown fields too: they travel
    on to engines.

    Raises:
        ContentTypeError, BodyTooLargeError, BodyTimeoutError, BadRequestError
    """
    _check_headers(request, max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError:
        raise BodyTimeoutError(timeout_s) from None
    try:
        checked = model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _bad_request(error) from None
    _check_portable(body)
    return checked


def _check_headers(request: Request, max_bytes: int) -> None:
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ContentTypeError("content-type", "application/json", content_type)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise ContentTypeError("content-encoding", "identity", encoding)
    announced = request.headers.get("content-length", "")
    # A number with more digits than the limit is larger; int() itself refuses very long ones.
    digits = announced.lstrip("0") if announced.isascii() and announced.isdecimal() else ""
    if len(digits) > len(str(max_bytes)) or int(digits or 0) > max_bytes:
        raise BodyTooLargeError(max_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > max_bytes:
                raise BodyTooLargeError(max_bytes)
            pieces.append(piece)
    except ClientDisconnect:
        raise BadRequestError("the body ended early", "body") from None
    return b"".join(pieces)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise BadRequestError(f"{repeated}: the key occurs twice in one object", repeated)
    return result


def _no_constant(name: str) -> float:
    raise BadRequestError(f"the body is no valid JSON: {name} is no JSON number", "body")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise BadRequestError(f"the body holds a number that is too large: {digits:.20}", "body")
    return number


def _whole(digits: str) -> int:
    _finite(digits)
    return int(digits)


_portable = json.JSONDecoder(
    object_pairs_hook=_no_repeats,
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_whole,
)


def _check_portable(body: bytes) -> None:
    try:
        _portable.decode(body.decode())
    except ValueError as error:
        raise BadRequestError(f"the body is no valid JSON: {error}", "body") from None


def _bad_request(error: ValidationError) -> BadRequestError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union's members, the one that matched deepest says best what is wrong.
    problem = max(problems, key=lambda p: len(p["loc"]))
    if problem["type"] == "json_invalid":
        return BadRequestError(f"the body is no valid JSON: {problem['msg']}", "body")
    where = _dotted(problem["loc"]) or "body"
    return BadRequestError(f"{where}: {problem['msg'].removeprefix('Value error, ')}", where)


def _dotted(loc: Sequence[int | str]) -> str:
    """The path as users wrote it, without pydantic's names for the members of a union."""
    return ".".join(str(part) for part in loc if not _is_union_member(part))


def _is_union_member(part: int | str) -> bool:
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or "[" in part or part.startswith("constrained-")
    )
