"""``collegium release``: which artefact of a router a running service uses."""

from __future__ import annotations

from pathlib import Path

import click

from routers.base import RouterError
from routers.releases import current_release, publish, release_names, rollback

__all__ = ["release_command"]

FOLDER = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@click.group("release", short_help="Publish a trained router, or go back to the one before.")
def release_command() -> None:
    """Say which artefact a service uses, while it runs.

    A config names FOLDER as the path of a router. Running services take up a new release within
    seconds, without losing a request; one that does not go with their config is refused and logged.
    """


@release_command.command("publish", short_help="Make an artefact the release in use.")
@FOLDER
@click.argument("artefact", type=click.Path(exists=True, file_okay=False, path_type=Path))
def publish_command(folder: Path, artefact: Path) -> None:
    """Copy ARTEFACT into FOLDER as the release in use."""
    try:
        click.echo(f"{folder} now uses {publish(artefact, folder)}")
    except (RouterError, OSError) as error:
        raise click.UsageError(str(error)) from error


@release_command.command("rollback", short_help="Go back to the release before.")
@FOLDER
@click.option("--to", metavar="NAME", help="This release, as `release list` shows it.")
def rollback_command(folder: Path, to: str | None) -> None:
    """Use the release of FOLDER published before the one in use, or an older one."""
    try:
        click.echo(f"{folder} now uses {rollback(folder, to)}")
    except (RouterError, OSError) as error:
        raise click.UsageError(str(error)) from error


@release_command.command("list", short_help="Show all releases.")
@FOLDER
def list_command(folder: Path) -> None:
    """List the releases of FOLDER, oldest first; a star marks the one in use."""
    try:
        in_use = current_release(folder).name
    except RouterError as error:
        raise click.UsageError(str(error)) from error
    names = release_names(folder)
    if not names:
        raise click.UsageError(f"{folder} holds no releases; 'collegium release publish' makes one")
    for name in names:
        click.echo(f"{'*' if name == in_use else ' '} {name}")
