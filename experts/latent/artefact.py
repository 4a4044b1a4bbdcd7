"""What was learnt between experts, on disk: weights as safetensors and a manifest. No pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experts.errors import ExpertConfigError

if TYPE_CHECKING:
    from experts.latent.members import Member
    from experts.latent.model import LatentModel

__all__ = ["LatentManifest", "MemberId", "load_latent", "read_latent", "save_latent"]

FORMAT_VERSION = 1
WEIGHTS, MANIFEST = "interactions.safetensors", "latent.json"


class MemberId(BaseModel):
    """An expert that interactions were trained for."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    """Its name."""
    revision: str
    """Hash of its weights."""


class LatentManifest(BaseModel):
    """What ``latent.json`` says."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    """Version of this format."""
    members: list[MemberId] = Field(min_length=1)
    """The experts, in the order of the weights."""
    n_stacks: int = Field(ge=1)
    """Into how many stacks each is cut."""
    width: int = Field(ge=1)
    """Size of the shared space."""
    n_heads: int = Field(ge=1)
    """Attention heads in it."""
    weights_sha256: str = ""
    """Hash of ``interactions.safetensors``."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How it was trained, and what that gave."""

    @property
    def noted_bytes(self) -> int:
        """What all interactions together keep of a token: key, value and gate of each head."""
        return 4 * (self.n_stacks - 1) * (2 * self.width + self.n_heads)


def save_latent(
    folder: Path, model: LatentModel, members: Mapping[str, Member], training: Mapping[str, Any]
) -> LatentManifest:
    """Write what was learnt; the manifest comes last, so whoever sees it sees the weights."""
    from safetensors.torch import save

    from experts.checkpoints import move_into

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _sorted(model)}
    data = save(weights)
    manifest = LatentManifest(
        members=[MemberId(name=name, revision=m.revision) for name, m in members.items()],
        n_stacks=len(model.interactions) + 1,
        width=model.width,
        n_heads=model.n_heads,
        weights_sha256=hashlib.sha256(data).hexdigest(),
        training=dict(training),
    )

    def write(scratch: Path) -> None:
        (scratch / WEIGHTS).write_bytes(data)
        text = manifest.model_dump_json(indent=1)
        (scratch / MANIFEST).write_text(text + "\n", encoding="utf-8")

    move_into(folder, write, last=MANIFEST)
    return manifest


def read_latent(folder: Path, names: Collection[str] = ()) -> LatentManifest:
    """Read the manifest alone.

    Args:
        folder: Where it is.
        names: The experts that it must be for; none takes any.

    Raises:
        ExpertConfigError: It is missing, malformed, of another format, or for other experts.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ExpertConfigError(f"no latent collaboration at {folder}: {MANIFEST} is missing")
    try:
        manifest = LatentManifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or MANIFEST
        raise ExpertConfigError(f"{file}: {where}: {first['msg']}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ExpertConfigError(
            f"{file} has format version {manifest.format_version}; this version of collegium "
            f"reads {FORMAT_VERSION}: train it again"
        )
    trained = [member.name for member in manifest.members]
    if names and set(names) != set(trained):
        raise ExpertConfigError(
            f"{folder} was trained for the experts {', '.join(trained)}, not for "
            f"{', '.join(names)}; name the same ones, or train it again"
        )
    return manifest


def load_latent(folder: Path, members: Mapping[str, Member]) -> LatentModel:
    """What was learnt, with the experts it was learnt for.

    Raises:
        ExpertConfigError: A file is missing or damaged, or the experts are others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from experts.latent.model import LatentModel

    manifest = read_latent(folder, members)
    _check_revisions(folder, manifest, members)
    try:
        data = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise ExpertConfigError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != manifest.weights_sha256:
        raise ExpertConfigError(f"{folder / WEIGHTS} does not match the hash in {MANIFEST}")
    stacked = {member.name: members[member.name].stacked for member in manifest.members}
    model = LatentModel(stacked, manifest.width, manifest.n_heads)
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ExpertConfigError(f"{folder / WEIGHTS} does not fit the experts: {first}") from error
    return model.eval().requires_grad_(False)


def _check_revisions(folder: Path, manifest: LatentManifest, members: Mapping[str, Member]) -> None:
    for trained in manifest.members:
        found = members[trained.name].revision
        if found != trained.revision:
            raise ExpertConfigError(
                f"{folder} was trained for other weights of {trained.name!r} ({trained.revision}) "
                f"than these ({found}); use those, or train it again"
            )


def _sorted(model: LatentModel) -> list[tuple[str, Any]]:
    return sorted(model.state_dict().items())
