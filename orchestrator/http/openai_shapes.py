"""Answers in OpenAI's shapes: whole objects, and the chunks of a stream."""

from __future__ import annotations

import time
from typing import Any

from experts.types import Choice, Chunk, Completion, Usage
from orchestrator.decision import DECISION_PREFIX
from orchestrator.http.encoding import encode

__all__ = ["AnswerShape"]


class AnswerShape:
    """Turns one request's answer into OpenAI objects, as JSON.

    Args:
        chat: Chat completions if true, text completions if not.
        decision_id: Of the decision; the answer's id ends like it.
        model: The expert that answers.
        fingerprint: Hash of the config.
    """

    def __init__(self, *, chat: bool, decision_id: str, model: str, fingerprint: str) -> None:
        self.chat = chat
        self._envelope = {
            "id": ("chatcmpl-" if chat else "cmpl-") + decision_id.removeprefix(DECISION_PREFIX),
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        # All chunks of a stream begin alike, so that is encoded once.
        self._head = encode(self._envelope)[:-1] + b',"choices":['

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The object of a plain answer."""
        entry = self._message if self.chat else self._text
        choices = [entry(index, choice) for index, choice in enumerate(completion.choices)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._envelope, "object": kind, "choices": choices, "usage": completion.usage}

    def _message(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.tool_calls:
            message["content"] = choice.text or None
            message["tool_calls"] = choice.tool_calls
        if choice.sources is not None:
            message["sources"] = choice.sources
        return {
            "index": index,
            "message": message,
            "finish_reason": choice.finish_reason or "stop",
            "logprobs": choice.logprobs,
        }

    def _text(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "finish_reason": choice.finish_reason or "stop",
            "logprobs": choice.logprobs,
        }

    def role(self, index: int) -> bytes:
        """The first chunk of a chat answer, which names the role."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, chunk: Chunk) -> bytes:
        """One chunk of a streamed answer."""
        content: dict[str, Any]
        if self.chat:
            delta: dict[str, Any] = {}
            if chunk.text:
                delta["content"] = chunk.text
            if chunk.tool_calls:
                delta["tool_calls"] = chunk.tool_calls
            if chunk.sources is not None:
                delta["sources"] = chunk.sources
            content = {"delta": delta}
        else:
            content = {"text": chunk.text}
        return self._chunk(chunk.index, content, chunk.finish_reason, chunk.logprobs)

    def usage(self, usage: Usage) -> bytes:
        """The chunk after the last that carries the token counts."""
        return self._head + b'],"usage":' + encode(usage) + b"}"

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        entry = {"index": index, **content, "finish_reason": finish_reason, "logprobs": logprobs}
        return self._head + encode(entry) + b"]}"
