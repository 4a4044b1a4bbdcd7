"""Commands that run experts on tasks: ``collect`` and ``tasks``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from evals.collect_options import CollectOptions
from evals.tasks import (
    SPLITS,
    TABLE_SPLITS,
    Split,
    Task,
    TaskError,
    chore_names,
    get_task,
    get_tasks,
    task_names,
)

if TYPE_CHECKING:
    from orchestrator.config import CollegiumConfig

__all__ = ["collect_command", "tasks_command"]


def _get_tasks(names: Iterable[str]) -> list[Task]:
    try:
        tasks = [task for name in dict.fromkeys(names) for task in get_tasks(name)]
    except TaskError as error:
        raise click.UsageError(str(error)) from error
    counts = Counter(task.name for task in tasks)
    for name, count in counts.items():
        if count > 1:
            raise click.UsageError(f"{count} tasks are called {name!r}; collect them separately")
    return tasks


@click.group("tasks", short_help="List and export evaluation tasks.")
def tasks_command() -> None:
    """List and export evaluation tasks."""


@tasks_command.command("list", short_help="Tasks and the size of their splits.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of lines.")
def list_command(as_json: bool) -> None:
    """List the built-in tasks with the number of samples in each split."""
    sizes = {
        name: {split: len(get_task(name).samples(split)) for split in SPLITS}
        for name in (*task_names(), *chore_names())
    }
    if as_json:
        click.echo(json.dumps(sizes))
        return
    for name, counts in sizes.items():
        click.echo(f"{name:12}" + "  ".join(f"{split} {n}" for split, n in counts.items()))


@tasks_command.command("export", short_help="Print a split as JSONL.")
@click.argument("name")
@click.option(
    "--split", type=click.Choice(SPLITS), default="adapter", show_default=True, help="Which split."
)
def export_command(name: str, split: str) -> None:
    """Print the samples of a task's split as JSON lines, ready for `collegium train adapter`."""
    try:
        samples = get_task(name).samples(cast(Split, split))
    except TaskError as error:
        raise click.UsageError(str(error)) from error
    if not samples:
        raise click.UsageError(f"task {name!r} has no {split} samples")
    for sample in samples:
        row = {"prompt": sample.text, "answer": sample.answer}
        click.echo(json.dumps(row, ensure_ascii=False))


@click.command("collect", short_help="Run experts on tasks and write an outcome table.")
@click.option(
    "--config",
    "config_file",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Config file with the experts.",
)
@click.option(
    "--tasks",
    "first_tasks",
    multiple=True,
    required=True,
    metavar="NAME ...",
    help='Tasks to run: names from `collegium tasks list`, "module:Class", or lm-eval\'s: '
    "lm-eval:NAME or lm-eval:PATH.yaml, each with #METRIC if it has several.",
)
@click.argument("more_tasks", nargs=-1, metavar="")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the table; a run interrupted there goes on.",
)
@click.option("--expert", "names", multiple=True, help="Only this expert; may be repeated.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=click.Choice(TABLE_SPLITS),
    help="Only this split; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Samples per task and split.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Requests under way at the same time; latencies are measured under that load.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds for one answer.",
)
@click.option(
    "--active",
    is_flag=True,
    help="Stop asking an expert a category's training prompts once it cannot be the best there: "
    "fewer answers, enough to name each category's best. Prompts of other splits are asked of all; "
    "if only such are wanted, the first of these splits decides.",
)
@click.option(
    "--confidence",
    is_flag=True,
    help="Record the mean token probability of new answers, which cascades are calibrated on, of "
    "experts that give log-probabilities.",
)
def collect_command(
    config_file: Path,
    first_tasks: Sequence[str],
    more_tasks: Sequence[str],
    out: Path,
    names: Sequence[str],
    splits: Sequence[str],
    limit: int | None,
    concurrency: int,
    timeout_s: float,
    active: bool,
    confidence: bool,
) -> None:
    """Run experts on tasks with greedy decoding and write the outcome table to a folder."""
    import asyncio

    from evals.collect import CollectError
    from experts.errors import ExpertError
    from orchestrator.config import load_config

    tasks = _get_tasks((*first_tasks, *more_tasks))
    options = CollectOptions(
        concurrency=concurrency,
        splits=cast(Sequence[Split], splits or TABLE_SPLITS),
        limit=limit,
        timeout_s=timeout_s,
        active=active,
        confidence=confidence,
    )
    config = load_config(config_file)
    unknown = [name for name in names if name not in config.cards()]
    if unknown:
        known = ", ".join(map(repr, config.cards()))
        raise click.UsageError(f"unknown expert {unknown[0]!r}; known: {known}")
    try:
        missing = asyncio.run(_collect(config, names, tasks, out, options))
    except (CollectError, ExpertError, TaskError) as error:
        raise click.ClickException(str(error)) from error
    for name, count in missing.items():
        click.echo(f"{name}: {count} answers are missing; run again to ask for them", err=True)
    if missing:
        raise click.exceptions.Exit(1)


async def _collect(
    config: CollegiumConfig,
    names: Sequence[str],
    tasks: Sequence[Task],
    out: Path,
    options: CollectOptions,
) -> dict[str, int]:
    from evals.collect import collect
    from experts.base import Expert
    from experts.config import RetrieverExpertConfig, cards_of
    from experts.registry import open_experts
    from orchestrator.retrieval import with_retrievers

    experts: dict[str, Expert] = {}
    retrievers = [
        entry
        for entry in config.experts
        if isinstance(entry, RetrieverExpertConfig) and (not names or entry.name in names)
    ]
    needed = {*names, *(entry.reader for entry in retrievers)}
    try:
        for entry in config.experts:
            if isinstance(entry, RetrieverExpertConfig):
                continue
            if not names or any(card.name in needed for card in cards_of(entry)):
                experts |= open_experts(entry)
        experts = with_retrievers(config.model_copy(update={"experts": retrievers}), experts)
        wanted = {name: experts[name] for name in names or experts}
        return await collect(wanted, tasks, out, options)
    finally:
        for expert in experts.values():
            await expert.aclose()
