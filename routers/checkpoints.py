"""Where a training stands, on disk, so that the same training run again goes on from there.

One file of safetensors with JSON in its header; no pickle is written or read. Knows nothing of any
method.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from experts.weights import default_cache_dir

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]

log = logging.getLogger("collegium.routers")

# What an interruption can lose. One takes four times the parameters' size, written in seconds.
EVERY_S = 300.0


class Checkpoint:
    """Parameters, optimiser, schedule and torch's random states, and what the caller adds.

    Where the file cannot be used, training starts anew or goes unsaved, and a warning is logged.

    Args:
        name: What is trained; the file's name begins with it.
        decides: All that decides the result: trainings that differ in it have different files.
        module: What is trained.
        optimiser: Its optimiser.
        schedule: The optimiser's.
    """

    def __init__(
        self,
        name: str,
        decides: Iterable[bytes],
        module: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        # Hashes of the parts, so that none can pass for the end of the one before.
        parts = b"".join(hashlib.sha256(part).digest() for part in decides)
        digest = hashlib.sha256(parts).hexdigest()[:32]
        self.path = default_cache_dir() / "trainings" / f"{name}-{digest}.safetensors"
        self._module, self._optimiser, self._schedule = module, optimiser, schedule
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last one is some minutes old."""
        return time.monotonic() - self._saved >= EVERY_S

    @property
    def _on_gpu(self) -> bool:
        return next(self._module.parameters()).device.type == "cuda"

    def save(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file; ``tensors`` and ``facts``, for JSON, are the caller's own."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = self._optimiser.state_dict()
        # Parameters may share memory, which safetensors refuses; copies do not.
        parts = {"module": {name: t.clone() for name, t in self._module.state_dict().items()}}
        parts |= {f"optimiser/{number}": values for number, values in state["state"].items()}
        parts |= {"caller": dict(tensors), "random": {"cpu": torch.get_rng_state()}}
        if self._on_gpu:
            parts["random"]["cuda"] = torch.cuda.get_rng_state()
        flat = {
            f"{part}/{name}": tensor.detach().cpu().contiguous()
            for part, named in parts.items()
            for name, tensor in named.items()
        }
        known = [facts, state["param_groups"], self._schedule.state_dict()]
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(flat, temporary, {"facts": json.dumps(known)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:  # a full disk, say
            log.warning("cannot keep the state of the training in %s: %s", self.path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._saved = time.monotonic()

    def restore(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Bring all to where it was; return the caller's own, or none if there is no file."""
        import torch
        from safetensors import SafetensorError, safe_open

        parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        try:
            with safe_open(self.path, framework="pt") as file:
                facts, groups, schedule = json.loads(file.metadata()["facts"])
                for name in file.keys():
                    part, _, rest = name.partition("/")
                    parts[part][rest] = file.get_tensor(name)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("cannot go on from %s, starting anew: %s", self.path, error)
            return None
        state: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in parts["optimiser"].items():
            number, _, key = name.partition("/")
            state[int(number)][key] = tensor
        self._module.load_state_dict(parts["module"])
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        self._schedule.load_state_dict(schedule)
        torch.set_rng_state(parts["random"]["cpu"])
        if self._on_gpu:
            torch.cuda.set_rng_state(parts["random"]["cuda"])
        return parts["caller"], facts

    def remove(self) -> None:
        """Delete the file, and what writing it may have left over, as training has ended well."""
        for file in self.path.parent.glob(f"{self.path.stem}.*"):
            with contextlib.suppress(OSError):
                file.unlink()
