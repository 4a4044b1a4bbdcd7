"""The installed version."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

__all__ = ["version"]


@cache
def version() -> str:
    """The distribution's version; ``0+unknown`` when run from a tree that is not installed."""
    try:
        return installed("collegium")
    except PackageNotFoundError:
        return "0+unknown"
