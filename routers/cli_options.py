"""Options that commands on outcome tables share, so that they read and mean the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

__all__ = [
    "MANIFEST_OPTION",
    "TABLE_FOLDER",
    "TABLE_OPTION",
    "models_option",
    "settings_option",
    "split_option",
]

F = TypeVar("F", bound=Callable[..., object])

TABLE_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
TABLE_OPTION = click.option(
    "--table",
    "table_path",
    required=True,
    type=TABLE_FOLDER,
    help="Outcome table: a folder with prompts.parquet and outcomes.parquet.",
)
MANIFEST_OPTION = click.option(
    "--json", "as_json", is_flag=True, help="Print the manifest as JSON."
)


def split_option(default: str, meaning: str) -> Callable[[F], F]:
    """``--split``: which prompts of the table are used."""
    return click.option(
        "--split",
        default=default,
        show_default=True,
        help=f"{meaning}: train, validation, test or all. All are used if the table has no column "
        "'split'.",
    )


def models_option(meaning: str) -> Callable[[F], F]:
    """``--models``: some of the table's models as a list, or none for all."""
    return click.option(
        "--models",
        callback=lambda ctx, param, value: _names(value),
        help=f"{meaning} these models only: names with commas between them.",
    )


def _names(value: str | None) -> list[str] | None:
    return [name.strip() for name in value.split(",")] if value else None


def settings_option(meaning: str) -> Callable[[F], F]:
    """``--set``: settings as text, for ``routers.params.parse_settings``."""
    return click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"{meaning}; may be given several times.",
    )
