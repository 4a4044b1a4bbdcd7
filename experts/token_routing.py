"""Which adapters a token goes through in a layer, and how much of each: routing inside the model.

A token router has a gate per layer. A gate scores each adapter by the layer's input, keeps the best
and shares out the layer's update among them by a softmax. Methods differ in what they score by.
Imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from experts.adapter_files import LowRank
from experts.config import TokenRouterConfig

__all__ = [
    "AffineGate",
    "ArrowGate",
    "Gate",
    "NormalisedGate",
    "SpectralGate",
    "TokenRouter",
    "read_token_router",
]

ARROW_TOP_K = 4
"""As in its paper."""

Method = Literal["arrow", "spectr", "vectors", "affine"]


class Gate(nn.Module, ABC):
    """Shares out one layer's adapters.

    Args:
        top_k: Adapters that a token goes through.
        temperature: What scores are divided by before the softmax.
    """

    def __init__(self, top_k: int, temperature: float) -> None:
        super().__init__()
        self._top_k = top_k
        self._temperature = temperature

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
    """A linear prediction of the domain.

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


@dataclass(frozen=True, slots=True, eq=False)
class TokenRouter:
    """A way to share out adapters token by token, in every layer that they change.

    Attributes:
        method: ``arrow`` and ``spectr`` look at the adapters alone. ``vectors`` (PHATGOOSE, mean
            inputs) and ``affine`` (ridge regression) need ``tensors``.
        adapters: Names of those it shares out.
        top_k: Adapters that a token goes through.
        temperature: What scores are divided by before the softmax.
        tensors: By path of the layer and name, as in ``layers.0.self_attn.q_proj.vectors``; one
            row per adapter.
    """

    method: Method
    adapters: tuple[str, ...]
    top_k: int
    temperature: float = 1.0
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def gate(self, path: str, updates: Sequence[LowRank | None]) -> Gate | None:
        """The gate of a layer, over those adapters that change it; none if it has no numbers.

        Args:
            path: Of the layer.
            updates: What each adapter does there; none for one that leaves it alone.
        """
        there = [update for update in updates if update is not None]
        chosen = [place for place, update in enumerate(updates) if update is not None]
        if not there:
            return None
        if self.method == "arrow":
            prototypes = torch.stack([update.top_direction() for update in there])
            return ArrowGate(prototypes, self.top_k, self.temperature)
        if self.method == "spectr":
            rank = max(update.down.shape[0] for update in there)
            grams = torch.zeros(len(there), rank, rank)
            for place, update in enumerate(there):
                own = update.down.shape[0]
                grams[place, :own, :own] = update.up.T @ update.up
            return SpectralGate(grams, self.top_k, self.temperature)
        names = ("vectors",) if self.method == "vectors" else ("weight", "bias")
        found = [self.tensors.get(f"{path}.{name}") for name in names]
        rows = [tensor[chosen].float() for tensor in found if tensor is not None]
        if len(rows) < len(names):
            return None
        if self.method == "vectors":
            return NormalisedGate(rows[0], self.top_k, self.temperature)
        return AffineGate(rows[0], rows[1], self.top_k, self.temperature)


def read_token_router(config: TokenRouterConfig, adapters: tuple[str, ...]) -> TokenRouter:
    """What a config says about a token router, with the gates it names.

    Args:
        config: Of the token router.
        adapters: Names of the model's.

    Raises:
        ExpertConfigError: Gates cannot be read, or were made for other adapters.
    """
    if config.method is not None:
        chosen = config.adapters or adapters
        top_k = config.top_k or (ARROW_TOP_K if config.method == "arrow" else len(chosen))
        return TokenRouter(config.method, chosen, top_k, config.temperature or 1.0)
    raise NotImplementedError
