"""Chat pairs for fine-tuning: read, render, plan into batches, pack into rows.

Knows tokenisers and arithmetic, nothing of models or optimisers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experts.errors import ExpertConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ChatPair",
    "PackedBatch",
    "TokenPair",
    "common_start",
    "pack",
    "plan_batches",
    "read_pairs",
    "tokenize",
]


class ChatPair(NamedTuple):
    """A prompt and the answer to learn."""

    prompt: str
    answer: str


class TokenPair(NamedTuple):
    """A rendered pair: the model reads `prompt_ids` and learns `answer_ids`."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def length(self) -> int:
        """Number of tokens of both."""
        return len(self.prompt_ids) + len(self.answer_ids)


class PackedBatch(NamedTuple):
    """Several pairs as one row without padding, shared prompt start first.

    Attributes:
        input_ids: Shape (1, n_tokens).
        position_ids: Shape (1, n_tokens); each pair counts on from the shared start.
        attention_mask: Shape (1, 1, n_tokens, n_tokens), true where a token may look: at
            the shared start and at earlier tokens of its own pair.
        predicting: Shape (n_answer_tokens,), the positions whose next token is learnt.
        labels: Shape (n_answer_tokens,), those next tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    predicting: torch.Tensor
    labels: torch.Tensor

    def answer_logits(self, model: Any) -> torch.Tensor:
        """What a model predicts at ``predicting``: shape (n_answer_tokens, vocabulary)."""
        found: torch.Tensor = model(
            input_ids=self.input_ids.to(model.device),
            position_ids=self.position_ids.to(model.device),
            attention_mask=self.attention_mask.to(model.device),
            logits_to_keep=self.predicting.to(model.device),
            use_cache=False,
        ).logits[0]
        return found


def read_pairs(path: Path) -> tuple[list[ChatPair], int]:
    """Return the pairs of a JSONL file without repeated prompts, and how many were repeated.

    Of pairs with the same prompt the first is kept.

    Raises:
        ExpertConfigError: If the file cannot be read, holds no pair, or a line is not an
            object with the texts "prompt" and "answer".
    """
    try:
        # Not splitlines(), which also breaks at separators that stand within JSON texts.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertConfigError(f"cannot read {path}: {error}") from error
    pairs: dict[str, ChatPair] = {}
    rows = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows += 1
            pair = _parse_pair(line, f"line {number} of {path}")
            pairs.setdefault(pair.prompt, pair)
    if not pairs:
        raise ExpertConfigError(f'{path} holds no {{"prompt", "answer"}} lines')
    return list(pairs.values()), rows - len(pairs)


def _parse_pair(line: str, place: str) -> ChatPair:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ExpertConfigError(f"{place} is not JSON: {error}") from error
    prompt, answer = (row.get(k) if isinstance(row, dict) else None for k in ("prompt", "answer"))
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt:
        raise ExpertConfigError(f'{place} must be an object with the texts "prompt" and "answer"')
    if not answer.strip():
        raise ExpertConfigError(f"{place} has an empty answer")
    return ChatPair(prompt, answer)


def tokenize(pairs: Sequence[ChatPair], tokenizer: Any) -> list[TokenPair]:
    """Render pairs with the chat template; answers end with the end-of-turn token.

    Raises:
        ExpertConfigError: If the tokenizer has no chat template, or one whose rendering of
            a conversation does not begin with that of its prompt.
    """
    if not tokenizer.chat_template:
        raise ExpertConfigError("the base model has no chat template; use an instruct model")
    return [_tokenize_pair(pair, tokenizer) for pair in pairs]


def _tokenize_pair(pair: ChatPair, tokenizer: Any) -> TokenPair:
    user = {"role": "user", "content": pair.prompt}
    assistant = {"role": "assistant", "content": pair.answer}
    render: Callable[..., str] = tokenizer.apply_chat_template
    prompt = render([user], tokenize=False, add_generation_prompt=True)
    whole = render([user, assistant], tokenize=False)
    if not whole.startswith(prompt):
        raise ExpertConfigError("the base model's chat template changes a prompt once answered")
    # What a template writes after the end of the turn is never generated, so not learnt.
    answer = whole[len(prompt) :].rstrip()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    return TokenPair(*ids)


def plan_batches(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Return the samples of every step: shuffled epochs, similar lengths together.

    The whole plan is known in advance, so an interrupted training goes on at any step.

    Examples:
        >>> plan_batches([3, 9, 4, 8], batch_size=2, steps=2, seed=0)
        [[0, 2], [1, 3]]
    """
    source = _batches(lengths, batch_size, random.Random(seed))
    return [next(source) for _ in range(steps)]


def _batches(
    lengths: Sequence[int], batch_size: int, rng: random.Random, window: int = 16
) -> Iterator[list[int]]:
    order = list(range(len(lengths)))
    while True:
        rng.shuffle(order)
        batches = []
        for start in range(0, len(order), batch_size * window):
            near = sorted(order[start : start + batch_size * window], key=lengths.__getitem__)
            # Sorting by length alone would put the same neighbours together in every epoch.
            batches += [sorted(near[i : i + batch_size]) for i in range(0, len(near), batch_size)]
        rng.shuffle(batches)
        yield from batches


def common_start(rows: Sequence[Sequence[int]]) -> int:
    """With how many equal numbers all rows begin."""
    same = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(takewhile(bool, same))


def pack(pairs: Sequence[TokenPair]) -> PackedBatch:
    """Put pairs into one row, computing their common prompt start (system prompt) once.

    The result is that of separate rows: every pair sees the shared start and itself only.
    """
    import torch

    shared = common_start([pair.prompt_ids[:-1] for pair in pairs])
    ids = list(pairs[0].prompt_ids[:shared])
    positions = list(range(shared))
    owners = [-1] * shared
    predicting: list[int] = []
    labels: list[int] = []
    for owner, pair in enumerate(pairs):
        own = [*pair.prompt_ids[shared:], *pair.answer_ids]
        first = len(ids) + len(own) - len(pair.answer_ids) - 1
        predicting += range(first, first + len(pair.answer_ids))
        labels += pair.answer_ids
        ids += own
        positions += range(shared, shared + len(own))
        owners += [owner] * len(own)
    owner_of = torch.tensor(owners)
    same = (owner_of[:, None] == owner_of[None, :]) | (owner_of[None, :] == -1)
    mask = same & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return PackedBatch(
        torch.tensor([ids]), torch.tensor([positions]), mask[None, None],
        torch.tensor(predicting), torch.tensor(labels),
    )  # fmt: skip
