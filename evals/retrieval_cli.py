"""``collegium collect-embedders``: an outcome table whose models are embedders."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["collect_embedders_command"]


@click.command("collect-embedders", short_help="Score embedders on questions: an outcome table.")
@click.argument("documents", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("questions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--config",
    "file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Config file with the embedders.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the table.",
)
def collect_embedders_command(documents: Path, questions: Path, file: Path, out: Path) -> None:
    """Score every embedder of a config on questions about documents.

    QUESTIONS has a JSON object a line: "question", "document" (its path below DOCUMENTS), and
    optionally "category" and "split". A score is nDCG@10, so any method of collegium train learns
    from the table whose vectors find what is asked for.
    """
    from evals.retrieval import read_questions, retrieval_table
    from experts.errors import ExpertConfigError
    from experts.retrieval.passages import read_documents
    from orchestrator.config import load_config
    from routers.base import RouterError
    from routers.encoders import get_encoder

    embedders = load_config(file).embedders
    if len(embedders) < 2:
        raise click.UsageError(f"{file} has {len(embedders)} embedders; comparing takes two")
    if out.exists() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty; choose another --out")
    try:
        encoders = {name: get_encoder(entry.encoder) for name, entry in embedders.items()}
        table = retrieval_table(read_documents(documents), read_questions(questions), encoders)
    except (ExpertConfigError, RouterError) as error:
        raise click.UsageError(str(error)) from error
    table.write(out)
    click.echo(f"wrote     {out}")
    click.echo(f"questions {len(table.prompts)}")
    for name, mean in zip(table.models, table.scores("all").mean(axis=0), strict=True):
        click.echo(f"{name:<24}{mean:.3f}")
