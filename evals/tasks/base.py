"""What a task is: samples with an expected answer, and a way to grade an answer.

A task knows nothing of experts, routers or files of outcomes; it hands out
questions and judges one answer at a time.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

Split = Literal["adapter", "train", "validation", "test"]
"""``adapter`` trains specialists; the others are the splits of an outcome table."""

SPLITS: tuple[Split, ...] = get_args(Split)
TABLE_SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Generators fill the splits in this order and skip what an earlier split took, so a
# larger adapter split never changes a sample that experts or routers are judged on.
GENERATION_ORDER: tuple[Split, ...] = ("test", "validation", "train", "adapter")


class TaskError(ValueError):
    """A task that cannot be loaded, or cannot grade; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its expected answer.

    Attributes:
        prompt_id: Unique and stable name, ``<task>-<split>-<number>``.
        text: What the user types.
        answer: The expected answer; its format is the task's own.
        category: The domain, which is the task's name for the built-in tasks.
        split: The split this sample belongs to, and no other.
    """

    prompt_id: str
    text: str
    answer: str
    category: str
    split: Split


@runtime_checkable
class Task(Protocol):
    """A set of questions and the way their answers are graded.

    Implementations are cheap to construct, and two instances give equal samples.
    """

    @property
    def name(self) -> str:
        """The name used in configuration, in prompt ids and as the category."""

    @property
    def max_tokens(self) -> int:
        """How many tokens an answer may have."""

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split, always the same and in the same order."""

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return the score of an answer in [0, 1]; any text is gradable, even an empty one."""


@dataclass(frozen=True, slots=True)
class Wordings:
    """Templates of a question, with some kept back from training.

    Half of the validation and of the test samples use templates that no adapter
    and no router was trained on, so both are measured on unseen wording.

    Attributes:
        shared: Templates that every split may use.
        validation: Templates that only the validation split may use.
        test: Templates that only the test split may use.
    """

    shared: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]

    def pick(self, rng: random.Random, split: Split) -> str:
        """Return a template that `split` may use."""
        held_out = {"validation": self.validation, "test": self.test}.get(split, ())
        if held_out and rng.random() < 0.5:
            return rng.choice(held_out)
        return rng.choice(self.shared)


def make_samples(task: str, split: Split, pairs: Sequence[tuple[str, str]]) -> list[Sample]:
    """Number ``(text, answer)`` pairs as the samples of one split."""
    return [
        Sample(f"{task}-{split}-{number:04d}", text, answer, task, split)
        for number, (text, answer) in enumerate(pairs)
    ]


def normalise(text: str) -> str:
    """Lower the case and reduce everything but letters and digits to single spaces.

    Examples:
        >>> normalise("  Credit_Limit  change. ")
        'credit limit change'
    """
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
