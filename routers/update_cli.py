"""``collegium update``: models and rows join a trained router, which is not trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from routers.artefact import Update
from routers.base import Router, RouterError
from routers.cli import print_manifest
from routers.cli_options import MANIFEST_OPTION, TABLE_FOLDER, split_option
from routers.fitted import FittedRouter
from routers.outcomes import OutcomeTable
from routers.registry import ROUTERS, get_router_class, load_router

__all__ = ["update_command"]

# The method of a router that makes each change, and what errors call it.
ABILITIES = {
    "add_models": "take new models",
    "partial_fit": "learn from more rows",
    "remove_model": "forget models",
}


@click.command("update", short_help="Add models or rows to a trained router.")
@click.argument("artefact", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--table",
    "table_path",
    type=TABLE_FOLDER,
    help="Outcome table with scores of the models that join, or more rows. Not needed to remove "
    "models.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Artefact folder to write; may be the same. An artefact already there is replaced.",
)
@split_option("train", "Prompts of the table to use")
@click.option(
    "--add-model",
    "added",
    multiple=True,
    metavar="NAME",
    help="A model of the table that joins; may be given several times. By default all that the "
    "artefact does not know.",
)
@click.option(
    "--rows",
    is_flag=True,
    help="Let the models that the artefact knows learn from the table's prompts, on top of what "
    "they were trained on: do not give it the same prompts twice.",
)
@click.option(
    "--remove-model",
    "removed",
    multiple=True,
    metavar="NAME",
    help="A model to forget, before any joins; may be given several times.",
)
@MANIFEST_OPTION
def update_command(
    artefact: Path,
    table_path: Path | None,
    out: Path,
    split: str,
    added: tuple[str, ...],
    rows: bool,
    removed: tuple[str, ...],
    as_json: bool,
) -> None:
    """Change the trained router ARTEFACT without training it again.

    A few hundred scored prompts of any kind describe a model that joins; only prompts that it has
    scores of are used. Give them as an outcome table ('collegium collect' makes one). For
    'centroids' only its own texts count, those of the category that bears its name; for 'pilots'
    the table's prompts that are new need the scores of all models.
    """
    try:
        _update(artefact, table_path, out, split, list(added), rows, list(removed))
    except RouterError as exc:
        raise click.UsageError(str(exc)) from exc
    print_manifest(out, as_json)


def _update(
    artefact: Path,
    table_path: Path | None,
    out: Path,
    split: str,
    added: list[str],
    rows: bool,
    removed: list[str],
) -> None:
    if table_path is None and (added or rows or not removed):
        raise RouterError("models and rows come from an outcome table: give '--table'")
    router: Any = load_router(artefact)
    table = OutcomeTable.load(table_path) if table_path else None
    if table and not added:
        added = _unknown(router, table, split)
    if not (added or rows or removed):
        raise RouterError(
            f"{artefact} knows all models of {table_path} already; give '--rows' to let them learn "
            "from its prompts"
        )
    _check_abilities(router, remove_model=removed, partial_fit=rows, add_models=added)
    if not (added or rows):
        table = None
    for name in removed:
        router.remove_model(name)
    update = Update(
        table_sha256=table.sha256 if table else None,
        split=split if table else None,
        removed=removed,
        rows=_add_rows(router, table, split) if table and rows else 0,
        added=_add_models(router, table, split, added) if table and added else {},
    )
    if table:
        router.measured = {**router.measured, **table.measured(split, added)}
    router.updates_.append(update)
    router.save(out)


def _unknown(router: Router, table: OutcomeTable, split: str) -> list[str]:
    """Models of the table that the router does not know, with any score in the split."""
    import numpy as np

    new = [name for name in table.models if name not in router.models]
    return [name for name in new if not np.isnan(table.scores(split, [name])).all()]


def _add_rows(router: Any, table: OutcomeTable, split: str) -> int:
    """Let known models learn from the split; return of how many prompts."""
    import numpy as np

    texts, scores = table.with_prompts_of(split).texts, table.scores(split)
    cells = np.full((len(texts), len(router.models)), np.nan)
    for column, name in enumerate(router.models):
        if name in table.models:
            cells[:, column] = scores[:, table.models.index(name)]
    some = np.flatnonzero(~np.isnan(cells).all(axis=1))
    if not len(some):
        raise RouterError("'--rows': the split has no scores of a model that the artefact knows")
    router.partial_fit([texts[row] for row in some], cells[some])
    return len(some)


def _add_models(router: Any, table: OutcomeTable, split: str, names: list[str]) -> dict[str, int]:
    """Add models by what the table says of them; return by how many prompts each."""
    import numpy as np

    for name in names:
        if np.isnan(table.scores(split, [name])).all():
            raise RouterError(f"'--add-model': {name!r} has no scores in the split {split!r}")
    found: dict[str, int] = router.add_models(names, table, split=split)
    return found


def _check_abilities(router: Router, **wanted: object) -> None:
    """Refuse what the router has no method for."""
    for ability, asked in wanted.items():
        if asked and not (isinstance(router, FittedRouter) and hasattr(router, ability)):
            able = [name for name in ROUTERS if hasattr(get_router_class(name), ability)]
            raise RouterError(
                f"a router of method {router.method!r} cannot {ABILITIES[ability]}; train it "
                f"again, or train one that can: {', '.join(map(repr, able))}"
            )
