"""What methods are compared on: a library, questions with the domain they are of, and examples."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from experts.config import TokenRouterConfig
from experts.errors import ExpertConfigError
from experts.finetune_data import ChatPair, TokenPair
from experts.library.examiner import Examiner
from experts.library.manifest import Library

if TYPE_CHECKING:
    from routers.outcomes import OutcomeTable

__all__ = ["BASE", "Question", "Setting", "read_questions"]

BASE = "base"
"""What the base model is called beside its adapters."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        prompt: What is asked.
        answer: What is right.
        domain: The adapter it is for, or the name of a domain without one.
    """

    prompt: str
    answer: str
    domain: str

    @property
    def pair(self) -> ChatPair:
        """Prompt and answer."""
        return ChatPair(self.prompt, self.answer)


def read_questions(file: Path) -> list[Question]:
    """The questions of a JSONL file of {"prompt", "answer", "domain"} objects.

    Raises:
        ExpertConfigError: A line is none.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Question(*(str(row[key]) for key in ("prompt", "answer", "domain"))))
        except (ValueError, KeyError, TypeError) as error:
            raise ExpertConfigError(
                f'line {number} of {file} must be an object with "prompt", "answer" and "domain"'
            ) from error
    if not found:
        raise ExpertConfigError(f"{file} holds no questions")
    return found


@dataclass(frozen=True)
class Setting:
    """A library's adapters of one base, and what they are asked.

    Attributes:
        library: The library.
        base: The base model.
        questions: What is measured on.
        examples: A few solved questions of each domain, for methods that ask for them.
        table: Outcomes of base and adapters on samples of the domains, for methods with a router.
        gates: Folders of ``collegium library gates``, by method.
        mixtures: Folders of mixtures of experts that were trained together, by name.
        references: Folders of further adapters to compare with, by name, such as one that was
            trained on all domains.
        device: A torch device.
    """

    library: Library
    base: str
    questions: Sequence[Question]
    examples: Mapping[str, Sequence[Question]]
    table: OutcomeTable | None = None
    gates: Mapping[str, Path] = field(default_factory=dict)
    references: Mapping[str, Path] = field(default_factory=dict)
    mixtures: Mapping[str, Path] = field(default_factory=dict)
    device: str = "cpu"

    def has(self, what: str) -> bool:
        """Whether there is something: a table, or examples of all domains, or a named thing.

        Args:
            what: ``table``, ``examples``, ``gates/NAME``, ``references/NAME``, ``mixtures/NAME``.
        """
        kind, _, name = what.partition("/")
        if kind == "table":
            return self.table is not None
        if kind == "examples":
            return self.by_domain.keys() <= self.examples.keys()
        named = {"gates": self.gates, "references": self.references, "mixtures": self.mixtures}
        return name in named[kind]

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """Name and folder of each adapter of the base."""
        found = {
            expert.name: self.library.path(expert.path)
            for expert in self.library.of(self.base)
            if expert.kind == "adapter"
        }
        if not found:
            raise ExpertConfigError(f"{self.library.folder} has no adapters of {self.base!r}")
        return found

    @cached_property
    def examiner(self) -> Examiner:
        """The base with all adapters and references, and a token router per method of that kind."""
        names = tuple(self.adapters)
        routers = [
            TokenRouterConfig(name="arrow", method="arrow", adapters=names),
            TokenRouterConfig(name="spectr", method="spectr", adapters=names, top_k=4),
            *(
                TokenRouterConfig(name=method, gates=str(folder), adapters=names)
                for method, folder in self.gates.items()
            ),
            *(
                TokenRouterConfig(name=name, gates=str(folder / "gates"))
                for name, folder in self.mixtures.items()
            ),
        ]
        trained = {
            adapter.name: adapter
            for folder in self.mixtures.values()
            for adapter in sorted((folder / "adapters").iterdir())
        }
        hosted = {**self.adapters, **self.references, **trained}
        return Examiner(self.base, hosted, device=self.device, token_routers=routers)

    @cached_property
    def pairs(self) -> list[TokenPair]:
        """The questions as the base reads them."""
        return self.examiner.read([question.pair for question in self.questions])

    def shots(self, domain: str) -> list[TokenPair]:
        """The examples of a domain as the base reads them."""
        return self.examiner.read([question.pair for question in self.examples[domain]])

    @cached_property
    def by_domain(self) -> dict[str, list[int]]:
        """Positions of the questions of each domain."""
        found: dict[str, list[int]] = defaultdict(list)
        for place, question in enumerate(self.questions):
            found[question.domain].append(place)
        return dict(found)
