"""Requests that strategies make of a client's: with other experts' words in them, or in free text.

Other experts' words are data between delimiters, which they cannot close, and they stand in the
last user message, where no expert takes them for its operator's.
"""

from __future__ import annotations

import re
from typing import Any

from experts.types import ChatRequest, ContentPart, Message

__all__ = ["appended", "free_text", "quoted"]

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


def quoted(tag: str, text: str, label: str = "") -> str:
    """A text as data between tags, which it cannot close itself."""
    safe = re.sub(rf"<(?=\s*/?\s*{tag}\b)", "&lt;", text, flags=re.IGNORECASE)
    name = f' name="{label}"' if label else ""
    return f"<{tag}{name}>\n{safe}\n</{tag}>"
