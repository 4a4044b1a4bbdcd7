"""What an adapter is trained on and how, and what is kept on record about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AdapterTrainingConfig", "TrainingManifest"]


class AdapterTrainingConfig(BaseModel):
    """What is trained on what, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    data: Path
    """JSONL file of {"prompt", "answer"} objects."""
    base: str = Field(min_length=1)
    """The chat model to adapt, as in an expert's config: path, hub name or ``package:``."""
    steps: int = Field(default=200, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate; adapters of rank 8 bear far more than full fine-tuning."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from its peak to zero."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps over which the learning rate rises to its peak."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    rank: int = Field(default=8, ge=1)
    """LoRA rank."""
    alpha: float = Field(default=16, gt=0)
    """LoRA scale; updates are multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers that get an adapter."""
    max_tokens: int = Field(default=256, ge=2)
    """Longer pairs are left out and counted in the manifest."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the frozen base and of the arithmetic; the adapter is trained in float32."""
    seed: int = 0
    """Seeds the adapter's start, the order of the data and dropout."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU if there is one."""


class TrainingManifest(BaseModel):
    """What ``training.json`` beside a trained adapter says about it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    base: str
    """The base model as it was named."""
    base_revision: str
    """Hash of the base model's weights, or the hub's commit."""
    data: str
    """File name of the training data."""
    data_sha256: str
    """SHA-256 of the training data."""
    pairs: int
    """Pairs that were trained on."""
    repeated_prompts: int
    """Pairs left out because their prompt had occurred."""
    too_long: int
    """Pairs left out because of ``max_tokens``."""
    hyperparameters: dict[str, Any]
    """The rest of the configuration."""
    fingerprint: str
    """Hash of everything that decides the result; a second run with the same is not needed."""
    final_loss: float
    """Mean loss per answer token over the last steps."""
    tokens: int
    """Tokens read in this training."""
    seconds: float
    """Time spent in steps, resumed parts included."""
    libraries: dict[str, str]
    """Versions of the libraries that matter."""
