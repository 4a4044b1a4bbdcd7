"""Outcome tables of embedders: which of them finds the right document for which question.

Routers learn from these as from any table; its models are embedders, its scores nDCG@10.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.retrieval.passages import DEFAULT_CHARACTERS, split_document
from routers.encoders import Encoder
from routers.outcomes import SPLITS, OutcomeTable, Prompts, TableError

__all__ = [
    "CUTOFF",
    "FollowUp",
    "Question",
    "ndcg",
    "read_follow_ups",
    "read_questions",
    "retrieval_table",
]

CUTOFF = 10


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the document that answers it.

    Attributes:
        text: The question.
        document: Path of the document.
        category: What it is about, for routers that learn categories.
        split: ``train``, ``validation`` or ``test``.
    """

    text: str
    document: str
    category: str | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A question that says only together with an earlier one what it is about.

    Attributes:
        earlier: What was asked before.
        text: The question.
        document: Path of the document that answers both.
    """

    earlier: str
    text: str
    document: str


def read_questions(file: Path) -> list[Question]:
    """Questions from a file of JSON lines: question, document, optional category and split.

    Raises:
        TableError: A line is malformed; says which.
    """
    questions = []
    for number, row in _rows(file, ("question", "document")):
        question = Question(row["question"], row["document"], row.get("category"), row.get("split"))
        if question.split not in (None, *SPLITS):
            raise TableError(f"line {number} of {file}: 'split' must be one of {SPLITS}")
        questions.append(question)
    for name in ("category", "split"):
        given = [getattr(question, name) is not None for question in questions]
        if any(given) and not all(given):
            raise TableError(f"{file}: give {name!r} in every line or in none")
    return questions


def read_follow_ups(file: Path) -> list[FollowUp]:
    """Follow-up questions from a file of JSON lines: earlier, follow_up and document.

    Raises:
        TableError: A line is malformed; says which.
    """
    fields = ("earlier", "follow_up", "document")
    return [FollowUp(*(row[name] for name in fields)) for _, row in _rows(file, fields)]


def _rows(file: Path, texts: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line, which must have these texts."""
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(_is_text(row.get(name)) for name in texts):
            names = " and ".join([", ".join(map(repr, texts[:-1])), repr(texts[-1])])
            raise TableError(
                f"line {number} of {file} must be a JSON object with the texts {names}"
            )
        yield number, row


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def ndcg(ranking: Sequence[str], relevant: str, cutoff: int = CUTOFF) -> float:
    """Normalised discounted cumulative gain of a ranking with one relevant document.

    Examples:
        >>> ndcg(["a", "b"], "a"), ndcg(["a", "b"], "c")
        (1.0, 0.0)
    """
    shown = list(ranking[:cutoff])
    return 1.0 / math.log2(2 + shown.index(relevant)) if relevant in shown else 0.0


def retrieval_table(
    documents: Iterable[tuple[str, str]],
    questions: Sequence[Question],
    embedders: Mapping[str, Encoder],
    *,
    characters: int = DEFAULT_CHARACTERS,
) -> OutcomeTable:
    """Score each embedder on each question; a document counts by its best passage.

    Args:
        documents: Path and text of each.
        questions: What is asked.
        embedders: Encoder by the embedder's name.
        characters: Longest passage.

    Raises:
        TableError: A question's document is not there, or there are no questions.

    References:
        Lee et al., "RouterRetriever" (arXiv:2409.02685), for the score by which embedders win a
        query.
    """
    import numpy as np

    passages = [p for path, text in documents for p in split_document(path, text, characters)]
    paths = list(dict.fromkeys(passage.path for passage in passages))
    for question in questions:
        if question.document not in paths:
            raise TableError(f"no document {question.document!r}, or no text in it")
    owner = np.array([paths.index(passage.path) for passage in passages])
    scores = np.zeros((len(questions), len(embedders)))
    for column, encoder in enumerate(embedders.values()):
        vectors = encoder.encode([passage.full_text for passage in passages])
        asked = encoder.encode([question.text for question in questions])
        for row, question in enumerate(questions):
            best = np.full(len(paths), -np.inf, np.float32)
            np.maximum.at(best, owner, vectors @ asked[row])
            order = np.argsort(-best, kind="stable")[:CUTOFF]
            scores[row, column] = ndcg([paths[j] for j in order], question.document)
    prompts = Prompts(
        [f"question-{number}" for number in range(len(questions))],
        [question.text for question in questions],
        [question.category or "" for question in questions]
        if _all(questions, "category")
        else None,
        [question.split or "" for question in questions] if _all(questions, "split") else None,
    )
    return OutcomeTable(prompts, models=list(embedders), numbers={"score": scores})


def _all(questions: Sequence[Question], name: str) -> bool:
    return all(getattr(question, name) is not None for question in questions)
