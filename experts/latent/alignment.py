"""Which tokens of a peer may be seen from which token of the writer.

Every expert reads the conversation through its own tokenizer and chat template. What they have in
common is the text: a token of a peer may be seen from the writer's first token that ends no earlier
in the text, so nobody reads ahead, and of several that end there, from the one as far from the
last of them as it is itself. A token that ends inside a character counts as ending before it
where it looks, and behind it where it is looked at.

In the answer peers get the text piece by piece, as the writer's tokens complete it, and their
tokens of a piece are never taken back. So what a peer reads while an answer is written is what it
reads of the whole answer later, whatever its tokenizer would make of the text at once; a tokenizer
equal to the writer's gives the writer's own tokens. Knows tokenizers only: no model, no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from experts.base import AnyRequest
from experts.prompts import PromptReader
from experts.streaming_text import TokenText
from experts.types import ChatRequest, Message

__all__ = [
    "AlignedTokens",
    "Follower",
    "MemberTokenizer",
    "PromptTokens",
    "align",
    "first_views",
]

# Stands before a piece of text while it is cut, so that no tokenizer takes it for a beginning.
_ANCHOR = "\n"

# Stands for a message's text where what a template writes around it is looked for.
_BLANK = "\ue000"

# Models without a chat template read this, after the token that starts their texts.
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as one expert reads it.

    Attributes:
        ids: Its tokens.
        looks: Where each token ends in the common text when it looks at others, non-decreasing.
        seen: Where each token ends when others look at it, non-decreasing, at least ``looks``.
    """

    ids: list[int]
    looks: list[int]
    seen: list[int]


def first_views(writer: PromptTokens, peer: PromptTokens) -> list[int]:
    """The writer's first token from which each of a peer's tokens may be seen.

    Tokens that end at the same place, as all that a template puts behind a message does, are paired
    from the last: what a peer thinks where the answer begins is at hand just there, and not among
    the others of its template.

    Examples:
        >>> whole = PromptTokens([1, 2, 3], [3, 6, 9], [3, 6, 9])
        >>> first_views(whole, PromptTokens([7, 8], [5, 9], [5, 9]))
        [1, 2]
        >>> first_views(whole, PromptTokens([7, 8, 9], [9, 9, 9], [9, 9, 9]))
        [2, 2, 2]
        >>> first_views(PromptTokens([1, 2, 3], [9, 9, 9], [9, 9, 9]), whole)
        [0, 0, 2]
    """
    found = []
    for number, end in enumerate(peer.seen):
        first = bisect_left(writer.looks, end)
        if first < len(writer.looks) and writer.looks[first] == end:
            last = bisect_right(writer.looks, end) - 1
            after = bisect_right(peer.seen, end) - 1 - number
            first = max(first, last - after)
        found.append(first)
    return found


