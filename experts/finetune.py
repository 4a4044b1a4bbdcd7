"""LoRA fine-tuning of a chat model on pairs of prompt and answer.

Runs on a CPU or a GPU. An interrupted training goes on from its last checkpoint with the
same result as an uninterrupted one. Knows nothing of tasks, routing or serving.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from experts.checkpoints import load_checkpoint, move_into, save_checkpoint
from experts.errors import ExpertConfigError
from experts.finetune_config import AdapterTrainingConfig, TrainingManifest
from experts.finetune_data import TokenPair, pack, plan_batches, read_pairs, tokenize
from experts.weights import model_revision, resolve_model

if TYPE_CHECKING:
    import torch

__all__ = ["AdapterTrainingConfig", "Trainee", "TrainingManifest", "train", "train_adapter"]

_LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def train_adapter(
    config: AdapterTrainingConfig,
    out: Path,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingManifest:
    """Train a LoRA adapter and write it to a folder in PEFT's format; see ``train``."""
    return train(config, out, lambda device: _Adapter(config, device), on_step=on_step)


class Trainee(Protocol):
    """What learns.

    Attributes:
        model: Predicts tokens.
        parameters: Those of it that learn, by name.
    """

    model: Any
    parameters: dict[str, torch.nn.Parameter]

    def write(self, folder: Path) -> None:
        """Write what was learnt into an empty folder."""
        ...


