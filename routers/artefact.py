"""Artefacts: fitted routers on disk, as arrays plus a manifest. No pickle is written or read.

An artefact is a folder of ``arrays.safetensors`` and ``manifest.json``. The same fit with the same
command gives the same bytes; there is no time stamp. Knows nothing of any method.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from routers.base import Measured, RouterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from routers.encoders import Encoder

__all__ = [
    "TIMING",
    "Artefact",
    "EncoderId",
    "Manifest",
    "Update",
    "check_target",
    "encoder_of",
    "load_artefact",
    "read_manifest",
    "read_training_s",
    "save_artefact",
    "write_training_s",
]

FORMAT_VERSION = 1
ARRAYS, MANIFEST, TIMING = "arrays.safetensors", "manifest.json", "timing.json"


class EncoderId(BaseModel):
    """Which encoder a router was fitted with."""

    model_config = ConfigDict(frozen=True)

    name: str
    revision: str


class Update(BaseModel):
    """What was changed in a router after it was fitted, in the order it was done."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    table_sha256: str | None = None
    """Hash of the outcome table's contents; none if models were only removed."""
    split: str | None = None
    """The split of that table."""
    removed: list[str] = Field(default_factory=list)
    """Models that were removed."""
    rows: int = 0
    """How many prompts the models it knew learnt from."""
    added: dict[str, int] = Field(default_factory=dict)
    """Models that joined, each with the number of prompts it was described by."""


class Manifest(BaseModel):
    """What ``manifest.json`` says of an artefact."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    method: str
    """Name of a registered router; nothing else is ever imported for an artefact."""
    format_version: int = FORMAT_VERSION
    """Version of this format."""
    collegium_version: str = ""
    """Version of the program that wrote it."""
    encoder: EncoderId | None = None
    """The encoder it is bound to; none if it needs none."""
    models: list[str] = Field(min_length=1)
    """Names of the models it predicts for, in the order of its columns."""
    categories: list[str] | None = None
    """Categories it knows, in the order of its rows."""
    table_sha256: str | None = None
    """Hash of the outcome table's contents it was fitted on."""
    split: str | None = None
    """The split it was fitted on."""
    updates: list[Update] = Field(default_factory=list)
    """What was changed since, oldest first."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters, as given to the constructor."""
    state: dict[str, Any] = Field(default_factory=dict)
    """Fitted numbers that are not arrays."""
    measured: dict[str, Measured] = Field(default_factory=dict)
    """What the training rows tell of each model's answers; policies reckon with it."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """What was measured while fitting."""
    created_with: str = ""
    """The command that wrote it."""
    arrays_sha256: str = ""
    """Hash of ``arrays.safetensors``."""


@dataclass(frozen=True, slots=True)
class Artefact:
    """An artefact in memory."""

    path: Path
    manifest: Manifest
    arrays: dict[str, NDArray[Any]]

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array of a known shape with finite values.

        Raises:
            RouterError: It is missing, has another shape, or holds NaN or infinity.
        """
        import numpy as np

        found = self.arrays.get(name)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {found.shape}, not {shape}"
            raise RouterError(f"artefact {self.path}: array {name!r} {what}")
        if not np.isfinite(found).all():
            raise RouterError(f"artefact {self.path}: array {name!r} is not finite")
        return found

    def state(self, name: str) -> float:
        """A fitted number.

        Raises:
            RouterError: It is missing or not a number.
        """
        value = self.manifest.state.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RouterError(f"artefact {self.path}: state {name!r} is missing or not a number")
        return float(value)


