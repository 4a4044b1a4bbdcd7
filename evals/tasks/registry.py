"""From a task's name to the task."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from evals.tasks.base import Task, TaskError

_TASKS = {
    "docstrings": "evals.tasks.docstrings:DocstringsTask",
    "extract": "evals.tasks.extract:ExtractTask",
    "general": "evals.tasks.general:GeneralTask",
    "intents": "evals.tasks.intents:IntentsTask",
    "maths": "evals.tasks.maths:MathsTask",
}
_CHORES = {
    name: f"evals.tasks.chores:{name}"
    for name in ("dates", "html", "nato", "roman", "shell", "sql", "times", "yaml")
}
_LM_EVAL = "lm-eval:"


def task_names() -> list[str]:
    """Return the names of the tasks of the embedded pool, sorted."""
    return sorted(_TASKS)


def chore_names() -> list[str]:
    """Return the names of the further tasks of the library of adapters, sorted."""
    return sorted(_CHORES)


def get_task(name: str) -> Task:
    """Return the one task of a name; see `get_tasks`.

    Raises:
        TaskError: If the name is not known, or names no task, or several.
    """
    task, *others = get_tasks(name)
    if others:
        names = ", ".join(repr(other.name) for other in (task, *others))
        raise TaskError(f"{name!r} is a group of tasks, name one of them: {names}")
    return task


def get_tasks(name: str) -> Sequence[Task]:
    """Return a built-in task, your own by ``"package.module:Class"``, or one or more of lm-eval's.

    lm-eval's tasks are ``"lm-eval:NAME"`` and ``"lm-eval:PATH.yaml"``; a group gives all of its.

    Raises:
        TaskError: If the name is not known, or names no task.
    """
    if name.startswith(_LM_EVAL):
        from evals.tasks.lm_eval_task import load_tasks

        return load_tasks(name.removeprefix(_LM_EVAL))
    target = {**_TASKS, **_CHORES}.get(name, name)
    module_name, separator, class_name = target.partition(":")
    if not separator:
        known = ", ".join(map(repr, (*task_names(), *chore_names())))
        raise TaskError(
            f'unknown task {name!r}; known: {known} (or give "module:Class", "lm-eval:NAME" or '
            '"lm-eval:PATH.yaml")'
        )
    try:
        task = getattr(import_module(module_name), class_name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise TaskError(f"cannot load task {name!r}: {error}") from error
    if not isinstance(task, Task):
        raise TaskError(f"{name!r} is not a task: it lacks name, max_tokens, samples or grade")
    return [task]
