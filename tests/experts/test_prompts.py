from __future__ import annotations

import copy

import pytest

from experts.errors import InvalidRequestError
from experts.prompts import PromptReader
from experts.types import ChatRequest
from tests.experts.latent import tiny


def test_conversation_that_a_template_makes_nothing_of_is_refused():
    """The decode loop would wait for its first token, and all others with it."""
    tokenizer = copy.deepcopy(tiny.tokenizer(300))
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )
    reader = PromptReader("quiet", tokenizer)

    def read(role: str) -> list[list[int]]:
        messages = [{"role": role, "content": "hello"}]
        return reader.read(ChatRequest.model_validate({"messages": messages}))

    assert tokenizer.decode(read("user")[0]) == "hello"
    with pytest.raises(InvalidRequestError, match="'quiet' makes nothing of") as caught:
        read("system")
    assert caught.value.param == "messages"