def save_artefact(
    path: Path | str, manifest: Manifest, arrays: Mapping[str, NDArray[np.generic]]
) -> None:
    """Write an artefact; it appears whole or not at all. An older artefact there is replaced.

    Hash, versions and command are filled in here.

    Raises:
        RouterError: There is something else than an artefact at ``path``.
    """
    import numpy as np
    from safetensors.numpy import save

    target = Path(path)
    check_target(target)
    data = save({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())})
    full = manifest.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "collegium_version": _version(),
            "created_with": manifest.created_with or _command(),
            "arrays_sha256": hashlib.sha256(data).hexdigest(),
        }
    )
    with _replacing(target) as folder:
        (folder / ARRAYS).write_bytes(data)
        text = json.dumps(full.model_dump(), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_target(target: Path) -> None:
    """Refuse a place where ``save_artefact`` could not write; worth asking before long training.

    Raises:
        RouterError: There is something else than an artefact.
    """
    if target.exists() and not (target / MANIFEST).is_file():
        if not target.is_dir() or any(target.iterdir()):
            raise RouterError(f"{target} exists and is not an artefact; choose another --out")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A scratch folder beside ``target`` that takes its place when the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder, old = Path(scratch) / "new", Path(scratch) / "old"
        folder.mkdir()
        yield folder
        if target.exists():
            os.replace(target, old)
        os.replace(folder, target)
        if old.exists():
            shutil.rmtree(old)


def _version() -> str:
    try:
        return version("collegium")
    except PackageNotFoundError:
        return "0+unknown"


def _command() -> str:
    program, *arguments = sys.argv or [""]
    return shlex.join([Path(program).name, *arguments])


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest alone.

    Raises:
        RouterError: It is missing, malformed, or of a newer format.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise RouterError(f"no artefact at {path}: {MANIFEST} is missing")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"])) or MANIFEST
        raise RouterError(f"artefact {path}: {where}: {first['msg']}") from exc
    if manifest.format_version != FORMAT_VERSION:
        raise RouterError(
            f"artefact {path} has format version {manifest.format_version}; this version of "
            f"collegium reads {FORMAT_VERSION}: train it again"
        )
    return manifest


def write_training_s(path: Path, seconds: float) -> None:
    """Note beside an artefact how long its training took.

    A file of its own, because the artefact's are the same whoever trains it, wherever.
    """
    (path / TIMING).write_text(json.dumps({"training_s": round(seconds, 3)}) + "\n")


def read_training_s(path: Path | str) -> float:
    """Seconds that training took; NaN if nobody noted them."""
    try:
        return float(json.loads((Path(path) / TIMING).read_text())["training_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.nan


def load_artefact(path: Path | str, *, method: str) -> Artefact:
    """Read and check an artefact.

    Args:
        path: The folder.
        method: The method it must be of.

    Raises:
        RouterError: A file is missing or damaged, or the method is another.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.method != method:
        raise RouterError(f"artefact {folder} is of method {manifest.method!r}, not {method!r}")
    if not (folder / ARRAYS).is_file():
        raise RouterError(f"artefact {folder}: {ARRAYS} is missing")
    data = (folder / ARRAYS).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.arrays_sha256:
        raise RouterError(f"artefact {folder}: {ARRAYS} does not match the hash in {MANIFEST}")
    try:
        return Artefact(folder, manifest, load(data))
    except (SafetensorError, ValueError) as exc:
        raise RouterError(f"artefact {folder}: {ARRAYS} cannot be read: {exc}") from exc


def encoder_of(artefact: Artefact, given: Encoder | None = None) -> Encoder:
    """The encoder an artefact is bound to.

    Args:
        artefact: A loaded artefact.
        given: An encoder to use instead of looking it up by name.

    Raises:
        RouterError: It names none, or the encoder at hand has another revision.
    """
    from routers.encoders import get_encoder

    wanted = artefact.manifest.encoder
    if wanted is None:
        raise RouterError(f"artefact {artefact.path}: encoder is missing in {MANIFEST}")
    encoder = given or get_encoder(wanted.name)
    if (encoder.name, encoder.revision) != (wanted.name, wanted.revision):
        raise RouterError(
            f"artefact {artefact.path} was fitted with encoder {wanted.name!r} revision "
            f"{wanted.revision!r}, but here is {encoder.name!r} revision {encoder.revision!r}: "
            "train it again"
        )
    return encoder
