"""Outcome tables: which model scored what on which prompt. Routers learn from them.

A table is a folder:

* ``prompts.parquet``: ``prompt_id``, ``text``, optional ``category``, optional ``split``
* ``outcomes.parquet``: ``prompt_id``, ``model``, ``score`` in [0, 1] (missing row = not run),
  optional ``input_tokens``, ``output_tokens``, ``latency_s``, ``cost_usd``, ``confidence`` in
  [0, 1] (what the answer said of itself, for cascades)
* optional ``models.json``: per model any of ``total_params_b``, ``active_params_b``,
  ``input_usd_per_mtok``, ``output_usd_per_mtok``, ``added_prompt_tokens``, ``latency_s``,
  ``energy_j``, ``base_model``, ``adapter``

Prompts and cards are read at once, outcomes when they are first asked for, so that an evaluation
can decide before any score is read. Knows nothing of routers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from experts.types import ExpertCard
from routers.base import Measured, RouterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["SPLITS", "OutcomeTable", "Prompts", "TableError"]

SPLITS = ("train", "validation", "test")
NUMBER_COLUMNS = ("score", "input_tokens", "output_tokens", "latency_s", "cost_usd", "confidence")
# Columns whose values lie in [0, 1].
SHARES = ("score", "confidence")
CARD_FIELDS = {
    "total_params_b",
    "active_params_b",
    "input_usd_per_mtok",
    "output_usd_per_mtok",
    "added_prompt_tokens",
    "latency_s",
    "energy_j",
    "base_model",
    "adapter",
}


class TableError(RouterError):
    """An outcome table is not as it must be. Names file, column and row (the first row is 0)."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a table, column by column, in the table's order."""

    ids: list[str]
    texts: list[str]
    categories: list[str] | None = None
    splits: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> Prompts:
        """The prompts of the given rows, in their order."""

        def pick(column: list[str]) -> list[str]:
            return [column[row] for row in rows]

        return Prompts(
            pick(self.ids),
            pick(self.texts),
            pick(self.categories) if self.categories is not None else None,
            pick(self.splits) if self.splits is not None else None,
        )


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Cells as matrices of shape (n_prompts, n_models), NaN where there is none."""

    models: list[str]
    numbers: dict[str, NDArray[np.float64]]


class OutcomeTable:
    """An outcome table, from a folder or from memory.

    Attributes:
        prompts: All prompts.
        cards: What ``models.json`` says, by model.
    """

    def __init__(
        self,
        prompts: Prompts,
        *,
        models: Sequence[str] = (),
        numbers: Mapping[str, NDArray[np.float64]] | None = None,
        cards: Mapping[str, Mapping[str, Any]] | None = None,
        path: Path | None = None,
    ) -> None:
        """Build a table from memory; ``load`` reads one from a folder.

        Args:
            prompts: All prompts.
            models: Names of the columns of ``numbers``.
            numbers: ``score`` and optionally ``input_tokens``, ``output_tokens``, ``latency_s``,
                ``cost_usd``, ``confidence``, each of shape (n_prompts, n_models) with NaN for
                missing cells.
            cards: Facts about models, as in ``models.json``.
            path: Where outcomes are read from when ``numbers`` is None.
        """
        self.prompts = prompts
        self.cards = {name: dict(card) for name, card in (cards or {}).items()}
        self.path = path
        self._outcomes: _Outcomes | None = None
        _check_prompts(prompts)
        if numbers is not None:
            self._outcomes = _Outcomes(list(models), _checked_numbers(prompts, models, numbers))

    @classmethod
    def load(cls, path: Path | str) -> OutcomeTable:
        """Read prompts and cards; outcomes are read when first asked for.

        Raises:
            TableError: Something is missing or malformed.
        """
        from routers.table_files import read_cards, read_prompts

        folder = Path(path)
        if not folder.is_dir():
            raise TableError(f"no outcome table at {folder}: not a folder")
        return cls(read_prompts(folder), cards=read_cards(folder), path=folder)

    def write(self, path: Path | str) -> None:
        """Write the table as a folder; existing files of the same names are replaced."""
        from routers.table_files import write_table

        outcomes = self._read()
        write_table(Path(path), self.prompts, outcomes.models, outcomes.numbers, self.cards)

    def _read(self) -> _Outcomes:
        if self._outcomes is None:
            from routers.table_files import read_outcomes

            if self.path is None:
                raise TableError("this outcome table was built without outcomes")
            models, numbers = read_outcomes(self.path, self.prompts.ids, list(self.cards))
            self._outcomes = _Outcomes(models, numbers)
        return self._outcomes

    @property
    def has_outcomes(self) -> bool:
        """Whether there are outcomes to read; reads none."""
        return self._outcomes is not None or (
            self.path is not None and (self.path / "outcomes.parquet").is_file()
        )

    @property
    def models(self) -> list[str]:
        """Models with outcomes: those of ``models.json`` in its order, then by first appearance.

        Reads the column ``model`` only, no score.
        """
        if self._outcomes is not None:
            return list(self._outcomes.models)
        from routers.table_files import read_model_names

        if self.path is None:
            raise TableError("this outcome table was built without outcomes")
        return read_model_names(self.path, list(self.cards))

    def rows(self, split: str) -> NDArray[np.intp]:
        """Positions of a split's prompts; of all prompts if the table has no column ``split``.

        Raises:
            TableError: The split has no prompts.
        """
        import numpy as np

        if split not in (*SPLITS, "all"):
            raise TableError(f"unknown split {split!r}; known: {_names((*SPLITS, 'all'))}")
        if self.prompts.splits is None or split == "all":
            return np.arange(len(self.prompts))
        rows = np.flatnonzero(np.array(self.prompts.splits) == split)
        if not len(rows):
            there = _names(sorted(set(self.prompts.splits)))
            raise TableError(f"the outcome table has no prompts of split {split!r}; it has {there}")
        return rows

    def has_split(self, split: str) -> bool:
        """Whether the column ``split`` exists and names this split."""
        return self.prompts.splits is not None and split in self.prompts.splits

    def scores(self, split: str, models: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Scores of a split, shape (n_prompts, n_models), NaN for missing cells.

        Args:
            split: ``train``, ``validation``, ``test`` or ``all``.
            models: Which columns, in which order; none means all of ``models``.
        """
        return self._cells("score", split, models)

    def costs_usd(self, split: str, models: Sequence[str] | None = None) -> NDArray[np.float64]:
        """US dollars per answer, shape (n_prompts, n_models), NaN where unknown.

        The column ``cost_usd`` where it has a value, else tokens times the prices of the cards.
        """
        import numpy as np

        names = list(models) if models is not None else self.models
        priced = [self.cards.get(name, {}) for name in names]
        usd = np.zeros((len(self.rows(split)), len(names)))
        for side in ("input", "output"):
            prices = np.array([card.get(f"{side}_usd_per_mtok", np.nan) for card in priced])
            usd = usd + self._cells(f"{side}_tokens", split, names) * prices / 1e6
        stated = self._cells("cost_usd", split, names)
        return np.where(np.isnan(stated), usd, stated)

    def latency_s(self, split: str, models: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Seconds per answer, shape (n_prompts, n_models), NaN where unknown."""
        return self._cells("latency_s", split, models)

    def confidences(self, split: str, models: Sequence[str] | None = None) -> NDArray[np.float64]:
        """What answers said of themselves, shape (n_prompts, n_models), NaN where nothing."""
        return self._cells("confidence", split, models)

    def measured(self, split: str, models: Sequence[str]) -> dict[str, Measured]:
        """Means over models' answers; models of which nothing was measured are left out."""
        import numpy as np

        means = {}
        for name in ("output_tokens", "latency_s", "cost_usd"):
            cells = self.costs_usd(split, models) if name == "cost_usd" else self._cells(
                name, split, models
            )  # fmt: skip
            present = ~np.isnan(cells)
            total = np.where(present, cells, 0.0).sum(axis=0)
            means[name] = [
                float(t / n) if n else None for t, n in zip(total, present.sum(axis=0), strict=True)
            ]
        found = {
            model: Measured(**{name: column[j] for name, column in means.items()})
            for j, model in enumerate(models)
        }
        return {model: known for model, known in found.items() if known != Measured()}

    def _cells(self, column: str, split: str, models: Sequence[str] | None) -> NDArray[np.float64]:
        import numpy as np

        outcomes, rows = self._read(), self.rows(split)
        names = list(models) if models is not None else outcomes.models
        position = {name: number for number, name in enumerate(outcomes.models)}
        missing = [name for name in names if name not in position]
        if missing:
            raise TableError(
                f"the outcome table has no model {missing[0]!r}; it has {_names(outcomes.models)}"
            )
        columns = np.array([position[name] for name in names], np.intp)
        if column not in outcomes.numbers:
            return np.full((len(rows), len(names)), np.nan)
        return outcomes.numbers[column][np.ix_(rows, columns)]

    def card(self, model: str) -> ExpertCard:
        """A model's prices and sizes as an expert card."""
        return ExpertCard(name=model, **self.cards.get(model, {}))

    def with_prompts_of(self, split: str) -> Prompts:
        """The prompts of one split."""
        return self.prompts.take(self.rows(split))

    @property
    def sha256(self) -> str:
        """Hash of the contents, whatever the order of models and the files' encoding.

        Reads all scores; without outcomes it is the hash of the prompts alone.
        """
        import numpy as np

        prompts = self.prompts
        digest = hashlib.sha256()
        columns = [prompts.ids, prompts.texts, prompts.categories, prompts.splits]
        digest.update(json.dumps(columns).encode())
        if self.has_outcomes:
            outcomes = self._read()
            order = sorted(range(len(outcomes.models)), key=outcomes.models.__getitem__)
            digest.update(json.dumps([outcomes.models[j] for j in order]).encode())
            digest.update(json.dumps(self.cards, sort_keys=True).encode())
            for name in sorted(outcomes.numbers):
                cells = outcomes.numbers[name][:, order]
                # One bit pattern for NaN, one byte order.
                cells = np.where(np.isnan(cells), np.nan, cells).astype("<f8")
                digest.update(name.encode() + np.ascontiguousarray(cells).tobytes())
        return digest.hexdigest()

    def restricted_to(self, models: Sequence[str]) -> OutcomeTable:
        """The same prompts with the outcomes of some models only.

        Raises:
            TableError: A model has no outcomes.
        """
        numbers = {name: self._cells(name, "all", models) for name in self._read().numbers}
        cards = {name: card for name, card in self.cards.items() if name in models}
        return OutcomeTable(replace(self.prompts), models=models, numbers=numbers, cards=cards)

    def resplit(self, parts: Mapping[str, NDArray[np.intp]]) -> OutcomeTable:
        """Some rows, with new splits.

        Args:
            parts: Positions of each split's rows.
        """
        import numpy as np

        rows = np.concatenate(list(parts.values()))
        splits = [split for split, found in parts.items() for _ in found]
        outcomes = self._read()
        return OutcomeTable(
            replace(self.prompts.take(rows), splits=splits),
            models=outcomes.models,
            numbers={name: cells[rows] for name, cells in outcomes.numbers.items()},
            cards=self.cards,
        )


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _check_prompts(prompts: Prompts) -> None:
    where = "prompts.parquet"
    seen: dict[str, int] = {}
    for row, prompt_id in enumerate(prompts.ids):
        if seen.setdefault(prompt_id, row) != row:
            raise TableError(
                f"{where}: column 'prompt_id', row {row}: {prompt_id!r} is already in "
                f"row {seen[prompt_id]}"
            )
    for row, split in enumerate(prompts.splits or ()):
        if split not in SPLITS:
            raise TableError(
                f"{where}: column 'split', row {row}: {split!r} is none of {_names(SPLITS)}"
            )
    for name, column in (
        ("text", prompts.texts),
        ("category", prompts.categories),
        ("split", prompts.splits),
    ):
        if column is not None and len(column) != len(prompts.ids):
            raise TableError(f"{where}: column {name!r} has another length than 'prompt_id'")
    if not prompts.ids:
        raise TableError(f"{where}: no rows")


def _checked_numbers(
    prompts: Prompts, models: Sequence[str], numbers: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    import numpy as np

    unknown = [name for name in numbers if name not in NUMBER_COLUMNS]
    if unknown or "score" not in numbers:
        raise TableError(f"outcomes: columns must be 'score' and any of {_names(NUMBER_COLUMNS)}")
    if len(set(models)) != len(models):
        raise TableError("outcomes: a model is named twice")
    checked = {name: np.asarray(cells, np.float64) for name, cells in numbers.items()}
    for name, cells in checked.items():
        if cells.shape != (len(prompts), len(models)):
            raise TableError(
                f"outcomes: {name!r} has shape {cells.shape}, not {(len(prompts), len(models))}"
            )
        present = cells[~np.isnan(cells)]
        if (present < 0).any() or (name in SHARES and (present > 1).any()):
            bounds = "[0, 1]" if name in SHARES else "[0, inf)"
            raise TableError(f"outcomes: {name!r} has values outside {bounds}")
    return checked


def checked_card(name: str, facts: object) -> dict[str, Any]:
    """The known facts of one entry of ``models.json``; others are left out.

    Raises:
        TableError: A fact has the wrong type or range.
    """
    if not isinstance(facts, dict):
        raise TableError(f"models.json: {name!r} must be an object, not {type(facts).__name__}")
    known = {key: value for key, value in facts.items() if key in CARD_FIELDS and value is not None}
    try:
        ExpertCard(name=name, **known)
    except ValidationError as exc:
        first = exc.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise TableError(f"models.json: {name!r}: {field}: {first['msg']}") from exc
    return known
