"""What a LoRA adapter changes, read from its files alone: no model, and no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.errors import ExpertConfigError
from experts.weights import resolve_model

if TYPE_CHECKING:
    import torch

__all__ = [
    "LowRank",
    "Updates",
    "adapter_folder",
    "adapter_settings",
    "fuse",
    "inner",
    "read_shapes",
    "read_updates",
    "refuse_pickles",
    "similarity",
    "weights_hash",
    "write_updates",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What torch would read by running what is in it.
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# Options of PEFT's LoRA that make it more than low-rank updates of linear layers.
_NOT_PLAIN = ("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens",
              "trainable_token_indices", "target_parameters", "layer_replication")  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one linear layer: ``up @ down`` is added to its weight.

    Attributes:
        down: Shape (rank, in_features), float32.
        up: Shape (out_features, rank), float32, times the adapter's scale.
    """

    down: torch.Tensor
    up: torch.Tensor

    def top_direction(self) -> torch.Tensor:
        """The input it answers most to: the first right singular vector, shape (in_features,).

        Its sign is arbitrary.
        """
        import torch

        # down.T = Q R, so up @ down = (up R.T) Q.T, and Q turns nothing's length.
        q, r = torch.linalg.qr(self.down.T)
        _, _, right = torch.linalg.svd(self.up @ r.T, full_matrices=False)
        direction: torch.Tensor = q @ right[0]
        return direction


Updates = Mapping[str, LowRank]
"""By the path of the layer in its model."""


def inner(one: Updates, other: Updates) -> float:
    """The inner product of two adapters' updates, all layers together."""
    return sum(
        float(((one[path].up.T @ other[path].up) * (one[path].down @ other[path].down.T)).sum())
        for path in one.keys() & other.keys()
    )


def similarity(one: Updates, other: Updates) -> float:
    """The cosine of two adapters' updates, in [-1, 1]; 0 if one changes nothing."""
    length = (inner(one, one) * inner(other, other)) ** 0.5
    return inner(one, other) / length if length else 0.0


