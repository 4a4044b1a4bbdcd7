"""What commands that write a page share: options, the words for numbers, and the files."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["GAIN", "command_line", "how_judged", "parser_of", "with_interval", "write"]

# Keys of a difference and its interval in lines that have a mean as well.
GAIN = ("gain", "gain_low", "gain_high")


def parser_of(
    about: str | None,
    *,
    tables: Iterable[str] = (),
    seed: str = "",
    out: str = "write OUT.md and OUT.json",
) -> argparse.ArgumentParser:
    """A parser with ``--data``, ``--out`` and what else is asked for.

    Args:
        about: What the command does.
        tables: What ``--tables`` chooses from, by default all.
        seed: What ``--seed`` is of, of a command that cross-validates unless it has a ``--split``.
        out: What ``--out`` does.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data", type=Path, required=True)
    if names := list(tables):
        parser.add_argument("--tables", nargs="+", choices=names, default=names)
    if seed:
        parser.add_argument("--split", help="judge on this split instead of cross-validating")
        parser.add_argument("--seed", type=int, default=0, help=seed)
    parser.add_argument("--out", type=Path, help=out)
    return parser


def command_line() -> str:
    """How this process was started, for its page."""
    return f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}"


def how_judged(split: str | None, n_folds: int) -> str:
    """On which rows, in words."""
    return f"split `{split}`" if split else f"{n_folds}-fold cross-validation of the training rows"


def with_interval(
    found: Mapping[str, float],
    form: str = ".3f",
    *,
    keys: tuple[str, str, str] = ("mean", "low", "high"),
    scale: float = 1,
) -> str:
    """A value with its interval, which are found by these keys."""
    mean, low, high = (scale * found[key] for key in keys)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def write(out: Path | None, page: str, results: Any) -> None:
    """Write OUT.md and OUT.json where wanted."""
    if out:
        out.with_suffix(".md").write_text(page, encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
