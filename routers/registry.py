"""Routers by name. A name is looked up when it is used, so listing them imports none.

A router of your own is given as ``"module:Class"`` on the command line, or registered by an
installed package under the entry-point group ``collegium.routers``. An artefact's manifest can
name registered routers only: reading a file never imports what it names.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from routers.artefact import read_manifest
from routers.base import RouterError, TrainableRouter

__all__ = ["ENTRY_POINTS", "ROUTERS", "get_router_class", "load_router", "registered_routers"]

ENTRY_POINTS = "collegium.routers"

ROUTERS: dict[str, str] = {
    "bert": "routers.bert:BertRouter",
    "best_single": "routers.baselines:BestSingleRouter",
    "blend": "routers.blend:BlendRouter",
    "c3po": "routers.c3po:C3PORouter",
    "centroids": "routers.centroids:CentroidsRouter",
    "coe": "routers.coe:CoERouter",
    "contrastive": "routers.contrastive:ContrastiveRouter",
    "irt": "routers.irt:IRTRouter",
    "kmeans": "routers.kmeans:KMeansRouter",
    "knn": "routers.knn:KNNRouter",
    "latent": "routers.latent.router:LatentRouter",
    "length": "routers.baselines:LengthRouter",
    "mf": "routers.mf:MFRouter",
    "nexus": "routers.nexus:NexusRouter",
    "pilots": "routers.pilots:PilotsRouter",
    "random": "routers.baselines:RandomRouter",
    "ridge": "routers.ridge:RidgeRouter",
    "tree": "routers.tree:TreeRouter",
    "uniroute": "routers.uniroute:UniRouteRouter",
}


def registered_routers() -> dict[str, str]:
    """Name to ``"module:Class"``: those of installed packages, and ours, which come first."""
    others = _installed()
    return {**ROUTERS, **{name: where for name, where in others.items() if name not in ROUTERS}}


@functools.cache
def _installed() -> dict[str, str]:
    # Once per process: it opens a file of every installed package.
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def get_router_class(name: str) -> type[TrainableRouter]:
    """The class of a registered name, or of ``"module:Class"``.

    Raises:
        RouterError: Naming the known ones.
    """
    target = registered_routers().get(name, name if ":" in name else "")
    if not target:
        raise _unknown(name, ' (or give "module:Class")')
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise RouterError(f"cannot import router {name!r}: {exc}") from exc
    if not all(hasattr(found, part) for part in ("fit", "predict", "save", "load")):
        raise RouterError(f"{name!r} is not a router: it needs fit, predict, save and load")
    return cast(type[TrainableRouter], found)


def load_router(path: Path | str) -> TrainableRouter:
    """Load an artefact with the class of the method its manifest names.

    Raises:
        RouterError: The artefact is damaged, or its method is not registered.
    """
    manifest = read_manifest(path)
    if manifest.method not in registered_routers():
        raise RouterError(f"artefact {path}: {_unknown(manifest.method)}")
    router = get_router_class(manifest.method).load(Path(path))
    router.loaded_from = Path(path)
    return router


def _unknown(name: str, hint: str = "") -> RouterError:
    return RouterError(
        f"unknown router {name!r}; known: {', '.join(map(repr, registered_routers()))}{hint}"
    )
