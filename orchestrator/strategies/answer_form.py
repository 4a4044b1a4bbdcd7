"""Whether answers have the form a request asks for: JSON, by a schema, and arguments of tools.

What can be told is told: that an answer is no JSON, that it breaks its schema, that it calls a tool
nobody offered or with arguments that are none. Regular expressions and grammars are the engines'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from experts.base import AnyRequest
from experts.errors import InvalidRequestError
from experts.structured import shape_of
from experts.types import ChatRequest, Chunk

__all__ = ["AnswerForm"]

# Applying a schema may take exponential time. It stops here, after a tenth of a second at most, and
# an answer that holds so far passes.
MAX_STEPS = 5_000

# Clients choose both schema and answer, and these may take forever on a text they chose.
_UNCHECKED = ("pattern", "patternProperties", "unevaluatedProperties", "uniqueItems")

# An answer that was cut short says so, and whoever asked for so few tokens gets what he asked for.
_CUT = ("length", "content_filter")


class AnswerForm:
    """The form that answers to a request must have, checked while they come.

    Args:
        schema: JSON Schema of the text; none for any text.
        tools: Names of the tools that may be called.
    """

    def __init__(self, schema: dict[str, Any] | bool | None, tools: Iterable[str]) -> None:
        self._schema = schema
        self._tools = frozenset(tools)
        self._texts: dict[int, list[str]] = {}
        self._calls: dict[tuple[int, int], list[str]] = {}

    @classmethod
    def of(cls, request: AnyRequest) -> AnswerForm | None:
        """What the request asks for; none if that is any text."""
        tools = (request.tools if isinstance(request, ChatRequest) else None) or []
        try:
            shape = shape_of(request)
            schema = json.loads(shape.source) if shape and shape.kind == "json_schema" else None
        except (InvalidRequestError, ValueError):
            schema = None  # experts say what is wrong with it
        if schema is None and not tools:
            return None
        return cls(schema, [tool.function.name for tool in tools])

    def fault(self, chunk: Chunk) -> str | None:
        """What is wrong with the answer that this chunk ends, if it ends one."""
        self._texts.setdefault(chunk.index, []).append(chunk.text)
        for delta in chunk.tool_calls or ():
            function = delta.get("function") or {}
            call = self._calls.setdefault((chunk.index, delta.get("index", 0)), ["", ""])
            call[0] += function.get("name") or ""
            call[1] += function.get("arguments") or ""
        if chunk.finish_reason is None or chunk.finish_reason in _CUT:
            return None
        calls = [call for (index, _), call in self._calls.items() if index == chunk.index]
        if calls:
            return next(filter(None, (self._call_fault(*call) for call in calls)), None)
        return self._text_fault("".join(self._texts[chunk.index]))

    def _call_fault(self, name: str, arguments: str) -> str | None:
        if name not in self._tools:
            return f"it calls the tool {name!r}, which was not offered"
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
        return None if isinstance(parsed, dict) else f"its arguments of {name!r} are no JSON object"

    def _text_fault(self, text: str) -> str | None:
        if self._schema is None:
            return None
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            return "its answer is no JSON"
        return None if _satisfies(answer, self._schema) else "its answer breaks the JSON schema"


class _TooLongError(Exception):
    pass


def _satisfies(answer: Any, schema: dict[str, Any] | bool) -> bool:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry

    left = MAX_STEPS

    def counted(keyword: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def apply(validator: Any, value: Any, instance: Any, schema: dict[str, Any]) -> Any:
            nonlocal left
            # Long lists, of an enum say, are gone through for every value.
            left -= 1 + (len(value) // 32 if isinstance(value, list | dict) else 0)
            if left < 0:
                raise _TooLongError
            if keyword in _UNCHECKED:
                return ()
            if keyword == "additionalProperties" and "patternProperties" in schema:
                return ()
            return check(validator, value, instance, schema)

        return apply

    checks = {name: counted(name, check) for name, check in Draft202012Validator.VALIDATORS.items()}
    # An empty registry: a schema must not make the service fetch an address.
    validator = extend(Draft202012Validator, checks)(schema, registry=Registry())
    try:
        return bool(validator.is_valid(answer))
    except Exception:
        # Too long, or a schema that is malformed itself, which is the experts' to say.
        return True
