"""Which experts can serve a request: the candidate pool. Looks at cards only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from experts.base import AnyRequest
from experts.features import has_images, required_features
from experts.types import ChatRequest, ExpertCard
from orchestrator.strict import StrictModel

__all__ = [
    "Conversation",
    "estimated_prompt_tokens",
    "estimated_tokens",
    "has_content",
    "prompt_text",
    "split_pool",
]

# English text has about four characters per token; experts check the exact count themselves.
CHARACTERS_PER_TOKEN = 4


class Conversation(StrictModel):
    """What of a conversation says which expert is wanted."""

    type: Literal["last_turn", "recent_turns"] = "last_turn"
    """``last_turn``: the last user message. ``recent_turns``: the last user messages, for
    follow-ups such as "and in French?" that say little by themselves."""
    turns: int = Field(default=3, ge=1)
    """User messages of ``recent_turns``; the newest comes first."""
    max_characters: int = Field(default=2000, ge=1)
    """Characters of ``recent_turns``; what is older is cut off."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


def prompt_text(request: AnyRequest, conversation: Conversation | None = None) -> str:
    """What the router sees: the last user message, or the prompt of a text completion.

    Args:
        request: The request.
        conversation: What else it sees of the messages; none for nothing.
    """
    if isinstance(request, ChatRequest):
        spoken = [m.text for m in request.messages if m.role == "user" and m.text]
        if not spoken:
            return request.messages[-1].text
        if conversation is None or conversation.type == "last_turn":
            return spoken[-1]
        newest = reversed(spoken[-conversation.turns :])
        return "\n".join(newest)[: conversation.max_characters]
    return request.prompt if isinstance(request.prompt, str) else "\n".join(request.prompt)


def has_content(request: AnyRequest) -> bool:
    """Whether there is anything to answer: some text that is not blank, or an image."""
    if isinstance(request, ChatRequest):
        return any(message.text.strip() for message in request.messages) or has_images(request)
    # A text completion may well go on from a line break.
    return all([request.prompt] if isinstance(request.prompt, str) else request.prompt)


def estimated_prompt_tokens(request: AnyRequest) -> int:
    """About how many tokens the whole prompt has."""
    if isinstance(request, ChatRequest):
        return estimated_tokens("".join(message.text for message in request.messages))
    return estimated_tokens(prompt_text(request))


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer."""
    return len(text) // CHARACTERS_PER_TOKEN


def split_pool(
    request: AnyRequest, cards: Iterable[ExpertCard]
) -> tuple[list[ExpertCard], dict[str, str]]:
    """Split experts into those that can serve the request and those that cannot.

    Returns:
        The able ones in their order, and the others' names, each with the reason.
    """
    needed = required_features(request).keys()
    prompt_tokens = estimated_prompt_tokens(request)
    able: list[ExpertCard] = []
    excluded: dict[str, str] = {}
    for card in cards:
        missing = sorted(needed - card.capabilities)
        # Half the estimate surely fits into the count, so nobody is excluded by a bad estimate.
        too_long = card.context_length is not None and prompt_tokens / 2 > card.context_length
        if missing:
            excluded[card.name] = f"lacks {', '.join(missing)}"
        elif too_long:
            excluded[card.name] = f"context of {card.context_length} tokens is too short"
        else:
            able.append(card)
    return able, excluded
