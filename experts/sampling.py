"""Choosing one token of one row: temperature, nucleus, penalties, seed, log-probabilities.

Works on one row at a time with the row's own random generator, so that what a row draws never
depends on what else is in the batch. Imports torch: loaded by engines that decode in process only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from experts.structured import Constraint

__all__ = ["Drawn", "Sampler", "SamplingOptions", "TokenLogprob"]


class TokenLogprob(NamedTuple):
    """A token and its log-probability."""

    token_id: int
    logprob: float


class Drawn(NamedTuple):
    """A drawn token.

    Attributes:
        token_id: The token.
        logprob: Its log-probability before temperature and nucleus; none if not asked for.
        top: The likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to draw. Defaults and meanings are OpenAI's.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Probability of the nucleus, in (0, 1].
        top_k: Draw from so many of the likeliest tokens, before the nucleus; none from all.
        presence_penalty: Taken off the logit of each token that occurred in the answer.
        frequency_penalty: Taken off once per occurrence.
        logit_bias: Added to the logits of these tokens.
        seed: Seed of the row's own generator; none draws a fresh one.
        top_logprobs: Number of alternatives to report; none reports no log-probability at all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None


class Sampler:
    """Draws the tokens of one answer.

    Args:
        options: How to draw.
        constraint: Allows only some tokens at each step; none allows all.
    """

    def __init__(self, options: SamplingOptions, constraint: Constraint | None = None) -> None:
        self._options = options
        self._constraint = constraint
        self._counts: Counter[int] = Counter()
        self._generator: torch.Generator | None = None
        if options.temperature > 0:
            self._generator = torch.Generator()
            if options.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(options.seed)

    @property
    def finished(self) -> bool:
        """Whether the constraint allows nothing more."""
        return self._constraint is not None and self._constraint.finished

    def draw(self, logits: torch.Tensor) -> Drawn:
        """Draw the next token.

        Args:
            logits: Shape (vocabulary,), float32, on the CPU; not changed.
        """
        scores = self._adjusted(logits)
        token_id = self._pick(scores)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        self._counts[token_id] += 1
        return self._report(logits, token_id)

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        options = self._options
        penalised = (options.presence_penalty or options.frequency_penalty) and self._counts
        if not (penalised or options.logit_bias or self._constraint is not None):
            return logits
        scores = logits.clone()
        if penalised:
            ids = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[ids] -= options.presence_penalty + options.frequency_penalty * counts
        for token_id, bias in options.logit_bias.items():
            scores[token_id] += bias
        if self._constraint is not None:
            self._constraint.mask(scores)
        return scores

    def _pick(self, scores: torch.Tensor) -> int:
        if self._generator is None:
            likeliest = int(scores.argmax())
            # NaN counts as the largest.
            if scores[likeliest].isnan():
                raise ValueError("the model's logits are no numbers")
            return likeliest
        if self._options.top_k is not None:
            least = scores.topk(min(self._options.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = torch.softmax(scores / self._options.temperature, dim=-1)
        if self._options.top_p >= 1.0:
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # A token is in the nucleus if those before it do not yet reach top_p; the first always is.
        inside = ordered.cumsum(-1) - ordered < self._options.top_p
        drawn = torch.multinomial(ordered * inside, 1, generator=self._generator)
        return int(ids[drawn])

    def _report(self, logits: torch.Tensor, token_id: int) -> Drawn:
        count = self._options.top_logprobs
        if count is None:
            return Drawn(token_id)
        logprobs = torch.log_softmax(logits, dim=-1)
        values, ids = logprobs.topk(count)
        top = tuple(map(TokenLogprob, ids.tolist(), values.tolist()))
        return Drawn(token_id, float(logprobs[token_id]), top)
