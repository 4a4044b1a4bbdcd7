"""A mixture of low-rank experts trained on all domains together: what sharing the data would give.

Where whoever routes may see all data, this is what recycling adapters has to be compared with. It
is written as adapters and gates, so it is hosted and measured as a library with a token router is.
Imports torch.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experts.adapter_files import LowRank, weights_hash, write_updates
from experts.errors import ExpertConfigError
from experts.finetune import train
from experts.finetune_config import AdapterTrainingConfig, TrainingManifest
from experts.library.examiner import Examiner
from experts.library.gates import write_gates
from experts.library.upcycling import dense
from experts.lora import AdapterUse
from experts.token_routing import TokenRouter

__all__ = ["train_mixture"]

NAME = "mixture"


def train_mixture(
    config: AdapterTrainingConfig, n_experts: int, top_k: int, out: Path
) -> TrainingManifest:
    """Train low-rank experts and the gates that share them out token by token, from nothing.

    Each block of layers has a linear gate with a softmax over the ``top_k`` best. The loss is the
    answers' alone; no term keeps experts equally busy, since LoRAs that nobody uses cost nothing.
    Resumes as ``experts.finetune.train`` does.

    Args:
        config: Data, base, and how experts are trained; ``rank`` is each expert's. ``alpha`` and
            ``dropout`` mean nothing here, as experts learn their scale.
        n_experts: Number of experts.
        top_k: Experts that a token goes through in a block.
        out: Folder: adapters below ``adapters``, gates in ``gates``.

    References:
        The baseline "multitask MoE" of the survey (arXiv:2408.07057).

    Raises:
        ExpertConfigError: Data or base cannot be used, there are fewer experts than a token goes
            through, or the folder belongs to another training.
    """
    if top_k > n_experts:
        raise ExpertConfigError(f"a token cannot go through {top_k} of {n_experts} experts")
    return train(
        config, out, lambda device: _Mixture(config, n_experts, top_k, device),
        options={"n_experts": n_experts, "top_k": top_k},
    )  # fmt: skip


class _Mixture:
    """Experts with their gates; see ``experts.finetune.Trainee``."""

    def __init__(
        self, config: AdapterTrainingConfig, n_experts: int, top_k: int, device: torch.device
    ) -> None:
        self._base, self._top_k = config.base, top_k
        self._names = [f"{NAME}-{number}" for number in range(n_experts)]
        torch.manual_seed(config.seed)
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: Path(scratch) / name for name in self._names}
            _write_fresh(config, folders)
            # Steps smaller than bfloat16 tells apart would be lost.
            examiner = Examiner(config.base, folders, device=str(device), dtype="float32")
            self.model, self._slots = examiner.model, examiner.adapters
            self._gates: dict[str, nn.Parameter] = {}
            for path, layer in self._slots.layers.items():
                block = path.rpartition(".")[0]
                if f"{block}.weight" not in self._gates:
                    size = layer.base.in_features
                    weight = torch.randn(n_experts, size, device=device) / math.sqrt(size)
                    self._gates[f"{block}.weight"] = nn.Parameter(weight)
                    self._gates[f"{block}.bias"] = nn.Parameter(
                        torch.zeros(n_experts, device=device)
                    )
            router = TokenRouter("affine", tuple(self._names), top_k, 1.0, self._gates)
            self._slots.add_router(NAME, router.adapters, router.gate)
        self.parameters: dict[str, nn.Parameter] = dict(self._gates)
        for path, layer in self._slots.layers.items():
            for part in ("down", "up"):
                matrices: Any = getattr(layer, part)
                self.parameters[f"{path}.{part}"] = matrices.requires_grad_()
        self._slots.set_rows([AdapterUse(router=NAME)])

    def write(self, folder: Path) -> None:
        """See ``Trainee``."""
        adapters = {name: folder / "adapters" / name for name in self._names}
        for number, name in enumerate(self._names, 1):
            updates = {
                path: LowRank(layer.down[number].detach().T, layer.up[number].detach().T)
                for path, layer in self._slots.layers.items()
            }
            write_updates(adapters[name], updates, self._base)
        write_gates(
            folder / "gates", "multitask", self._base,
            {name: weights_hash(path) for name, path in adapters.items()},
            {name: tensor.detach().cpu() for name, tensor in self._gates.items()},
            top_k=self._top_k,
        )  # fmt: skip


def _write_fresh(config: AdapterTrainingConfig, folders: dict[str, Path]) -> None:
    """Experts that change nothing yet, each with a start of its own."""
    from peft import LoraConfig, get_peft_model

    model = dense(config.base, None)
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.rank, target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    for folder in folders.values():
        adapted = get_peft_model(model, settings)
        adapted.save_pretrained(str(folder))
        model = adapted.unload()
