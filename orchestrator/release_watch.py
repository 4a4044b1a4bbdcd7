"""Taking up new releases of routers while the service runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from experts.errors import ExpertError
from experts.paths import resolve_path
from orchestrator.config import ArtefactRouterConfig, CollegiumConfig, ConfigError
from routers.base import Router, RouterError

__all__ = ["ReleaseWatch"]

logger = logging.getLogger("collegium.releases")


class ReleaseWatch:
    """Looks for new releases, at most once per router and ``reload_s``, and only while asked to.

    A request never waits for it: loading runs in a thread, and requests under way go on with the
    router they began with. A release that cannot be used is logged once and left, and so is a
    folder that cannot be read.

    Args:
        config: Where routers come from.
        routers: As they were loaded, by name.
        prepare: Called in a thread with a router's name, the router and its release; raises a
            ConfigError if the router does not go with the config. What it returns is called in the
            event loop and puts the router in use.

    Attributes:
        in_use: Release in use by router, of those that have releases.
    """

    def __init__(
        self,
        config: CollegiumConfig,
        routers: Mapping[str, Router],
        prepare: Callable[[str, Router, str], Callable[[], None]],
    ) -> None:
        from routers.releases import CURRENT, current_release

        self._prepare = prepare
        self._folders: dict[str, tuple[Path, float]] = {}
        self._seen: dict[str, str] = {}
        for name, entry in config.routers.items():
            if isinstance(entry, ArtefactRouterConfig):
                folder = resolve_path(entry.path)
                if (folder / CURRENT).is_file():
                    self._folders[name] = folder, entry.reload_s
                    # Not what is current by now, which may be later than what was loaded.
                    loaded = getattr(routers.get(name), "loaded_from", None)
                    self._seen[name] = (loaded or current_release(folder)).name
        self.in_use = dict(self._seen)
        self._looked = dict.fromkeys(self._folders, time.monotonic())
        self._tasks: set[asyncio.Task[None]] = set()
        self._logged: dict[str, str] = {}

    def look(self) -> None:
        """Begin to look, where it is time to; returns at once."""
        now = time.monotonic()
        for name, (_, reload_s) in self._folders.items():
            if now - self._looked[name] >= reload_s:
                # Not before the last look is over, however long loading takes.
                self._looked[name] = float("inf")
                task = asyncio.ensure_future(self._look(name))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _look(self, name: str) -> None:
        try:
            if found := await asyncio.to_thread(self._load, name):
                release, use = found
                use()
                self.in_use[name] = release
                logger.info("router %s now uses release %s", name, release)
            self._logged.pop(name, None)
        except (RouterError, ConfigError, ExpertError, OSError) as error:
            if self._logged.get(name) != str(error):
                self._logged[name] = str(error)
                logger.error("router %s keeps release %s: %s", name, self.in_use[name], error)
        finally:
            self._looked[name] = time.monotonic()

    def _load(self, name: str) -> tuple[str, Callable[[], None]] | None:
        from routers.registry import load_router
        from routers.releases import current_release

        path = current_release(self._folders[name][0])
        if path.name == self._seen[name]:
            return None
        self._seen[name] = path.name
        return path.name, self._prepare(name, load_router(path), path.name)
