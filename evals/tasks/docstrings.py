"""The one-line summary of a short function from Python's standard library.

Whole modules belong to one split, so that a function under test has no sibling
among those that an expert was trained on.
"""

from __future__ import annotations

import random
from collections import Counter

from evals.tasks.base import Sample, Split, Wordings, normalise
from evals.tasks.data import read_samples

_WORDINGS = Wordings(
    shared=(
        "Write a one-line docstring for this function:\n\n{c}",
        "{c}\n\nSummarise what this does in one line.",
        "Docstring please:\n{c}",
        "Document this Python function in one sentence.\n```python\n{c}\n```",
        "What would be a good docstring summary for\n{c}",
        "{c}\n\nAdd a docstring (summary line only).",
        "One-line summary of this function:\n{c}",
        "Give me the docstring summary.\n\n{c}",
        "here is my function, write its docstring\n{c}",
        "```python\n{c}\n```\nDescribe this function in a single docstring line.",
    ),
    validation=(
        "This function lacks documentation, one line is enough:\n{c}",
        "{c}\n\nHow would you document it in a line?",
    ),
    test=(
        "Please fill in the missing docstring, first line only:\n{c}",
        "{c}\n# TODO: write the docstring above",
        "My linter wants a docstring here, what should it say?\n{c}",
    ),
)


class DocstringsTask:
    """Summarise a function in one line; token F1 against the original docstring."""

    name = "docstrings"
    max_tokens = 28

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split."""
        return list(read_samples(self.name, _pair)[split])

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return the F1 score of the words of the answer's first line with words in it."""
        lines = filter(None, map(normalise, answer_text.splitlines()))
        return token_f1(next(lines, ""), normalise(sample.answer))


def token_f1(answer: str, expected: str) -> float:
    """Return the harmonic mean of word precision and recall, counting repeated words.

    Examples:
        >>> token_f1("return the name", "return the user name")
        0.8571428571428571
    """
    answer_words, expected_words = answer.split(), expected.split()
    common = sum((Counter(answer_words) & Counter(expected_words)).values())
    return 2 * common / (len(answer_words) + len(expected_words)) if common else 0.0


def _pair(row: dict[str, str], rng: random.Random, split: Split) -> tuple[str, str]:
    return _WORDINGS.pick(rng, split).format(c=row["code"]), row["summary"]
