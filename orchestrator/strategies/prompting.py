"""Requests that strategies make of a client's: with other experts' words in them, or in free text.

Other experts' words are data between marks they cannot know, word for word, and they stand in the
last user message, where no expert takes them for its operator's.
"""

from __future__ import annotations

import hashlib
from typing import Any

from experts.types import ChatRequest, ContentPart, Message

__all__ = ["appended", "free_text", "marked"]

# What makes an answer anything but one text.
_FORM_FIELDS: dict[str, Any] = {
    "tools": None,
    "tool_choice": None,
    "response_format": None,
    "logprobs": False,
    "top_logprobs": None,
    "stream": False,
    "stream_options": None,
}
_FORM_EXTRAS = ("functions", "function_call", "parallel_tool_calls", "structured_outputs")


def free_text(request: ChatRequest) -> ChatRequest:
    """The request for a whole answer in plain text: no tools, no JSON, no log-probabilities."""
    set_fields = {k: v for k, v in _FORM_FIELDS.items() if k in request.model_fields_set}
    asked = request.model_copy(update=set_fields)
    extra = asked.model_extra or {}
    for name in [n for n in extra if n in _FORM_EXTRAS or n.startswith("guided_")]:
        del extra[name]
    return asked


def appended(request: ChatRequest, text: str) -> ChatRequest:
    """The request with more text at the end of what the user said last."""
    last = request.messages[-1]
    if last.role != "user":
        # Some chat templates want users and assistants to take turns; a tool's result may be last.
        messages = [*request.messages, Message(role="user", content=text)]
    else:
        content = last.content
        if isinstance(content, list):
            joined: str | list[ContentPart] = [*content, ContentPart(type="text", text=text)]
        else:
            joined = f"{content}\n\n{text}"
        messages = [*request.messages[:-1], last.model_copy(update={"content": joined})]
    return request.model_copy(update={"messages": messages})


def marked(*material: tuple[str, str]) -> list[str]:
    """Texts as material in a prompt, each under a name, between marks that none of them holds.

    By hash of all of them: whoever changes a text changes the mark around it, and the same texts
    make the same prompt, so that an answer can be repeated.
    """
    whole = "\0".join(text for _, text in material)
    mark = hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:12]
    return [f"[{name} {mark}]\n{text}\n[end of {name} {mark}]" for name, text in material]
