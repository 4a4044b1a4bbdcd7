"""Short questions of fact and common sense, from hand-written facts.

Each fact is asked once, in one split. There is no adapter split: the general
expert is the base model as it is.
"""

from __future__ import annotations

import random

from evals.tasks.base import Sample, Split, Wordings, normalise
from evals.tasks.data import read_samples

_WORDINGS = {
    "capital": Wordings(
        shared=(
            "What is the capital of {s}?", "capital of {s}?", "Which city is the capital of {s}?",
            "Tell me the capital city of {s}.", "Do you know the capital of {s}?",
        ),
        validation=("I forgot what the capital of {s} is called.",),
        test=("Where does the government of {s} sit, which city?", "Name {s}'s capital."),
    ),
    "continent": Wordings(
        shared=(
            "On which continent is {s}?", "What continent is {s} in?",
            "{s} is part of which continent?",
        ),
        validation=("Which continent would I have to travel to for {s}?",),
        test=("Where in the world is {s}, which continent?",),
    ),
    "language": Wordings(
        shared=("What language do people speak in {s}?", "Main language of {s}?"),
        validation=("Which language should I learn for {s}?",),
        test=("What do they speak in {s}?",),
    ),
    "author": Wordings(
        shared=("Who wrote {s}?", "Who is the author of {s}?"),
        validation=("{s} was written by whom?",),
        test=("Which writer gave us {s}?",),
    ),
    "question": Wordings(shared=("{s}",), validation=(), test=()),
}  # fmt: skip


class GeneralTask:
    """General knowledge; the answer must contain an expected one as whole words."""

    name = "general"
    max_tokens = 32

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split; alternatives in `answer` are divided by ``|``."""
        return list(read_samples(self.name, _pair)[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return 1 if the answer contains one of the expected ones, else 0."""
        answer = f" {normalise(answer_text)} "
        return float(any(f" {normalise(option)} " in answer for option in sample.answer.split("|")))


def _pair(row: dict[str, str], rng: random.Random, split: Split) -> tuple[str, str]:
    return _WORDINGS[row["kind"]].pick(rng, split).format(s=row["subject"]), row["answer"]
