"""``collegium import``: other people's measurements as an outcome table."""

from __future__ import annotations

from pathlib import Path

import click

from evals.importers import FORMATS, ImportOptions, build_table, read_rows
from routers.outcomes import TableError

__all__ = ["import_command"]


@click.command("import", short_help="Make an outcome table from other files.")
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE ...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(list(FORMATS)),
    help="What the files are; by default each file's ending says it (.csv, .jsonl).",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write.",
)
@click.option("--model", help="The model, where the files do not name it.")
@click.option(
    "--metric",
    help="lm-eval's metric to take for the score, or METRIC,FILTER; the first filter by default.",
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=COLUMN",
    help="What a column is called here, as in prompt=question; may be repeated.",
)
def import_command(
    files: tuple[Path, ...],
    layout: str | None,
    out: Path,
    model: str | None,
    metric: str | None,
    columns: tuple[str, ...],
) -> None:
    """Make an outcome table from files with one row per prompt and model.

    csv and jsonl need prompt, model and score (in [0, 1]); prompt_id, category, split,
    input_tokens, output_tokens, latency_s and cost_usd are taken if there. lm-eval takes the
    samples_*.jsonl that --log_samples writes, alpaca-eval an annotations.json.
    """
    pairs = [column.partition("=") for column in columns]
    if any(not name or not value for name, _, value in pairs):
        raise click.UsageError("--column must be NAME=COLUMN")
    options = ImportOptions(model, metric, {name: value for name, _, value in pairs})
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty; choose another --out")
    try:
        table = build_table(read_rows(files, layout, options))
    except TableError as error:
        raise click.UsageError(str(error)) from error
    table.write(out)
    click.echo(f"wrote   {out}")
    click.echo(f"prompts {len(table.prompts)}")
    click.echo(f"models  {', '.join(table.models)}")
