"""Prompts and answers as the members of a collaboration read them.

Knows tokenizers only: no model, no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experts.finetune_data import ChatPair, TokenPair, tokenize
from experts.latent.alignment import AlignedTokens, MemberTokenizer, PromptTokens, align
from experts.types import Message

__all__ = ["TextReader", "WrittenText", "hold_out", "prompt_hash"]


@dataclass(frozen=True, slots=True)
class WrittenText:
    """A prompt and its answer, as written by one member.

    Attributes:
        tokens: What each member reads: the prompt, and the answer but for its last token.
        targets: The writer's tokens of the answer, the one that ends it last; the first is what
            comes after the prompt.
    """

    tokens: Mapping[str, AlignedTokens]
    targets: list[int]


def prompt_hash(prompt: str) -> str:
    """Tells a prompt from others, in records that shall not repeat it."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hold_out(pairs: Sequence[ChatPair], share: float) -> tuple[list[ChatPair], list[ChatPair]]:
    """Pairs to learn from and held-out ones; a prompt's hash decides, whatever else there is."""
    held_out = [int(prompt_hash(pair.prompt), 16) < share * 2**64 for pair in pairs]
    return (
        [pair for pair, held in zip(pairs, held_out, strict=True) if not held],
        [pair for pair, held in zip(pairs, held_out, strict=True) if held],
    )


class TextReader:
    """Reads pairs with every member's tokenizer and chat template.

    Args:
        tokenizers: Of each member, by name.
        pairs: What there is to read.

    Attributes:
        pairs: The pairs.
    """

    def __init__(
        self, tokenizers: Mapping[str, MemberTokenizer], pairs: Sequence[ChatPair]
    ) -> None:
        self.pairs = pairs
        self._tokenizers = tokenizers
        self._answers = {
            name: [_ended(pair, found) for pair in tokenize(pairs, found.tokenizer)]
            for name, found in tokenizers.items()
        }
        self._prompts: dict[int, dict[str, PromptTokens]] = {}
        self._written: dict[tuple[int, str], WrittenText] = {}

    def length(self, number: int) -> int:
        """Tokens of a pair's prompt and answer for the member that needs most."""
        return max(pairs[number].length for pairs in self._answers.values())

    def written(self, number: int, writer: str) -> WrittenText:
        """A pair, as a member writes it and the others follow."""
        if number not in self._prompts:
            messages = [Message(role="user", content=self.pairs[number].prompt)]
            self._prompts[number] = {
                name: found.chat(messages) for name, found in self._tokenizers.items()
            }
        key = number, writer
        if key not in self._written:
            targets = self._answers[writer][number].answer_ids
            tokens = align(self._prompts[number], self._tokenizers, writer, targets[:-1])
            self._written[key] = WrittenText(tokens, targets)
        return self._written[key]


def _ended(pair: TokenPair, tokenizer: MemberTokenizer) -> TokenPair:
    """A pair whose answer ends with a token that says so, if the tokenizer has any."""
    known = tokenizer.tokenizer
    ends = pair.answer_ids[-1] in known.all_special_ids
    if ends or known.eos_token_id is None:
        return pair
    return TokenPair(pair.prompt_ids, [*pair.answer_ids, known.eos_token_id])