class MemberTokenizer:
    """One expert's tokenizer.

    Args:
        name: The expert.
        tokenizer: A Hugging Face tokenizer of the fast kind, which knows where tokens end.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name = name
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            tokenizer.chat_template = ("{{ bos_token }}" if starts else "") + _PLAIN_TEMPLATE
        self._reader = PromptReader(name, tokenizer)
        self._anchor = self._ids(_ANCHOR)

    def equals(self, other: MemberTokenizer) -> bool:
        """Whether both give the same tokens for every text."""
        return self._described == other._described

    def read(self, request: AnyRequest) -> list[PromptTokens]:
        """Each prompt of a request; chats have one."""
        if isinstance(request, ChatRequest):
            return [self.chat(request.messages, **self._reader.options(request))]
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        return [self.text(prompt) for prompt in prompts]

    def chat(self, messages: Sequence[Message], **options: Any) -> PromptTokens:
        """A conversation, up to where the assistant begins.

        Args:
            messages: The conversation.
            options: Passed to the chat template.
        """
        rendered = self._reader.render(messages, **options)
        contents = [message.text for message in messages]
        blanks = [
            message.model_copy(update={"content": _BLANK if content else ""})
            for message, content in zip(messages, contents, strict=True)
        ]
        around = self._reader.render(blanks, **options).split(_BLANK)
        return self._located(rendered, contents, around, special=False)

    def text(self, text: str) -> PromptTokens:
        """A text to go on from."""
        return self._located(text, [text], ["", ""], special=True)

    def piece(self, text: str) -> list[int]:
        """The tokens of a piece of text in the middle of others."""
        if not text:
            return []
        ids = self._ids(_ANCHOR + text)
        if ids[: len(self._anchor)] == self._anchor:
            return ids[len(self._anchor) :]
        return self._ids(text)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def _described(self) -> str:
        described: str = self.tokenizer.backend_tokenizer.to_str()
        return described

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _located(
        self, rendered: str, contents: Sequence[str], around: Sequence[str], *, special: bool
    ) -> PromptTokens:
        found = self.tokenizer(rendered, add_special_tokens=special, return_offsets_mapping=True)
        least, most = _places(rendered, contents, around)
        spans = list(found["offset_mapping"])
        looks = [least[end] for _, end in spans]
        for number, (one, following) in enumerate(pairwise(spans)):
            if following[0] < one[1]:  # both are parts of one character
                looks[number] = least[one[0]]
        # At its last token all of the prompt has been read.
        looks[-1:] = [sum(map(len, contents))]
        seen = accumulate((most[end] for _, end in spans), max)
        return PromptTokens(list(found["input_ids"]), list(accumulate(looks, max)), list(seen))


def _places(
    rendered: str, contents: Sequence[str], around: Sequence[str]
) -> tuple[list[int], list[int]]:
    """For each position in a rendered prompt, how many characters of the contents come before it.

    What a template writes around the contents counts as belonging to the one before. Where the
    template has changed a content, so that it cannot be found, nobody knows: there the first list
    has the least and the second one the most it can be.

    Args:
        rendered: The prompt.
        contents: What it shall hold, in order.
        around: What the template writes before, between and behind contents that are not empty; a
            content may occur there as well.
    """
    least, done, cursor = [0], 0, 0
    tags = iter(around)
    for number, content in enumerate(contents):
        tag = next(tags, "") if content else ""
        skipped = len(tag) if rendered.startswith(tag, cursor) else 0
        at = rendered.find(content, cursor + skipped) if content else cursor
        if at < 0:
            rest = len(rendered) - cursor
            total = done + sum(map(len, contents[number:]))
            return least + [done] * rest, least + [total] * rest
        least += [done] * (at - cursor)
        least += range(done + 1, done + len(content) + 1)
        done, cursor = done + len(content), at + len(content)
    least += [done] * (len(rendered) - cursor)
    return least, least


class Follower:
    """Gives a peer what the writer writes.

    Args:
        writer: The writer's tokenizer.
        peer: The peer's.
    """

    def __init__(self, writer: MemberTokenizer, peer: MemberTokenizer) -> None:
        self._peer = peer
        self._same = writer.equals(peer)
        self._text = TokenText(writer.decode)

    def feed(self, token_id: int) -> list[int]:
        """Take the writer's next token; return the peer's tokens that are now complete."""
        if self._same:
            return [token_id]
        return self._peer.piece(self._text.feed(token_id))


@dataclass(frozen=True, slots=True)
class AlignedTokens:
    """What one expert reads of a conversation and its answer.

    Attributes:
        ids: Its tokens.
        seen_from: The writer's position from which each may be seen; the writer's own count up.
    """

    ids: list[int]
    seen_from: list[int]


def align(
    prompts: Mapping[str, PromptTokens],
    tokenizers: Mapping[str, MemberTokenizer],
    writer: str,
    answer_ids: Sequence[int],
) -> dict[str, AlignedTokens]:
    """Prompt and answer as all experts read them, in the order of the prompts.

    Args:
        prompts: Of each expert, by name.
        tokenizers: Of each expert, by name.
        writer: The expert that writes.
        answer_ids: What it has written, without a token that ends it.
    """
    own = prompts[writer]
    start = len(own.ids)
    found = {}
    for name, prompt in prompts.items():
        if name == writer:
            ids = [*own.ids, *answer_ids]
            found[name] = AlignedTokens(ids, list(range(len(ids))))
            continue
        follower = Follower(tokenizers[writer], tokenizers[name])
        ids, seen_from = list(prompt.ids), first_views(own, prompt)
        for position, token_id in enumerate(answer_ids, start):
            new = follower.feed(token_id)
            ids += new
            seen_from += [position] * len(new)
        found[name] = AlignedTokens(ids, seen_from)
    return found
