"""Answers of a given shape: JSON, JSON Schema, one of several choices, regex, grammar.

The shape becomes a grammar (xgrammar) that says at every step which tokens may come next.
Imports xgrammar when the first such request arrives.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from experts.base import AnyRequest
from experts.errors import InvalidRequestError, UnsupportedFeatureError
from experts.types import ChatRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["Constraint", "GrammarFactory", "Shape", "shape_of"]


class Constraint(Protocol):
    """What one answer may say next. Stateful: one per answer."""

    @property
    def finished(self) -> bool:
        """Whether nothing more may come."""
        ...

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores of forbidden tokens to minus infinity, in place; shape (vocabulary,)."""
        ...

    def accept(self, token_id: int) -> None:
        """Note that this token was chosen."""
        ...


class Shape(NamedTuple):
    """The shape an answer must have.

    Attributes:
        kind: How to read ``source``.
        source: JSON Schema, EBNF grammar or regular expression.
        param: The request's field it came from, for error messages.
    """

    kind: Literal["json_schema", "grammar", "regex"]
    source: str
    param: str


def shape_of(request: AnyRequest) -> Shape | None:
    """The shape a request asks for, in OpenAI's ``response_format`` or under vLLM's names.

    Raises:
        InvalidRequestError: It is malformed.
    """
    extra = request.model_extra or {}
    options = extra.get("structured_outputs") or {}
    if not isinstance(options, dict):
        raise InvalidRequestError("structured_outputs must be an object", "structured_outputs")
    for name in ("choice", "json", "regex", "grammar"):
        for param, value in (
            (f"structured_outputs.{name}", options.get(name)),
            (f"guided_{name}", extra.get(f"guided_{name}")),
        ):
            if value is not None:
                return _shape(name, value, param)
    return _response_format(request)


def _response_format(request: AnyRequest) -> Shape | None:
    wanted = request.response_format if isinstance(request, ChatRequest) else None
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Shape("json_schema", '{"type": "object"}', "response_format")
    assert wanted.json_schema is not None, "ResponseFormat lets none through"
    return _shape("json", wanted.json_schema.schema_, "response_format.json_schema.schema")


def _shape(name: str, value: Any, param: str) -> Shape:
    if name == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise InvalidRequestError(f"{param} must be a list of texts", param)
        # JSON's escapes are EBNF's.
        return Shape("grammar", "root ::= " + " | ".join(map(json.dumps, value)), param)
    if name == "json":
        return Shape("json_schema", value if isinstance(value, str) else json.dumps(value), param)
    if not isinstance(value, str):
        raise InvalidRequestError(f"{param} must be a text", param)
    return Shape("regex" if name == "regex" else "grammar", value, param)


class GrammarFactory:
    """Compiles shapes for one tokenizer; compiled ones are kept. May be called from any thread.

    Args:
        expert: Name of the expert, for error messages.
        tokenizer: A Hugging Face tokenizer.
        vocab_size: Number of logits per token; may exceed the tokenizer's vocabulary.
        stop_token_ids: Tokens that end an answer.
    """

    def __init__(
        self, expert: str, tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]
    ) -> None:
        self._expert = expert
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        self._compiler: Any = None

    def compile(self, shape: Shape) -> Any:
        """Compile a shape; slow the first time (up to seconds), so call it off the event loop.

        Raises:
            UnsupportedFeatureError: xgrammar is not installed.
            InvalidRequestError: The shape is malformed.
        """
        compiler = self._ready_compiler(shape.param)
        try:
            if shape.kind == "json_schema":
                # Small models fall into endless white space where a grammar allows it.
                return compiler.compile_json_schema(shape.source, any_whitespace=False)
            if shape.kind == "regex":
                return compiler.compile_regex(shape.source)
            return compiler.compile_grammar(shape.source)
        except (RuntimeError, ValueError) as exc:
            reason = str(exc).strip().splitlines()[-1] if str(exc).strip() else "not understood"
            raise InvalidRequestError(f"{shape.param} is malformed: {reason}", shape.param) from exc

    def constraint(self, compiled: Any) -> Constraint:
        """A fresh constraint for one answer."""
        return _GrammarConstraint(compiled, self._vocab_size)

    def _ready_compiler(self, param: str) -> Any:
        if self._compiler is None:
            try:
                import xgrammar
            except ImportError as exc:
                raise UnsupportedFeatureError(
                    self._expert, "structured answers (pip install xgrammar)", param
                ) from exc
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._stop_token_ids
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        return self._compiler


class _GrammarConstraint:
    def __init__(self, compiled: Any, vocab_size: int) -> None:
        import xgrammar

        self._apply = xgrammar.apply_token_bitmask_inplace
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)

    @property
    def finished(self) -> bool:
        return bool(self._matcher.is_terminated())

    def mask(self, scores: torch.Tensor) -> None:
        self._matcher.fill_next_token_bitmask(self._bitmask)
        self._apply(scores[None], self._bitmask)

    def accept(self, token_id: int) -> None:
        self._matcher.accept_token(token_id)
