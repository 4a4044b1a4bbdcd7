"""From a request to token ids, through the model's chat template. Knows the tokenizer alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from experts.base import AnyRequest
from experts.errors import InvalidRequestError, UnsupportedFeatureError
from experts.types import ChatRequest, Message

__all__ = ["PromptReader", "template_options"]

_OPTIONS = "chat_template_kwargs"


class PromptReader:
    """Reads prompts for one expert.

    Args:
        expert: Its name, for error messages.
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, expert: str, tokenizer: Any) -> None:
        self._expert = expert
        self._tokenizer = tokenizer

    def read(self, request: AnyRequest) -> list[list[int]]:
        """Token ids of each prompt of a request; chats have one."""
        if isinstance(request, ChatRequest):
            return [self.chat(request.messages, template_options(request))]
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        ids = [list(self._tokenizer(prompt)["input_ids"]) for prompt in prompts]
        if not all(ids):
            raise InvalidRequestError("prompt must not be empty", "prompt")
        return ids

    def chat(
        self, messages: Sequence[Message], options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins.

        Args:
            messages: The conversation.
            options: For the chat template.
        """
        ids: list[int] = self._apply(messages, options, tokenize=True, return_dict=False)
        return ids

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] | None = None) -> str:
        """The text of a conversation that ``chat`` gives the tokens of."""
        text: str = self._apply(messages, options, tokenize=False)
        return text

    def _apply(
        self, messages: Sequence[Message], options: Mapping[str, Any] | None, **how: Any
    ) -> Any:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise UnsupportedFeatureError(self._expert, "chat: its model has no chat template")
        apply, options = self._tokenizer.apply_chat_template, options or {}
        # What the tokenizer does is not the client's to say: a template of its own may never end.
        own = inspect.signature(apply).parameters.keys() - {"documents"}
        for name in sorted(options.keys() & own):
            raise InvalidRequestError(f"{_OPTIONS} must not hold {name!r}", _OPTIONS)
        turns = [self._turn(number, message) for number, message in enumerate(messages)]
        try:
            return apply(turns, add_generation_prompt=True, **how, **options)
        except (TemplateError, TypeError) as exc:
            raise InvalidRequestError(
                f"the chat template of expert {self._expert!r} refuses these messages: {exc}",
                "messages",
            ) from exc

    def _turn(self, number: int, message: Message) -> dict[str, str]:
        if isinstance(message.content, list):
            other = next((part.type for part in message.content if part.type != "text"), None)
            if other is not None:
                raise UnsupportedFeatureError(
                    self._expert, f"content of type {other}", f"messages.{number}.content"
                )
        # Templates know OpenAI's newer name for the system role no more than its models did.
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": message.text}


def template_options(request: ChatRequest) -> dict[str, Any]:
    """What a request has for the chat template.

    Raises:
        InvalidRequestError: It is no object.
    """
    options = (request.model_extra or {}).get(_OPTIONS)
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InvalidRequestError(f"{_OPTIONS} must be an object", _OPTIONS)
    return options