def train(
    config: AdapterTrainingConfig,
    out: Path,
    build: Callable[[torch.device], Trainee],
    *,
    options: Mapping[str, Any] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingManifest:
    """Train on pairs of prompt and answer and write what was learnt to a folder.

    The loss covers the answer and its end-of-turn token, not the prompt. Calling again with
    the same configuration and folder resumes an interrupted training, or returns the manifest
    of a finished one.

    Args:
        config: What is trained on what, and how.
        out: Folder for what is learnt, its manifest ``training.json`` and checkpoints.
        build: Makes what learns, on a device.
        options: What else decides the result.
        on_step: Called with the number of finished steps and the loss after every step.

    Raises:
        ExpertConfigError: If the data or the base cannot be used, or the folder belongs to
            another training.
    """
    pairs, repeated = read_pairs(config.data)
    base = resolve_model(config.base)
    data_sha256 = hashlib.sha256(config.data.read_bytes()).hexdigest()
    base_revision = model_revision(base)
    choices = config.model_dump(mode="json", exclude={"data", "base", "device"}) | dict(
        options or {}
    )
    fingerprint = _fingerprint(choices, data_sha256, base_revision)
    finished = _finished(out, fingerprint)
    if finished:
        return finished
    from transformers import AutoTokenizer

    encoded = tokenize(pairs, AutoTokenizer.from_pretrained(base))
    fitting = [pair for pair in encoded if pair.length <= config.max_tokens]
    if not fitting:
        raise ExpertConfigError(f"no pair has at most max_tokens={config.max_tokens} tokens")
    training = _Training(config, fitting, build(_device(config.device)), out, fingerprint)
    training.run(on_step)
    manifest = TrainingManifest(
        base=config.base,
        base_revision=base_revision,
        data=config.data.name,
        data_sha256=data_sha256,
        pairs=len(fitting),
        repeated_prompts=repeated,
        too_long=len(encoded) - len(fitting),
        hyperparameters=choices,
        fingerprint=fingerprint,
        final_loss=round(training.recent_loss, 4),
        tokens=training.tokens,
        seconds=round(training.seconds, 1),
        libraries={name: version(name) for name in _LIBRARIES},
    )
    training.save(manifest)
    return manifest


def _fingerprint(choices: Mapping[str, Any], data_sha256: str, base_revision: str) -> str:
    # How often checkpoints are written does not decide what is learnt.
    decisive = {name: value for name, value in choices.items() if name != "checkpoint_every"}
    facts = json.dumps([decisive, data_sha256, base_revision], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()


def _finished(out: Path, fingerprint: str) -> TrainingManifest | None:
    try:
        manifest = TrainingManifest.model_validate_json((out / "training.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ExpertConfigError(f"{out}/training.json is not a training manifest") from error
    if manifest.fingerprint != fingerprint:
        raise ExpertConfigError(
            f"{out} holds the result of another training; choose another folder or delete it"
        )
    return manifest


class _Training:
    """The state of one training: what learns, optimiser, position, totals."""

    def __init__(
        self,
        config: AdapterTrainingConfig,
        pairs: Sequence[TokenPair],
        trainee: Trainee,
        out: Path,
        fingerprint: str,
    ) -> None:
        import torch

        self.config, self.pairs, self.out, self.fingerprint = config, pairs, out, fingerprint
        self.step, self.tokens, self.seconds, self.recent_loss = 0, 0, 0.0, math.nan
        self.trainee, self.parameters = trainee, trainee.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.checkpoint = out / "checkpoint.safetensors"

    def run(self, on_step: Callable[[int, float], None] | None) -> None:
        """Go through all steps that are left."""
        self._resume()
        config = self.config
        lengths = [pair.length for pair in self.pairs]
        plan = plan_batches(lengths, config.batch_size, config.steps, config.seed)
        with tqdm(total=config.steps, initial=self.step, unit="step", desc=self.out.name) as bar:
            for batch in plan[self.step :]:
                started, tokens = time.monotonic(), self.tokens
                loss = self._train_step([self.pairs[index] for index in batch])
                elapsed = time.monotonic() - started
                self.seconds += elapsed
                self.step += 1
                first = math.isnan(self.recent_loss)
                self.recent_loss = loss if first else 0.9 * self.recent_loss + 0.1 * loss
                bar.set_postfix(
                    loss=f"{self.recent_loss:.3f}",
                    tokens_per_s=round((self.tokens - tokens) / elapsed),
                )
                bar.update()
                if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                    self._save_checkpoint()
                if on_step:
                    on_step(self.step, loss)

    def _train_step(self, pairs: Sequence[TokenPair]) -> float:
        import torch

        config, model = self.config, self.trainee.model
        # Seeding each step makes dropout independent of where a training was resumed.
        torch.manual_seed(config.seed + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(self.step, config)
        batch = pack(pairs)
        half = config.precision == "bfloat16"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            logits = batch.answer_logits(model)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels.to(logits.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += batch.input_ids.numel()
        return float(loss.detach())

    def _resume(self) -> None:
        state = load_checkpoint(self.checkpoint, self.fingerprint)
        if state is None:
            return
        self.step, self.tokens = state.step, state.tokens
        self.seconds, self.recent_loss = state.seconds, state.recent_loss
        state.restore(self.parameters, self.optimizer)

    def _save_checkpoint(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        save_checkpoint(
            self.checkpoint, self.parameters, self.optimizer,
            fingerprint=self.fingerprint, step=self.step, tokens=self.tokens,
            seconds=self.seconds, recent_loss=self.recent_loss,
        )  # fmt: skip

    def save(self, manifest: TrainingManifest) -> None:
        """Write what was learnt and its manifest, then drop the checkpoint."""

        def write(folder: Path) -> None:
            self.trainee.write(folder)
            (folder / "training.json").write_text(manifest.model_dump_json(indent=2) + "\n")

        move_into(self.out, write, last="training.json")
        self.checkpoint.unlink(missing_ok=True)


def _rate(step: int, config: AdapterTrainingConfig) -> float:
    """Return the share of the peak learning rate at a step, in (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class _Adapter:
    """A LoRA adapter; see ``Trainee``."""

    def __init__(self, config: AdapterTrainingConfig, device: torch.device) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        self._base = config.base
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(config.base),
            dtype=getattr(torch, config.precision),
            attn_implementation="sdpa",
        )
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        )
        try:
            adapted = get_peft_model(model, lora)
        except ValueError as error:
            raise ExpertConfigError(f"cannot adapt {config.base}: {error}") from error
        self.model: Any = adapted.train().to(device)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def write(self, folder: Path) -> None:
        """See ``Trainee``."""
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        weights = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in get_peft_model_state_dict(
                self.model, save_embedding_layers=False
            ).items()
        }
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = self.model.peft_config["default"]
        # A path in the cache would mean nothing on another machine; the reference does.
        settings.base_model_name_or_path = self._base
        settings.inference_mode = True
        # PEFT keeps a set, which it would write in another order each time.
        settings.target_modules = sorted(settings.target_modules)
        settings.save_pretrained(folder)
