"""What methods are compared on: a library, questions with the domain they are of, and examples."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.adapter_files import weights_hash
from experts.config import TokenRouterConfig
from experts.errors import ExpertConfigError
from experts.finetune_data import ChatPair
from experts.library.examiner import Examiner
from experts.library.manifest import Library
from experts.lora import NO_ADAPTER, AdapterUse

if TYPE_CHECKING:
    from routers.outcomes import OutcomeTable

__all__ = ["BASE_NAME", "Question", "Setting", "read_questions"]

BASE_NAME = "base"
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
        gates: Folders of ``collegium library gates`` by method, one for each seed.
        references: Folders of what was made otherwise, by name, one for each seed: an adapter, a
            mixture of ``collegium library mixture``, or a checkpoint.
        device: A torch device.
    """

    library: Library
    base: str
    questions: Sequence[Question]
    examples: Mapping[str, Sequence[Question]]
    table: OutcomeTable | None = None
    gates: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    references: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    device: str = "cpu"

    def has(self, what: str) -> bool:
        """Whether there is something: a table, or examples of all domains, or a named thing.

        Args:
            what: ``table``, ``examples``, ``gates/NAME``, ``references/NAME``.
        """
        if what == "table":
            return self.table is not None
        if what == "examples":
            return self.by_domain.keys() <= self.examples.keys()
        return bool(self.folders(what))

    def folders(self, what: str) -> Sequence[Path]:
        """The folders of ``gates/NAME`` or ``references/NAME``, one for each seed."""
        kind, _, name = what.partition("/")
        named = {"gates": self.gates, "references": self.references}
        return named[kind].get(name, ())

    def fingerprint(self, needs: Sequence[str], seed: int) -> str:
        """Hash of what a method's results depend on.

        Args:
            needs: What it needs beside questions and adapters, as in ``has``.
            seed: The seed.
        """
        facts: list[Any] = [
            self.base,
            [astuple(question) for question in self.questions],
            {name: weights_hash(folder) for name, folder in self.adapters.items()},
        ]
        for need in needs:
            if need == "table" and self.table is not None:
                facts.append(self.table.sha256)
            elif need == "examples":
                shown = {name: [*map(astuple, one)] for name, one in self.examples.items()}
                facts.append(shown)
            else:
                folder = self.folders(need)[seed]
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                facts.append({str(file.relative_to(folder)): _sha256(file) for file in files})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def adapters(self) -> dict[str, Path]:
        """Name and folder of each adapter of the base."""
        chosen = self.library.adapters(self.base)
        return {name: self.library.path(expert.path) for name, expert in chosen.items()}

    @cached_property
    def table_models(self) -> list[str]:
        """What the table calls the base and each adapter.

        Raises:
            ExpertConfigError: It has others, or lacks one.
        """
        models = [] if self.table is None else self.table.models
        others = [name for name in models if name not in self.adapters]
        if len(others) != 1 or len(models) != 1 + len(self.adapters):
            raise ExpertConfigError(
                f"the table has {', '.join(map(repr, models))}, which are not the base and the "
                "library's adapters; write it anew with 'collegium library table'"
            )
        return [*others, *self.adapters]

    @cached_property
    def plain(self) -> Examiner:
        """The base with nothing around it."""
        return Examiner(self.base, {}, device=self.device)

    def host(self, *routers: TokenRouterConfig) -> Examiner:
        """The base with all adapters, and with token routers that share them out."""
        return Examiner(self.base, self.adapters, device=self.device, token_routers=routers)

    def host_reference(self, folder: Path) -> tuple[Examiner, AdapterUse]:
        """What was made otherwise, and how it is used."""
        if (folder / "gates").is_dir():
            parts = {one.name: one for one in sorted((folder / "adapters").iterdir())}
            router = TokenRouterConfig(name="mixture", gates=str(folder / "gates"))
            made = Examiner(self.base, parts, device=self.device, token_routers=[router])
            return made, AdapterUse(router="mixture")
        if (folder / "config.json").exists():
            return Examiner(str(folder), {}, device=self.device), NO_ADAPTER
        made = Examiner(self.base, {"reference": folder}, device=self.device)
        return made, AdapterUse(((made.adapters.adapter("reference"), 1.0),))

    @cached_property
    def by_domain(self) -> dict[str, list[int]]:
        """Positions of the questions of each domain."""
        found: dict[str, list[int]] = defaultdict(list)
        for place, question in enumerate(self.questions):
            found[question.domain].append(place)
        return dict(found)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
