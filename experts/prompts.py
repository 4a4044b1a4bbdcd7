"""From a request to token ids, through the model's chat template. Knows the tokenizer alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from experts.base import AnyRequest
from experts.errors import InvalidRequestError, UnsupportedFeatureError
from experts.types import ChatRequest, Message

__all__ = ["PromptReader"]

# What a template sees by a name that transformers knows, too.
_SHOWN = frozenset({"documents", "tools", "kwargs"})


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
            ids = self.chat(request.messages, **self.options(request))
            if not ids:
                raise InvalidRequestError(
                    f"the chat template of expert {self._expert!r} makes nothing of these messages",
                    "messages",
                )
            return [ids]
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        id_lists = [list(self._tokenizer(prompt)["input_ids"]) for prompt in prompts]
        if not all(id_lists):
            raise InvalidRequestError("prompt must not be empty", "prompt")
        return id_lists

    def options(self, request: ChatRequest) -> dict[str, Any]:
        """What a request shows the chat template beside its messages.

        Raises:
            InvalidRequestError: It is no object, or would replace the template, cut the prompt, or
                change in another way what is done with it.
        """
        param = "chat_template_kwargs"
        options = (request.model_extra or {}).get(param) or {}
        if not isinstance(options, dict):
            raise InvalidRequestError(f"{param} must be an object", param)
        known = inspect.signature(self._tokenizer.apply_chat_template).parameters
        if reserved := sorted((known.keys() - _SHOWN) & options.keys()):
            raise InvalidRequestError(
                f"{param} is for what the chat template reads; {reserved[0]!r} is not", param
            )
        return options

    def chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins.

        Args:
            messages: The conversation.
            options: Passed to the chat template.
        """
        ids: list[int] = self._apply(messages, tokenize=True, return_dict=False, **options)
        return ids

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The text of a conversation that ``chat`` gives the tokens of."""
        text: str = self._apply(messages, tokenize=False, **options)
        return text

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise UnsupportedFeatureError(self._expert, "chat: its model has no chat template")
        turns = [self._turn(number, message) for number, message in enumerate(messages)]
        try:
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
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
