"""The tasks that experts are measured on, by name."""

from __future__ import annotations

from evals.tasks.base import SPLITS, TABLE_SPLITS, Sample, Split, Task, TaskError
from evals.tasks.registry import chore_names, get_task, get_tasks, task_names

__all__ = [
    "SPLITS",
    "TABLE_SPLITS",
    "Sample",
    "Split",
    "Task",
    "TaskError",
    "chore_names",
    "get_task",
    "get_tasks",
    "task_names",
]
