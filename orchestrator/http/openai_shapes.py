"""Answers in OpenAI's shapes: whole objects, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from experts.types import Chunk, Completion, Usage

__all__ = ["AnswerShape"]


@dataclass(slots=True)
class AnswerShape:
    """Turns chunks into OpenAI objects for one request.

    Attributes:
        chat: Chat completions if true, text completions if not.
        model: The expert that answers.
        fingerprint: Hash of the config.
    """

    chat: bool
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The object of a plain answer."""
        body = self._envelope("chat.completion" if self.chat else "text_completion")
        choices = []
        for index, choice in enumerate(completion.choices):
            entry: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason or "stop"}
            if self.chat:
                message: dict[str, Any] = {
                    "role": "assistant",
                    "content": choice.text if choice.text or not choice.tool_calls else None,
                }
                if choice.tool_calls:
                    message["tool_calls"] = choice.tool_calls
                entry["message"] = message
            else:
                entry["text"] = choice.text
            entry["logprobs"] = choice.logprobs
            choices.append(entry)
        return {**body, "choices": choices, "usage": completion.usage.model_dump()}

    def role(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat answer, which names the role."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, chunk: Chunk) -> dict[str, Any]:
        """One chunk of a streamed answer."""
        if not self.chat:
            return self._chunk(
                chunk.index,
                {"text": chunk.text},
                finish_reason=chunk.finish_reason,
                logprobs=chunk.logprobs,
            )
        delta: dict[str, Any] = {}
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.tool_calls:
            delta["tool_calls"] = chunk.tool_calls
        return self._chunk(
            chunk.index,
            {"delta": delta},
            finish_reason=chunk.finish_reason,
            logprobs=chunk.logprobs,
        )

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk after the last that carries the token counts."""
        body = self._envelope("chat.completion.chunk" if self.chat else "text_completion")
        return {**body, "choices": [], "usage": usage.model_dump()}

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        *,
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        body = self._envelope("chat.completion.chunk" if self.chat else "text_completion")
        entry = {"index": index, **content, "finish_reason": finish_reason, "logprobs": logprobs}
        return {**body, "choices": [entry]}
