"""``collegium train METHOD``: one subcommand per registered method, made when it is asked for."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import click

from routers.base import RouterError
from routers.cli_options import (
    MANIFEST_OPTION,
    TABLE_OPTION,
    models_option,
    settings_option,
    split_option,
)
from routers.registry import get_router_class, registered_routers

__all__ = ["print_manifest", "train_command"]

# Methods that train something else than a router alone, each with the command that does it.
OTHER_METHODS = {
    "adapter": "experts.cli:train_adapter_command",
    "latent": "routers.latent.cli:train_latent_command",
}


class _TrainGroup(click.Group):
    """Lists methods without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*registered_routers(), *OTHER_METHODS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OTHER_METHODS:
            module, _, attribute = OTHER_METHODS[cmd_name].partition(":")
            try:
                command = getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError):
                return None
            return command if isinstance(command, click.Command) else None
        if cmd_name in registered_routers() or ":" in cmd_name:
            return _router_command(cmd_name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            known = ", ".join(map(repr, self.list_commands(ctx)))
            raise click.UsageError(
                f'unknown method {name!r}; known: {known} (or give "module:Class")', ctx
            )
        return super().resolve_command(ctx, args)


@click.group(
    "train", cls=_TrainGroup, short_help="Train a router, an adapter or a latent collaboration."
)
def train_command() -> None:
    """Train METHOD: a router on an outcome table, or an adapter or experts together on a task."""


def _router_command(method: str) -> click.Command:
    @click.command(method, help=f"Train a router of method {method!r} on an outcome table.")
    @TABLE_OPTION
    @click.option(
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        help="Artefact folder to write; an artefact already there is replaced.",
    )
    @split_option("train", "Prompts to learn from")
    @models_option("Learn")
    @settings_option("A hyper-parameter of the method")
    @MANIFEST_OPTION
    def train(
        table_path: Path,
        out: Path,
        split: str,
        models: list[str] | None,
        settings: tuple[str, ...],
        as_json: bool,
    ) -> None:
        try:
            _train(method, table_path, out, split, models, settings)
        except RouterError as exc:
            raise click.UsageError(str(exc)) from exc
        print_manifest(out, as_json)

    return train


def _train(
    method: str,
    table_path: Path,
    out: Path,
    split: str,
    models: list[str] | None,
    settings: tuple[str, ...],
) -> None:
    from routers.artefact import check_target, write_training_s
    from routers.outcomes import OutcomeTable
    from routers.params import check_known_params, parse_settings

    check_target(out)
    router_class = get_router_class(method)
    params = parse_settings(settings)
    check_known_params(router_class, params)
    router = router_class(**params)
    table = OutcomeTable.load(table_path)
    if table.prompts.splits is None:
        click.echo(f"{table_path} has no column 'split': learning from all prompts", err=True)
    if models:
        table = table.restricted_to(models)
    started = time.monotonic()
    router.fit(table, split=split).save(out)
    seconds = time.monotonic() - started
    write_training_s(out, seconds)
    click.echo(f"trained in {seconds:.1f} s", err=True)


def print_manifest(out: Path, as_json: bool) -> None:
    """Say on stdout what an artefact that was just written holds."""
    from routers.artefact import read_manifest

    manifest = read_manifest(out)
    if as_json:
        click.echo(json.dumps(manifest.model_dump(), indent=1))
        return
    click.echo(f"wrote      {out}")
    click.echo(f"method     {manifest.method}")
    click.echo(f"models     {', '.join(manifest.models)}")
    if manifest.categories is not None:
        click.echo(f"categories {', '.join(manifest.categories)}")
    for update in manifest.updates:
        for name in update.removed:
            click.echo(f"removed    {name}")
        if update.rows:
            click.echo(f"learnt     {update.rows} more prompts")
        for name, prompts in update.added.items():
            click.echo(f"added      {name} by {prompts} prompts")
    if chosen := manifest.metrics.get("chosen"):
        click.echo(f"chosen     {chosen}: {manifest.metrics.get('reason')}")
    for name, reason in manifest.metrics.get("skipped", {}).items():
        click.echo(f"left out   {name}: {reason}")
    for name, value in {**manifest.state, **manifest.metrics}.items():
        if isinstance(value, int | float):
            click.echo(f"{name:<32} {value:.4g}")
