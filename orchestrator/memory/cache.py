"""The response cache: answers that were given before, to the same request or to one like it.

What is kept belongs to one scope (a hash of the API key) and one config: neither another key nor a
changed config ever gets it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from experts.base import AnyRequest
from experts.types import ChatRequest, Completion
from orchestrator.memory.guard import Memory
from orchestrator.memory.questions import MAX_CHARACTERS
from orchestrator.memory.semantic import Question, QuestionIndex, SemanticConfig
from orchestrator.options import RoutingOptions
from orchestrator.strict import StrictModel

__all__ = ["CacheConfig", "CacheState", "CachedAnswer", "Lookup", "ResponseCache"]

FEATURE = "cache"

CacheState = Literal["hit", "semantic", "miss", "off"]

# They say how an answer travels or who waits for it, not what it is. ``model`` is in the target.
_NOT_IN_KEY = {"model", "stream", "stream_options", "user"}
# The other routing options change nothing about an answer.
_OPTIONS_IN_KEY = ("cost_quality", "max_cost", "allowed_models", "min_quality", "top_k")


class CacheConfig(StrictModel):
    """Which answers are given again."""

    ttl_s: float = Field(default=86_400.0, gt=0)
    """Seconds for which an answer is kept."""
    max_answer_bytes: int = Field(default=1 << 16, ge=1)
    """Longer answers are not kept, in bytes of JSON."""
    requests: Literal["deterministic", "any"] = "deterministic"
    """``deterministic``: those with ``temperature`` 0 or a ``seed``. ``any``: also those that ask
    for a random answer, which all get the same one then."""
    semantic: SemanticConfig | None = None
    """Also answer questions that ask the same in other words; none asks for the very same."""


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer as it is kept.

    Attributes:
        expert: Who gave it.
        route: The route that was asked; none if an expert was named.
    """

    expert: str
    route: str | None
    completion: Completion


@dataclass(slots=True)
class Lookup:
    """What the cache has for one request.

    Attributes:
        state: ``off`` if the request neither gets nor leaves an answer there.
        key: Of the request's own answer.
        question: What a question in other words is compared with, if it may be.
        answer: What was found.
    """

    state: CacheState
    key: str = ""
    question: Question | None = None
    answer: CachedAnswer | None = field(default=None, repr=False)


_ANSWER = TypeAdapter(CachedAnswer)


class ResponseCache:
    """Finds and keeps answers. Whatever the store does, the worst is a miss.

    Args:
        config: Which answers are given again.
        memory: Where they are kept.
        fingerprint: Of the service's whole config.

    Raises:
        RouterError: The encoder of the semantic cache cannot be used.
    """

    def __init__(self, config: CacheConfig, memory: Memory, fingerprint: str) -> None:
        self._config = config
        self._memory = memory
        self._fingerprint = fingerprint
        self._index = QuestionIndex(config.semantic, memory) if config.semantic else None
        self._waiting: dict[str, bytes] = {}

    async def find(self, request: AnyRequest, options: RoutingOptions, scope: str) -> Lookup:
        """Look for an answer.

        Args:
            request: The request.
            options: What it says of its routing, from body and headers.
            scope: Whose request it is.
        """
        if options.cache is False or not self._may_be_kept(request):
            return Lookup("off")
        content = self._content(request, options, scope)
        lookup = Lookup("miss", _key(content))
        if answer := await self._get(lookup.key):
            return Lookup("hit", lookup.key, None, answer)
        if self._index is not None and (text := _asked(request)) is not None:
            content["request"]["messages"][-1]["content"] = None
            lookup.question = await self._index.question(text, scope, _key(content))
            for key in await self._index.alike(lookup.question):
                if answer := await self._get(key):
                    return Lookup("semantic", lookup.key, None, answer)
        return lookup

    def keep(self, lookup: Lookup, answer: CachedAnswer) -> None:
        """Keep an answer for later, if it is whole and not too long."""
        if lookup.state != "miss":
            return
        # Truncated answers and calls of tools are no answers to give again.
        if any(c.finish_reason != "stop" or c.tool_calls for c in answer.completion.choices):
            return
        try:
            content = _ANSWER.dump_json(answer)
        except PydanticSerializationError:
            return  # half an emoji, as some engines cut it, has no UTF-8
        if len(content) > self._config.max_answer_bytes:
            return
        # Whoever has just got an answer may ask again before it is written.
        self._waiting[lookup.key] = content
        if not self._memory.later(FEATURE, lambda: self._write(lookup.key, content)):
            self._waiting.pop(lookup.key, None)
        if self._index is not None and lookup.question is not None:
            self._index.keep(lookup.question, lookup.key, self._config.ttl_s)

    def close(self) -> None:
        """Free the semantic cache's thread."""
        if self._index is not None:
            self._index.close()

    async def _write(self, key: str, content: bytes) -> None:
        try:
            await self._memory.store.put(key, content, ttl_s=self._config.ttl_s)
        finally:
            self._waiting.pop(key, None)

    async def _get(self, key: str) -> CachedAnswer | None:
        content = self._waiting.get(key)
        if content is None:
            content = await self._memory.guarded(FEATURE, self._memory.store.get(key), None)
        try:
            return _ANSWER.validate_json(content) if content else None
        except ValidationError:
            return None  # of another version

    def _may_be_kept(self, request: AnyRequest) -> bool:
        if request.n > 1:
            return False
        if isinstance(request, ChatRequest):
            # In the midst of a tool loop, what was looked up is as of now.
            if any(message.role in ("tool", "function") for message in request.messages):
                return False
        fixed = request.temperature == 0 or request.seed is not None
        return fixed or self._config.requests == "any"

    def _content(self, request: AnyRequest, options: RoutingOptions, scope: str) -> dict[str, Any]:
        """Everything an answer depends on."""
        return {
            "scope": scope,
            "config": self._fingerprint,
            # Not one name: an expert's may stand in ``model`` only.
            "target": ["route", options.route] if options.route else ["model", request.model],
            "kind": "chat" if isinstance(request, ChatRequest) else "text",
            "options": {name: getattr(options, name) for name in _OPTIONS_IN_KEY},
            "request": request.model_dump(mode="json", exclude=_NOT_IN_KEY),
        }


def _key(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{FEATURE}:{hashlib.sha256(text.encode()).hexdigest()}"


def _asked(request: AnyRequest) -> str | None:
    """The last turn's text, if that is a user's, all there is to it, and not too long."""
    if not isinstance(request, ChatRequest) or request.messages[-1].role != "user":
        return None
    content = request.messages[-1].content
    if not isinstance(content, str) or not content.strip() or len(content) > MAX_CHARACTERS:
        return None
    return content
