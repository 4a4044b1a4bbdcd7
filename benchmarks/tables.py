"""The outcome tables of the benchmarks, and the rows that are learnt from and judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routers.outcomes import OutcomeTable

__all__ = ["FOLDS", "TABLES", "load", "part", "parts_of"]

FOLDS = 5
# Name of a benchmark to its folder and its pool; no pool means all models.
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "seven_7b": ("seven_7b", ()),
    "nine_mixed": ("nine_mixed", ()),
    "mmlu_pro open": (
        "mmlu_pro",
        (
            "Phi-3-mini-4k-instruct",
            "mathstral-7B",
            "Meta-Llama-3_1-8B-Instruct",
            "Mixtral-8x7B-Instruct-v0.1",
            "Qwen1.5-72B-Chat",
            "jamba-1.5-large",
        ),
    ),
    "mmlu_pro frontier": (
        "mmlu_pro",
        (
            "gpt-4o-2024-05-13",
            "gemini-1.5-pro-002",
            "gemini-1.5-flash-002",
            "Meta-Llama-3_1-70B-Instruct",
        ),
    ),
}


def load(data: Path, name: str) -> OutcomeTable:
    """A benchmark's table, restricted to its pool."""
    folder, pool = TABLES[name]
    table = OutcomeTable.load(data / folder)
    return table.restricted_to(list(pool)) if pool else table


def part(table: OutcomeTable, learn: NDArray[np.intp], judge: NDArray[np.intp]) -> OutcomeTable:
    """Some rows as the split ``train``, others as ``test``."""
    return table.resplit({"train": learn, "test": judge})


def parts_of(
    table: OutcomeTable, split: str | None, seed: int, n_folds: int = FOLDS
) -> list[OutcomeTable]:
    """One part that is judged on a split; without one, folds of the training rows.

    Folds are stratified by category.
    """
    from sklearn.model_selection import StratifiedKFold

    rows = table.rows("train")
    if split:
        return [part(table, rows, table.rows(split))]
    labels = [table.prompts.categories[row] if table.prompts.categories else "" for row in rows]
    made = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    return [part(table, rows[learn], rows[judge]) for learn, judge in made.split(rows, labels)]
