"""What a collaboration is trained on, and how, and what is kept on record about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.latent.config import MemberConfig
from routers.base import RouterError
from routers.encoders import DEFAULT_ENCODER
from routers.params import parse_settings

__all__ = ["LatentTrainingConfig", "LatentTrainingManifest", "read_config"]


class LatentTrainingConfig(BaseModel):
    """What is trained on what, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    members: list[MemberConfig] = Field(min_length=1)
    """The experts, frozen."""
    data: Path
    """JSONL file of {"prompt", "answer"} objects."""
    validation: Annotated[float, Field(gt=0, lt=1)] | Path = 0.1
    """What tells when to stop: another such file, or the share of the prompts that is held out."""
    test: Path | None = None
    """A third such file, measured before training and with what was kept; it decides nothing."""
    table: Path | None = None
    """Outcome table whose models are the members; the router learns from its training rows."""
    writer: str | None = None
    """The member that always writes; by default the one the router gives the highest score."""
    active: int = Field(default=2, ge=1)
    """How many members take part in a text, the one that writes among them."""
    n_stacks: int = Field(default=4, ge=1)
    """Into how many stacks of layers members are cut; they meet between stacks."""
    width: int = Field(default=256, ge=1)
    """Size of the space in which they meet; as large as the hidden states of adapters of one base,
    it lets all pass that they think."""
    n_heads: int = Field(default=8, ge=1)
    """Attention heads in it; a divisor of ``width``."""
    encoder: str = DEFAULT_ENCODER
    """What the router reads prompts with."""
    gates: Literal["learned", "uniform"] = "learned"
    """Whether scores decide how much each active member counts, or all count alike."""
    peers: Literal["routed", "random", "same"] = "routed"
    """Whom the writer listens to: the highest scores, anybody, or copies of itself."""
    entropy: float = Field(default=0.01, ge=0)
    """Weight of the loss that keeps the router from favouring anybody."""
    balance: float = Field(default=0.01, ge=0)
    """Weight of the loss that has the router choose all alike."""
    correctness: float = Field(default=1.0, ge=0)
    """Weight of the router's loss on the outcome table."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the interactions."""
    gain_learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate of gains: one number each, which says how far the writer goes over to
    the others, and has to go all the way while matrices change a little."""
    router_learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the router, which learns from the table before and from all after."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's weight decay of matrices."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on from its peak: down to zero, or not at all."""
    warmup: int = Field(default=20, ge=0)
    """Steps over which it rises to its peak."""
    batch_size: int = Field(default=8, ge=1)
    """Texts that are computed together."""
    accumulation: int = Field(default=1, ge=1)
    """Batches per step."""
    max_steps: int = Field(default=500, ge=1)
    """Optimiser steps at most."""
    evaluate_every: int = Field(default=50, ge=1)
    """Steps between measurements of the held-out loss."""
    patience: int = Field(default=5, ge=1)
    """Training stops after so many measurements without a better one."""
    max_tokens: int = Field(default=512, ge=2)
    """Pairs that are longer for any member are left out and counted in the manifest."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the experts; what is learnt is always float32."""
    cache: Literal["memory", "disk", "none"] = "memory"
    """Where the frozen members' hidden states are kept; ``disk`` is ``$COLLEGIUM_CACHE``, for
    other trainings too, and ``none`` computes them in every step."""
    seed: int = 0
    """Seeds initial values, order, dropout and random peers."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes a GPU if there is one."""

    @property
    def has_router(self) -> bool:
        """Whether there is a router to learn."""
        return self.table is not None or self._asks_router

    @property
    def _asks_router(self) -> bool:
        if self.writer is None:
            return True
        chooses = self.peers == "routed" and self.active < len(self.members)
        return self.active > 1 and (chooses or self.gates == "learned")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise ValueError("members: two have the same name")
        if self.writer is not None and self.writer not in names:
            raise ValueError(f"writer: {self.writer!r} is none of the members {', '.join(names)}")
        if self.width % self.n_heads:
            raise ValueError(f"width: {self.width} cannot be divided into {self.n_heads} heads")
        if self.peers == "same":
            if self.writer is None or self.table is not None:
                raise ValueError("peers: copies of the writer need a named writer, and no table")
        elif self.active > len(names):
            raise ValueError(f"active: {self.active}, but there are {len(names)} members")
        through_gates = self.gates == "learned" and self.active > 1 and self.n_stacks > 1
        by_table = self.table is not None and self.correctness > 0
        if self._asks_router and not through_gates and not by_table:
            raise ValueError(
                "nothing would teach the router: give a table, or a writer and uniform gates over "
                "all members"
            )
        if self.n_stacks == 1 and not by_table:
            raise ValueError(
                "nothing would be learnt: members of one stack never meet; set n_stacks to 2 or "
                "more, or give a table for the router"
            )
        return self


class LatentTrainingManifest(BaseModel):
    """What ``latent.json`` says under ``training``."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    fingerprint: str
    """Hash of everything that decides the result; a second run with the same is not needed."""
    hyperparameters: dict[str, Any]
    """The configuration without files and device."""
    data: str
    """File name of the training data."""
    data_sha256: str
    """SHA-256 of the training data."""
    pairs: int
    """Pairs that were trained on."""
    held_out: int
    """Pairs that told when to stop."""
    repeated_prompts: int
    """Pairs left out because their prompt had occurred."""
    too_long: int
    """Pairs left out because of ``max_tokens``."""
    parameters: int
    """Trained parameters of interactions."""
    router_parameters: int
    """Trained parameters of the router."""
    steps: int
    """Steps that were done."""
    best_step: int
    """The step whose parameters were kept; 0 if training never made anything better."""
    loss_before: float
    """Held-out loss per answer token before training: of the writer alone."""
    loss: float
    """Held-out loss per answer token of what was kept."""
    test_loss_before: float | None
    """The same of the test pairs before training; none without any."""
    test_loss: float | None
    """The same of the test pairs with what was kept."""
    history: list[tuple[int, float]]
    """Held-out loss after some steps."""
    tokens: int
    """Tokens of writers read in training."""
    seconds: float
    """Time spent in steps, resumed parts included; neither measuring nor reading states."""
    libraries: dict[str, str]
    """Versions of the libraries that matter."""


def read_config(path: Path, settings: Sequence[str] = ()) -> LatentTrainingConfig:
    """A configuration from a YAML file.

    Args:
        path: The file.
        settings: ``KEY=VALUE`` texts that go before what the file says.

    Raises:
        RouterError: The file or a setting is not as it must be.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RouterError(f"cannot read {path}: {reason}") from error
    if not isinstance(found, dict):
        raise RouterError(f"{path} must hold keys and values")
    try:
        return LatentTrainingConfig.model_validate({**found, **parse_settings(settings)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise RouterError(f"{path}: {where}: {message}" if where else f"{path}: {message}") from (
            error
        )
