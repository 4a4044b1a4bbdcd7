"""Files named in configs: a path, or ``package:NAME/PATH`` for one inside an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from experts.errors import ExpertConfigError

__all__ = ["PACKAGE_PREFIX", "resolve_path"]

PACKAGE_PREFIX = "package:"


def resolve_path(reference: str) -> Path:
    """The file or folder a reference names.

    Packages are looked up without importing them, so a package with heavy imports costs nothing.

    Raises:
        ExpertConfigError: The package is not installed, or the path does not exist.

    Examples:
        >>> resolve_path("package:experts/paths.py").name
        'paths.py'
    """
    if not reference.startswith(PACKAGE_PREFIX):
        path = Path(reference).expanduser()
        if not path.exists():
            raise ExpertConfigError(f"{reference!r} does not exist")
        return path
    package, _, inside = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ExpertConfigError(f"{reference!r}: the package {package!r} is not installed")
    path = Path(folders[0]) / inside
    if not path.exists():
        raise ExpertConfigError(f"{reference!r}: the package {package!r} has no {inside!r}")
    return path
