"""How much a collection asks; apart from `evals.collect`, so that commands start fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evals.tasks import TABLE_SPLITS, Split

__all__ = ["CollectOptions"]


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """How much is asked, and how.

    Attributes:
        concurrency: Requests under way at the same time, all experts together.
        splits: Which splits are asked.
        limit: Samples per task and split; all if none.
        timeout_s: Seconds for one answer.
        active: Stop asking an expert a category's training prompts as soon as it cannot be the best
            there. Prompts of other splits are asked of all experts; if only such are wanted, the
            first of these splits decides.
        confidence: Ask for the tokens' probabilities where an expert gives them.
    """

    concurrency: int = 16
    splits: Sequence[Split] = TABLE_SPLITS
    limit: int | None = None
    timeout_s: float = 300.0
    active: bool = False
    confidence: bool = False