def adapter_folder(reference: str) -> Path:
    """The folder of an adapter: a path, ``package:NAME/FOLDER``, or a name on the model hub.

    Raises:
        ExpertConfigError: It does not exist.
    """
    found = resolve_model(reference)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(found, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ExpertConfigError(
            f"{reference!r} is neither a folder nor an adapter on the model hub: {error}"
        ) from error


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        ExpertConfigError: It is missing or malformed, or describes another kind of adapter.
    """
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExpertConfigError(
            f"{folder} holds no {CONFIG}; expected an adapter in PEFT's format"
        ) from error
    except (OSError, ValueError) as error:
        raise ExpertConfigError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise ExpertConfigError(f"{file} describes no LoRA adapter")
    odd = [option for option in _NOT_PLAIN if found.get(option)]
    if found.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ExpertConfigError(
            f"{file} uses {', '.join(odd)}; expected plain LoRA on linear layers: merge it into a "
            "model of its own, or use engine vllm"
        )
    return found


def refuse_pickles(folder: Path) -> None:
    """Make sure that a folder holds none.

    Raises:
        ExpertConfigError: It does.
    """
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise ExpertConfigError(
            f"{folder} holds {', '.join(pickles)}, and who loads such a file runs what is in it; "
            f"give the weights as {WEIGHTS} alone"
        )


def weights_hash(folder: Path) -> str:
    """SHA-256 of an adapter's weights and of the settings beside them, which scale them.

    Empty if there are no weights.
    """
    files = [folder / name for name in (CONFIG, WEIGHTS)]
    if not files[1].is_file():
        return ""
    hashes = [hashlib.sha256(file.read_bytes()).digest() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(hashes)).hexdigest()


def read_shapes(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Rank, in_features and out_features of each update of an adapter in PEFT's format.

    Reads no weights.

    Raises:
        ExpertConfigError: A file is missing, damaged, or no plain LoRA.
    """
    adapter_settings(folder)
    with _opened(folder) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    downs, ups = _halves(folder, shapes)
    return {path: (down[0], down[1], ups[path][0]) for path, down in downs.items()}


def read_updates(folder: Path) -> dict[str, LowRank]:
    """The updates of an adapter in PEFT's format, by the path of the layer in its model.

    Raises:
        ExpertConfigError: A file is missing, damaged, or no plain LoRA; or numbers are not finite.
    """
    settings = adapter_settings(folder)
    with _opened(folder) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise ExpertConfigError(
            f"{folder / WEIGHTS}: {len(infinite)} of {len(tensors)} tensors hold numbers that are "
            f"not finite, {infinite[0]} first; such an adapter answers nothing"
        )
    _halves(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    downs = {_path(name): t.float() for name, t in tensors.items() if ".lora_A." in name}
    ups = {_path(name): t.float() for name, t in tensors.items() if ".lora_B." in name}
    return {path: LowRank(down, ups[path] * _scale(settings, path)) for path, down in downs.items()}


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS
    if not file.is_file():
        raise ExpertConfigError(f"{folder} holds no {WEIGHTS}")
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise ExpertConfigError(f"{file} is damaged: {error}") from error


def _halves(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of all ``A`` and of all ``B`` by the path of their layer, which match."""
    file = folder / WEIGHTS
    downs = {_path(name): shape for name, shape in shapes.items() if ".lora_A." in name}
    ups = {_path(name): shape for name, shape in shapes.items() if ".lora_B." in name}
    other = [name for name in shapes if ".lora_A." not in name and ".lora_B." not in name]
    if other or downs.keys() != ups.keys() or not downs:
        odd = other[0] if other else "pairs of lora_A and lora_B that do not match"
        raise ExpertConfigError(f"{file} is no plain LoRA: it holds {odd}")
    for path, down in downs.items():
        if len(down) != 2 or len(ups[path]) != 2 or ups[path][1] != down[0]:
            raise ExpertConfigError(f"{file}: the two parts of {path} do not fit each other")
    return downs, ups


def _path(name: str) -> str:
    path = name.partition(".lora_A." if ".lora_A." in name else ".lora_B.")[0]
    return path.removeprefix("base_model.model.")


def _scale(settings: Mapping[str, Any], path: str) -> float:
    """What an update is multiplied by, as PEFT decides it."""
    from peft.utils.other import get_pattern_key

    def of(patterns: str, default: str) -> float:
        found = settings.get(patterns) or {}
        return float(found.get(get_pattern_key(list(found), path), settings[default]))

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def fuse(folders: Mapping[str, Path], weights: Mapping[str, float]) -> dict[str, LowRank]:
    """Weighted sums of several adapters' ``A`` and of their ``B``, scales included.

    Args:
        folders: Of the adapters, by name.
        weights: Of those that count, by name.

    Raises:
        ExpertConfigError: One cannot be read.
    """
    import torch

    read = [(read_updates(folders[name]), weight) for name, weight in weights.items()]
    fused: dict[str, LowRank] = {}
    for path in dict.fromkeys(path for updates, _ in read for path in updates):
        parts = [(updates[path], weight) for updates, weight in read if path in updates]
        rank = max(update.down.shape[0] for update, _ in parts)
        down = torch.zeros(rank, parts[0][0].down.shape[1])
        up = torch.zeros(parts[0][0].up.shape[0], rank)
        for update, weight in parts:
            down[: update.down.shape[0]] += weight * update.down
            up[:, : update.up.shape[1]] += weight * update.up
        fused[path] = LowRank(down, up)
    return fused


def write_updates(folder: Path, updates: Updates, base: str) -> None:
    """Write updates as an adapter in PEFT's format, of the largest of their ranks.

    Args:
        folder: Where to.
        updates: By the path of the layer.
        base: The model that they are for.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    rank = max(update.down.shape[0] for update in updates.values())
    tensors = {}
    for path, update in updates.items():
        down = torch.zeros(rank, update.down.shape[1])
        up = torch.zeros(update.up.shape[0], rank)
        down[: update.down.shape[0]], up[:, : update.up.shape[1]] = update.down, update.up
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(updates), task_type="CAUSAL_LM",
        base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    # PEFT keeps a set, which it would write in another order each time.
    settings.target_modules = sorted(updates)
    settings.save_pretrained(str(folder))
