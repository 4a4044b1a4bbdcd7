"""From a raw HTTP body to a checked request, or a refusal that names the field."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from orchestrator.errors import BadRequestError, BodyTooLargeError, ContentTypeError

__all__ = ["parse_body"]

Model = TypeVar("Model", bound=BaseModel)

# Names pydantic puts into error paths for the members of a union; users never wrote them.
_UNION_MEMBERS = ("str", "list[", "dict[", "constrained-", "function-", "int", "float", "bool")


async def parse_body(request: Request, model: type[Model], max_bytes: int) -> Model:
    """Read and check a JSON body.

    Types are checked strictly: ``"5"`` is no number.

    Raises:
        ContentTypeError, BodyTooLargeError, BadRequestError
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ContentTypeError(content_type)
    body = await _read(request, max_bytes)
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _bad_request(error) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise BodyTooLargeError(max_bytes)
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


def _bad_request(error: ValidationError) -> BadRequestError:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union's members, the one that matched deepest says best what is wrong.
    problem = max(problems, key=lambda p: len(p["loc"]))
    if problem["type"] == "json_invalid":
        return BadRequestError(f"the body is no valid JSON: {problem['msg']}", "body")
    parts = [str(p) for p in problem["loc"] if not str(p).startswith(_UNION_MEMBERS)]
    where = ".".join(parts) or "body"
    return BadRequestError(f"{where}: {problem['msg'].removeprefix('Value error, ')}", where)
