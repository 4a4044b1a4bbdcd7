"""Short questions of fact and common sense, from hand-written facts.

Each fact is asked once, in one split. There is no adapter split: the general
expert is the base model as it is.
"""

from __future__ import annotations

import random
from functools import cache

from evals.tasks.base import SPLITS, Sample, Split, Wordings, make_samples, normalise
from evals.tasks.data import read_jsonl

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
        return list(_generate()[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return 1 if the answer contains one of the expected ones, else 0."""
        answer = f" {normalise(answer_text)} "
        return float(any(f" {normalise(option)} " in answer for option in sample.answer.split("|")))


@cache
def _generate() -> dict[Split, list[Sample]]:
    rows = read_jsonl("general.jsonl")
    splits: dict[Split, list[Sample]] = {}
    for split in SPLITS:
        rng = random.Random(f"general/{split}")
        pairs = [
            (_WORDINGS[row["kind"]].pick(rng, split).format(s=row["subject"]), row["answer"])
            for row in rows
            if row["split"] == split
        ]
        splits[split] = make_samples("general", split, pairs)
    return splits
