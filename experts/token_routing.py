"""Which adapters a token goes through in a layer, and how much of each: routing inside the model.

A token router has a gate per layer. A gate scores each adapter by the layer's input, keeps the best
and shares out the layer's update among them by a softmax. Methods differ in what they score by.
Imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional

from experts.adapter_files import LowRank, weights_hash
from experts.config import TokenRouterConfig
from experts.errors import ExpertConfigError
from experts.paths import resolve_path

__all__ = [
    "AffineGate",
    "ArrowGate",
    "Gate",
    "GatesManifest",
    "NormalisedGate",
    "SpectralGate",
    "TokenRouter",
    "read_gates",
    "read_token_router",
]

GATES_MANIFEST, GATES = "token_router.json", "gates.safetensors"
ARROW_TOP_K = 4
"""As in its paper."""

Method = Literal["arrow", "spectr", "vectors", "affine"]


class Gate(nn.Module, ABC):
    """Shares out one layer's adapters.

    Args:
        top_k: Adapters that a token goes through.
        temperature: What scores are divided by before the softmax.

    Attributes:
        absent: Which adapters leave the layer alone, shape (n_adapters,) of booleans; none if all
            change it. They get no share.
    """

    absent: torch.Tensor | None

    def __init__(self, top_k: int, temperature: float) -> None:
        super().__init__()
        self._top_k = top_k
        self._temperature = temperature
        self.register_buffer("absent", None)

    @abstractmethod
    def scores(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """How well each adapter fits each token.

        Args:
            x: The layer's input, shape (n_rows, n_tokens, in_features), float32.
            hidden: The input behind each adapter's ``A``, shape (n_rows, n_tokens, n_adapters,
                rank), float32.

        Returns:
            Shape (n_rows, n_tokens, n_adapters).
        """

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Shares that sum to 1, zero for all but the best; shapes as in ``scores``."""
        scores = self.scores(x, hidden) / self._temperature
        if self.absent is not None:
            scores = scores.masked_fill(self.absent, -torch.inf)
        kept, places = scores.topk(min(self._top_k, scores.shape[-1]), dim=-1)
        return torch.zeros_like(scores).scatter(-1, places, kept.softmax(-1))


