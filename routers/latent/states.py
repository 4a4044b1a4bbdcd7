"""Hidden states of frozen experts: computed once, kept in memory or on disk. Imports torch."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from experts.latent.members import GIB, Member
from experts.latent.model import LatentModel
from experts.memory import available_bytes
from experts.weights import default_cache_dir
from routers.base import RouterError

__all__ = ["StateStore", "Wanted"]

Wanted = tuple[str, tuple[int, ...]]
"""An expert and the tokens it reads."""

# Padded tokens that are read together.
BATCH_TOKENS = 4096
FILE_TEXTS = 64


class StateStore:
    """States at the boundaries between stacks, by expert and tokens.

    On disk they lie in files of safetensors under ``$COLLEGIUM_CACHE/latent_states``, in a folder
    for all that decides them but the tokens; files are written whole and never changed, so several
    trainings may use them at once. The last bits depend on which texts were read together.

    Args:
        model: The experts.
        members: The same, with the revisions of their weights.
        kind: Where states are kept.

    Raises:
        RouterError: They shall be kept on disk, but an expert's weights have no revision.
    """

    def __init__(
        self,
        model: LatentModel,
        members: Mapping[str, Member],
        kind: Literal["memory", "disk"],
    ) -> None:
        self._model, self._kind = model, kind
        self._spaces = {name: _space(name, member, kind) for name, member in members.items()}
        self._known: dict[str, torch.Tensor] = {}
        self._files: dict[str, Any] = {}
        if kind == "disk":
            for space in set(self._spaces.values()):
                for file in sorted(_folder(space).glob("*.safetensors")):
                    self._open(space, file)

    def get(self, name: str, ids: Iterable[int]) -> torch.Tensor:
        """States that were prepared, shape (n_boundaries, n_tokens, width)."""
        key = self._key(name, tuple(ids))
        if key in self._known:
            return self._known[key]
        found: torch.Tensor = self._files[key].get_tensor(key.partition("/")[2])
        return found

    def prepare(self, wanted: Iterable[Wanted]) -> None:
        """Compute what is not known yet.

        Raises:
            RouterError: It shall be kept in memory and does not fit.
        """
        missing = {}
        for name, ids in wanted:
            key = self._key(name, ids)
            if key not in self._known and key not in self._files:
                missing[key] = (name, ids)
        if self._kind == "memory":
            self._check_memory(missing.values())
        total = sum(len(ids) for _, ids in missing.values())
        with tqdm(
            total=total, desc="reading", unit="token", delay=2, file=sys.stderr, unit_scale=True
        ) as bar:
            for keys in _batches(missing):
                name = missing[keys[0]][0]
                states = self._model.read(name, [missing[key][1] for key in keys])
                # Copies, since parts of a batch would keep all of it.
                found = [one.cpu().clone() for one in states]
                self._keep(self._spaces[name], dict(zip(keys, found, strict=True)))
                bar.update(sum(len(missing[key][1]) for key in keys))

    def _check_memory(self, wanted: Iterable[Wanted]) -> None:
        needed = 0
        for name, ids in wanted:
            member = self._model.members[name]
            needed += len(ids) * len(member.starts) * member.width * member.dtype.itemsize
        free = available_bytes()
        if needed > free:
            raise RouterError(
                f"the members' hidden states take {needed / GIB:.2f} GiB, but only "
                f"{free / GIB:.2f} GiB of memory are free; set cache to disk, or to none"
            )

    def _key(self, name: str, ids: tuple[int, ...]) -> str:
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        return f"{self._spaces[name]}/{digest}"

    def _keep(self, space: str, states: dict[str, torch.Tensor]) -> None:
        if self._kind == "memory":
            self._known |= states
            return
        from safetensors.torch import save_file

        folder = _folder(space)
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256("".join(states).encode()).hexdigest()[:32]
        file, scratch = folder / f"{digest}.safetensors", folder / f"{digest}.{os.getpid()}.tmp"
        save_file({key.partition("/")[2]: t.contiguous() for key, t in states.items()}, scratch)
        os.replace(scratch, file)
        self._open(space, file)

    def _open(self, space: str, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            opened: Any = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise RouterError(f"{file} is damaged: {error}; delete it") from error
        self._files |= {f"{space}/{name}": opened for name in opened.keys()}


def _space(name: str, member: Member, kind: str) -> str:
    """All that decides an expert's states but its tokens."""
    import transformers

    stacked = member.stacked
    if kind == "memory":
        return str(id(stacked))
    if not member.revision:
        raise RouterError(
            f"states of {name!r} cannot be kept on disk, as nothing tells its weights from others; "
            "set cache to memory"
        )
    facts = [member.revision, stacked.starts, str(stacked.dtype), stacked.device.type]
    libraries = [torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([facts, libraries]).encode()).hexdigest()[:32]


def _folder(space: str) -> Path:
    return default_cache_dir() / "latent_states" / space


def _batches(missing: Mapping[str, Wanted]) -> Iterable[list[str]]:
    """Keys of one expert and of like length together, to pad little."""
    batch: list[str] = []

    def place(key: str) -> tuple[str, int, tuple[int, ...]]:
        name, ids = missing[key]
        return name, len(ids), ids

    for key in sorted(missing, key=place):
        name, ids = missing[key]
        full = len(ids) * (len(batch) + 1) > BATCH_TOKENS or len(batch) == FILE_TEXTS
        if batch and (full or missing[batch[0]][0] != name):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
