"""``collegium config``: check and show configs."""

from __future__ import annotations

import json

import click

from orchestrator.config import CollegiumConfig, load_config

__all__ = ["config_command"]


@click.group("config")
def config_command() -> None:
    """Check and show configs."""


@config_command.command("validate")
@click.argument("file", type=click.Path(dir_okay=False))
def validate(file: str) -> None:
    """Check FILE: a Collegium config, or a Ray Serve config that holds one."""
    config = load_config(file)
    experts, routes = len(config.cards()), len(config.routes)
    click.echo(f"{file}: valid; {experts} experts, {len(config.routers)} routers, {routes} routes")


@config_command.command("schema")
def schema() -> None:
    """Print the JSON Schema of config files."""
    click.echo(json.dumps(CollegiumConfig.model_json_schema(), indent=2))


@config_command.command("show")
@click.argument("file", type=click.Path(dir_okay=False), required=False)
def show(file: str | None) -> None:
    """Print FILE, or the embedded config, with every default filled in."""
    click.echo(load_config(file).model_dump_json(indent=2))