class ArrowGate(Gate):
    """The length of the input along the direction that each adapter answers most to.

    Args:
        prototypes: Top right singular vectors of the adapters' updates, shape (n_adapters,
            in_features).
        top_k: As in ``Gate``.
        temperature: As in ``Gate``.

    References:
        Arrow (arXiv:2405.11157), as PEFT has it; singular vectors are exact, not iterated.
    """

    prototypes: torch.Tensor

    def __init__(self, prototypes: torch.Tensor, top_k: int, temperature: float) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("prototypes", prototypes)

    def scores(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``; a singular vector's sign is arbitrary, so the score has none."""
        return (x @ self.prototypes.T).abs()


class SpectralGate(Gate):
    """The length of what each adapter would add.

    Args:
        grams: ``B.T B`` of the adapters, scales included; shape (n_adapters, rank, rank).
        top_k: As in ``Gate``.
        temperature: As in ``Gate``.

    References:
        SpectR (arXiv:2504.03454). Its ``|S V.T x|`` is ``|B A x|``, as the left singular vectors
        keep lengths; no decomposition is needed.
    """

    grams: torch.Tensor

    def __init__(self, grams: torch.Tensor, top_k: int, temperature: float) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("grams", grams)

    def scores(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``."""
        rank = self.grams.shape[-1]
        inner = hidden[..., :rank]
        squares = torch.einsum("btnr,nrs,btns->btn", inner, self.grams, inner)
        return squares.clamp(min=0).sqrt()


class NormalisedGate(Gate):
    """How alike the input and each adapter's vector are, after a LayerNorm without parameters.

    Args:
        vectors: Shape (n_adapters, in_features).
        top_k: As in ``Gate``.
        temperature: As in ``Gate``.

    References:
        PHATGOOSE (arXiv:2402.05859) for vectors that were trained, each with its adapter frozen;
        its baseline for mean inputs.
    """

    vectors: torch.Tensor

    def __init__(self, vectors: torch.Tensor, top_k: int, temperature: float) -> None:
        super().__init__(top_k, temperature)
        size = vectors.shape[-1]
        self.register_buffer("vectors", functional.layer_norm(vectors, (size,)) / size**0.5)

    def scores(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``."""
        return functional.layer_norm(x, x.shape[-1:]) @ self.vectors.T


class AffineGate(Gate):
    """A linear prediction of the domain, for all layers of a block.

    Args:
        weight: Shape (n_adapters, in_features).
        bias: Shape (n_adapters,).
        top_k: As in ``Gate``.
        temperature: As in ``Gate``.

    References:
        DUME's gates (arXiv:2603.29765), here before adapters.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, top_k: int, temperature: float
    ) -> None:
        super().__init__(top_k, temperature)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def scores(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``."""
        return functional.linear(x, self.weight, self.bias)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``; later layers of the block have their shares from here."""
        self.last = super().forward(x, hidden)
        return self.last


class SameGate(nn.Module):
    """The shares that another layer of the block has found in this pass.

    Args:
        first: The gate of the block's first layer.
    """

    def __init__(self, first: AffineGate) -> None:
        super().__init__()
        self._first = first

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Shares, shape as in ``Gate``."""
        return self._first.last


@dataclass(frozen=True, slots=True, eq=False)
class TokenRouter:
    """A way to share out adapters token by token, in every layer that they change.

    Attributes:
        method: ``arrow`` and ``spectr`` look at the adapters alone. ``vectors`` (PHATGOOSE, mean
            inputs) and ``affine`` (ridge regression) need ``tensors``.
        adapters: Names of those it shares out.
        top_k: Adapters that a token goes through.
        temperature: What scores are divided by before the softmax.
        tensors: ``<layer>.vectors``, shape (n_adapters, in_features), for ``vectors``;
            ``<block>.weight`` of the same shape and ``<block>.bias``, (n_adapters,), for
            ``affine``.
    """

    method: Method
    adapters: tuple[str, ...]
    top_k: int
    temperature: float = 1.0
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _firsts: dict[str, AffineGate] = field(default_factory=dict)

    def gate(self, path: str, updates: Sequence[LowRank | None]) -> nn.Module | None:
        """The gate of a layer; none if no adapter changes it, or nothing was learnt of it.

        Layers have to be asked for in the order in which they run: of a block the first one
        decides, where gates are learnt per block.

        Args:
            path: Of the layer.
            updates: What each adapter does there; none for one that leaves it alone.
        """
        there = [update for update in updates if update is not None]
        if not there:
            return None
        gate: Gate | None
        if self.method == "affine":
            return self._of_block(path.rpartition(".")[0])
        if self.method == "arrow":
            prototypes = torch.zeros(len(updates), there[0].down.shape[1])
            for place, update in enumerate(updates):
                if update is not None:
                    prototypes[place] = update.top_direction()
            gate = ArrowGate(prototypes, self.top_k, self.temperature)
        elif self.method == "spectr":
            rank = max(update.down.shape[0] for update in there)
            grams = torch.zeros(len(updates), rank, rank)
            for place, update in enumerate(updates):
                if update is not None:
                    own = update.down.shape[0]
                    grams[place, :own, :own] = update.up.T @ update.up
            gate = SpectralGate(grams, self.top_k, self.temperature)
        else:
            vectors = self.tensors.get(f"{path}.vectors")
            if vectors is None:
                return None
            gate = NormalisedGate(vectors.float(), self.top_k, self.temperature)
        if len(there) < len(updates):
            gate.absent = torch.tensor([update is None for update in updates])
        return gate

    def _of_block(self, block: str) -> nn.Module | None:
        first = self._firsts.get(block)
        if first is not None:
            return SameGate(first)
        weight, bias = (self.tensors.get(f"{block}.{name}") for name in ("weight", "bias"))
        if weight is None or bias is None:
            return None
        gate = AffineGate(weight.float(), bias.float(), self.top_k, self.temperature)
        self._firsts[block] = gate
        return gate


class GatesManifest(BaseModel):
    """What ``token_router.json`` says of a folder of gates; the numbers are in safetensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    learnt_by: str
    """How they were learnt."""
    seed: int = 0
    """Of the training, where they were trained."""
    method: Literal["vectors", "affine"]
    """What is done with the numbers."""
    base: str
    """The adapters' base model."""
    adapters: dict[str, str]
    """Name and hash of the weights of each adapter, in the order of the rows."""
    top_k: int = Field(ge=1)
    """Adapters that a token goes through."""
    temperature: float = Field(gt=0)
    """What scores are divided by before the softmax."""


def read_gates(folder: Path) -> tuple[GatesManifest, dict[str, torch.Tensor]]:
    """What a folder of gates holds.

    Raises:
        ExpertConfigError: It holds none, or damaged ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        manifest = GatesManifest.model_validate_json((folder / GATES_MANIFEST).read_text())
        return manifest, load_file(folder / GATES)
    except FileNotFoundError as error:
        raise ExpertConfigError(
            f"{folder} holds no gates; 'collegium library gates' writes them"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ExpertConfigError(f"the gates in {folder} cannot be read: {error}") from error


def read_token_router(config: TokenRouterConfig, adapters: Mapping[str, Path]) -> TokenRouter:
    """What a config says about a token router, with the gates it names.

    Args:
        config: Of the token router.
        adapters: Name and folder of each of the model's.

    Raises:
        ExpertConfigError: Gates cannot be read, or were made for other adapters.
    """
    if config.method is not None:
        chosen = config.adapters or tuple(adapters)
        top_k = config.top_k or (ARROW_TOP_K if config.method == "arrow" else len(chosen))
        return TokenRouter(config.method, chosen, top_k, config.temperature or 1.0)
    assert config.gates is not None
    manifest, tensors = read_gates(resolve_path(config.gates))
    known = list(manifest.adapters)
    chosen = config.adapters or tuple(known)
    for name in chosen:
        folder = adapters.get(name)
        if name not in known or folder is None:
            raise ExpertConfigError(
                f"token router {config.name!r}: its gates are for {', '.join(map(repr, known))}, "
                f"the model has {', '.join(map(repr, adapters)) or 'no adapters'}; {name!r} is not "
                "in both: make them again, or name those that are under 'adapters'"
            )
        if weights_hash(folder) != manifest.adapters[name]:
            raise ExpertConfigError(
                f"token router {config.name!r}: adapter {name!r} is another than the gates "
                "were made for; make them again"
            )
    rows = [known.index(name) for name in chosen]
    return TokenRouter(
        manifest.method,
        chosen,
        config.top_k or manifest.top_k,
        config.temperature or manifest.temperature,
        {name: tensor[rows] for name, tensor in tensors.items()},
    )
