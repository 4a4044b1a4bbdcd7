"""A mixture of low-rank experts trained on all domains together: what sharing the data would give.

Where whoever routes may see all data, this is what recycling adapters has to be compared with. It
is written as adapters and gates, so it is hosted and measured as a library with a token router is.
Imports torch.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from experts.adapter_files import LowRank, weights_hash, write_updates
from experts.errors import ExpertConfigError
from experts.finetune_config import AdapterTrainingConfig
from experts.finetune_data import pack, plan_batches, read_pairs, tokenize
from experts.library.examiner import Examiner
from experts.library.gates import write_gates
from experts.lora import AdapterUse
from experts.token_routing import GATES_MANIFEST, TokenRouter

__all__ = ["train_mixture"]

NAME = "mixture"


def train_mixture(
    config: AdapterTrainingConfig, n_experts: int, top_k: int, out: Path, *, device: str = "cpu"
) -> None:
    """Train low-rank experts and the gates that share them out token by token, from nothing.

    Each block of layers has a linear gate with a softmax over the ``top_k`` best. The loss is the
    answers' alone; no term keeps experts equally busy, since LoRAs that nobody uses cost nothing.

    Args:
        config: Data, base, and how experts are trained; ``rank`` is each expert's.
        n_experts: Number of experts.
        top_k: Experts that a token goes through in a block.
        out: Folder: adapters below ``adapters``, gates in ``gates``. A finished one is left alone.
        device: A torch device.

    References:
        The baseline "multitask MoE" of the survey (arXiv:2408.07057).

    Raises:
        ExpertConfigError: Data or base cannot be used.
    """
    if (out / "gates" / GATES_MANIFEST).exists():
        return
    names = [f"{NAME}-{number}" for number in range(n_experts)]
    folders = {name: out / "adapters" / name for name in names}
    torch.manual_seed(config.seed)
    _write_fresh(config, folders)
    # Steps smaller than bfloat16 tells apart would be lost.
    examiner = Examiner(config.base, folders, device=device, dtype="float32")
    slots, model = examiner.adapters, examiner.model
    learnt: dict[str, torch.Tensor] = {}
    for path, layer in slots.layers.items():
        block = path.rpartition(".")[0]
        if f"{block}.weight" not in learnt:
            size = layer.base.in_features
            weight = torch.randn(n_experts, size) / math.sqrt(size)
            learnt[f"{block}.weight"] = weight.to(model.device).requires_grad_()
            bias = torch.zeros(n_experts, device=model.device)
            learnt[f"{block}.bias"] = bias.requires_grad_()
    router = TokenRouter("affine", tuple(names), top_k, 1.0, learnt)
    slots.add_router(NAME, router.adapters, router.gate)
    matrices = [part for layer in slots.layers.values() for part in (layer.down, layer.up)]
    for matrix in matrices:
        matrix.requires_grad_()
    pairs, _ = read_pairs(config.data)
    read = [p for p in tokenize(pairs, examiner.tokenizer) if p.length <= config.max_tokens]
    if not read:
        raise ExpertConfigError(f"no pair has at most max_tokens={config.max_tokens} tokens")
    optimizer = torch.optim.AdamW(
        [*matrices, *learnt.values()], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    plan = plan_batches([p.length for p in read], config.batch_size, config.steps, config.seed)
    slots.set_rows([AdapterUse(router=NAME)])
    with tqdm(plan, desc=NAME, unit="step") as bar:
        for batch in bar:
            packed = pack([read[index] for index in batch])
            half = config.precision == "bfloat16"
            with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
                logits = model(
                    input_ids=packed.input_ids.to(model.device),
                    position_ids=packed.position_ids.to(model.device),
                    attention_mask=packed.attention_mask.to(model.device),
                    logits_to_keep=packed.predicting.to(model.device),
                    use_cache=False,
                ).logits[0]
            loss = functional.cross_entropy(logits.float(), packed.labels.to(model.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(matrices, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    for number, name in enumerate(names, 1):
        updates = {
            path: LowRank(layer.down[number].detach().T, layer.up[number].detach().T)
            for path, layer in slots.layers.items()
        }
        write_updates(folders[name], updates, config.base)
    write_gates(
        out / "gates", "multitask", config.base,
        {name: weights_hash(folder) for name, folder in folders.items()},
        {name: tensor.detach().cpu() for name, tensor in learnt.items()}, top_k=top_k,
    )  # fmt: skip


def _write_fresh(config: AdapterTrainingConfig, folders: dict[str, Path]) -> None:
    """Experts that change nothing yet, each with a start of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from experts.weights import resolve_model

    model = AutoModelForCausalLM.from_pretrained(str(resolve_model(config.base)))
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.rank, target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    for folder in folders.values():
        adapted = get_peft_model(model, settings)
        adapted.save_pretrained(str(folder))
        model = adapted.unload()
