"""Releases of a router: a folder that says which of its artefacts is in use.

    FOLDER/current              the name of the release in use
    FOLDER/releases/0002-NAME   an artefact each, in the order in which they were published

A service whose config names the folder takes up what ``current`` says while it runs. The file is
replaced whole, so whoever reads it sees the old name or the new one.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from routers.artefact import read_manifest
from routers.base import RouterError
from routers.registry import load_router

__all__ = ["CURRENT", "current_release", "publish", "release_names", "rollback"]

CURRENT, RELEASES = "current", "releases"


def current_release(path: Path | str) -> Path:
    """The artefact in use: the folder itself unless it holds releases.

    Raises:
        RouterError: The release in use is missing.
    """
    folder = Path(path)
    if not (folder / CURRENT).is_file():
        return folder
    found = folder / RELEASES / (folder / CURRENT).read_text(encoding="utf-8").strip()
    if not found.is_dir():
        raise RouterError(
            f"{folder / CURRENT} names {found.name!r}, which is not among the releases: "
            f"{', '.join(release_names(folder)) or 'none'}"
        )
    return found


def release_names(folder: Path) -> list[str]:
    """All releases, oldest first."""
    if not (folder / RELEASES).is_dir():
        return []
    found = (path.name for path in (folder / RELEASES).iterdir())
    return sorted(name for name in found if re.fullmatch(r"[0-9]{4,}-[0-9a-f]{8}", name))


def publish(artefact: Path, folder: Path) -> str:
    """Make a copy of an artefact the release in use.

    Args:
        artefact: A trained router; it is loaded once, so that a broken one is not published.
        folder: Where releases are kept; made if it is not there.

    Returns:
        The release's name.

    Raises:
        RouterError: The artefact cannot be used, or the folder holds something else.
    """
    load_router(artefact)
    ours = (CURRENT, RELEASES)
    begun = not folder.exists() or (folder / CURRENT).is_file()
    if not begun and any(p.name not in ours and p.name[0] != "." for p in folder.iterdir()):
        raise RouterError(f"{folder} holds something else than releases; choose another folder")
    names = release_names(folder)
    number = 1 + max((int(name.partition("-")[0]) for name in names), default=0)
    name = f"{number:04d}-{read_manifest(artefact).arrays_sha256[:8]}"
    kept = folder / RELEASES
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".") as scratch:
        copied = shutil.copytree(artefact, Path(scratch) / name)
        os.replace(copied, kept / name)
    _use(folder, name)
    return name


def rollback(folder: Path, to: str | None = None) -> str:
    """Go back to a release.

    Args:
        folder: Where releases are kept.
        to: Its name; none goes to the one published before the one in use.

    Returns:
        Its name.

    Raises:
        RouterError: There is none.
    """
    in_use = current_release(folder).name
    earlier = [name for name in release_names(folder) if name < in_use and to in (None, name)]
    if not (folder / CURRENT).is_file() or not earlier:
        wanted = f"release {to!r}" if to else "release"
        raise RouterError(f"{folder} has no {wanted} before {in_use!r}")
    _use(folder, earlier[-1])
    return earlier[-1]


def _use(folder: Path, name: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=".", delete=False, encoding="utf-8"
    ) as file:
        file.write(name + "\n")
    os.chmod(file.name, 0o644)  # the service may run as somebody else
    os.replace(file.name, folder / CURRENT)
