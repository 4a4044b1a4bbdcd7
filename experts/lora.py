"""Several LoRA adapters of one model in one batch, each row with its own or none.

PEFT reads the adapters and decides which layers they change and how strongly; its layers are then
replaced, because PEFT's mixed batches put a hook on every layer in every pass and multiply each
adapter's rows together, so that a row's bits depend on how many rows share its adapter. Here all
adapters of a layer lie in one stack and every row is multiplied by its own slice of it.
Imports torch and peft: loaded by the transformers engine only, and only if it has adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from experts.errors import ExpertConfigError

__all__ = ["AdapterRows", "load_adapters"]


class AdapterRows:
    """Which adapter each row of the next forward pass uses.

    Attributes:
        indices: Shape (n_rows,), 0 for no adapter; none if no row uses one.
    """

    def __init__(self) -> None:
        self.indices: torch.Tensor | None = None


class _Update(NamedTuple):
    down: torch.Tensor
    up: torch.Tensor


class _StackedLora(nn.Module):
    """A linear layer plus, for each row, the low-rank update of its adapter.

    ``down`` has shape (n_adapters + 1, in_features, rank), ``up`` (n_adapters + 1, rank,
    out_features); index 0 is zero. Ranks are padded with zeros to the largest.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, base: nn.Module, updates: list[_Update | None], rows: AdapterRows) -> None:
        super().__init__()
        self.base = base
        self._rows = rows
        weight = cast(torch.Tensor, base.weight)
        out_features, in_features = weight.shape
        rank = max(update.down.shape[0] for update in updates if update)
        down = weight.new_zeros((len(updates) + 1, in_features, rank))
        up = weight.new_zeros((len(updates) + 1, rank, out_features))
        for index, update in enumerate(updates, start=1):
            if update is not None:
                down[index, :, : update.down.shape[0]] = update.down.T
                up[index, : update.down.shape[0]] = update.up.T
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return shape (n_rows, n_tokens, features)."""
        result = cast(torch.Tensor, self.base(x))
        indices = self._rows.indices
        if indices is None:
            return result
        return torch.baddbmm(result, torch.bmm(x, self.down[indices]), self.up[indices])


def load_adapters(model: Any, folders: Mapping[str, str], rows: AdapterRows) -> Any:
    """Put the named adapters on a model, in place; their indices follow the order, from 1.

    Args:
        model: A transformers model.
        folders: Name and PEFT folder of each adapter.
        rows: Consulted in each forward pass.

    Returns:
        The model.

    Raises:
        ExpertConfigError: An adapter is missing, or is more than low-rank updates of linear layers.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    wrapped: Any = None
    for name, folder in folders.items():
        # PEFT's names become module names, where dots separate.
        inner = f"adapter_{list(folders).index(name)}"
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, folder, adapter_name=inner)
            else:
                wrapped.load_adapter(folder, adapter_name=inner)
        except (OSError, ValueError, RuntimeError, KeyError) as exc:
            raise ExpertConfigError(
                f"adapter {name!r} at {folder!r} cannot be loaded ({_first_line(exc)}); expected a "
                "PEFT folder with adapter_config.json and adapter_model.safetensors"
            ) from exc
        _check_plain(name, wrapped.peft_config[inner])
    names = [f"adapter_{index}" for index in range(len(folders))]
    base = wrapped.get_base_model()
    for path, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            _replace(base, path, module, names, rows)
    # What is left is transformers' own model, so passes cost nothing more.
    base._hf_peft_config_loaded = False
    return base


def _replace(model: Any, path: str, layer: Any, names: list[str], rows: AdapterRows) -> None:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise ExpertConfigError(f"adapters on {path!r} ({type(base).__name__}) are not supported")
    parent, _, child = path.rpartition(".")
    updates = [
        _Update(layer.lora_A[n].weight, layer.lora_B[n].weight * layer.scaling[n])
        if n in layer.lora_A
        else None
        for n in names
    ]
    setattr(model.get_submodule(parent), child, _StackedLora(base, updates, rows))


def _check_plain(name: str, config: Any) -> None:
    odd = [
        option
        for option in ("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens")
        if getattr(config, option, None)
    ]
    if getattr(config, "bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ExpertConfigError(
            f"adapter {name!r} uses {', '.join(odd)}; the transformers engine hosts plain LoRA "
            "on linear layers: merge it into a model of its own, or use engine vllm"
        )


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]
