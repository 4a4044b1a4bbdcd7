"""Atomic files for trainings: checkpoints as safetensors, results moved into place.

A checkpoint is one file replaced as a whole, so that an interruption at any moment leaves
the old one or the new one. No pickle is written or read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.errors import ExpertConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["TrainingState", "load_checkpoint", "move_into", "save_checkpoint"]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds.

    Attributes:
        step: Finished steps.
        tokens: Tokens read so far.
        seconds: Time spent so far.
        recent_loss: Running mean of the loss.
        tensors: Parameters by name, and the optimiser's by ``<key>/<name>``.
    """

    step: int
    tokens: int
    seconds: float
    recent_loss: float
    tensors: Mapping[str, torch.Tensor]

    def restore(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Overwrite parameters and the optimiser's state with those of the checkpoint."""
        import torch

        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[name])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for number, name in enumerate(parameters):
            suffix = f"/{name}"
            state[number] = {
                key.removesuffix(suffix): tensor
                for key, tensor in self.tensors.items()
                if key.endswith(suffix)
            }
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    fingerprint: str,
    **progress: float,
) -> None:
    """Replace the checkpoint at `path` by the current state."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, tensor in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = tensor.detach()
    temporary = path.with_suffix(".tmp")
    metadata = {"fingerprint": fingerprint, "progress": json.dumps(progress)}
    save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def load_checkpoint(path: Path, fingerprint: str) -> TrainingState | None:
    """Return the state at `path`, or none if there is none.

    Raises:
        ExpertConfigError: If the file is damaged or belongs to another training.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ExpertConfigError(f"{path} is damaged: {error}; delete it") from error
    if metadata.get("fingerprint") != fingerprint:
        raise ExpertConfigError(
            f"{path} belongs to another training (other data, base or settings); "
            "delete it or choose another folder"
        )
    return TrainingState(**json.loads(metadata["progress"]), tensors=tensors)


def move_into(folder: Path, write: Callable[[Path], None], *, last: str) -> None:
    """Let `write` fill a temporary folder, then move all of it into `folder`, `last` at the end.

    Whoever sees the file named `last` sees all the others too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        write(Path(temporary))
        for entry in sorted(Path(temporary).iterdir(), key=lambda entry: entry.name == last):
            for file in (entry, *entry.rglob("*")):
                # safetensors makes files that only their owner can read.
                if file.is_file():
                    file.chmod(0o644)
            if entry.is_dir():
                shutil.rmtree(folder / entry.name, ignore_errors=True)
            os.replace(entry, folder / entry.name)
