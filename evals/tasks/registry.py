"""From a task's name to the task."""

from __future__ import annotations

from importlib import import_module

from evals.tasks.base import Task

_TASKS = {
    "docstrings": "evals.tasks.docstrings:DocstringsTask",
    "extract": "evals.tasks.extract:ExtractTask",
    "general": "evals.tasks.general:GeneralTask",
    "intents": "evals.tasks.intents:IntentsTask",
    "maths": "evals.tasks.maths:MathsTask",
}


def task_names() -> list[str]:
    """Return the names of the built-in tasks, sorted."""
    return sorted(_TASKS)


def get_task(name: str) -> Task:
    """Return a task by its name, or your own by ``"package.module:Class"``.

    Raises:
        ValueError: If the name is not known, or names no task.
    """
    target = _TASKS.get(name, name)
    module_name, separator, class_name = target.partition(":")
    if not separator:
        known = ", ".join(map(repr, task_names()))
        raise ValueError(f'unknown task {name!r}; known: {known} (or give "module:Class")')
    try:
        task = getattr(import_module(module_name), class_name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load task {name!r}: {error}") from error
    if not isinstance(task, Task):
        raise ValueError(f"{name!r} is not a task: it lacks name, max_tokens, samples or grade")
    return task
