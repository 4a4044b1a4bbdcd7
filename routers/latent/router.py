"""A small network from a prompt's vector to every expert's quality: it leads collaborations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.calibration import sigmoid
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.params import check_count, check_number
from routers.torch_training import GradientRouter, masked_bce

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from routers.outcomes import OutcomeTable

__all__ = ["LatentRouter"]

INITIAL_SPREAD = 0.02


class LatentRouter(GradientRouter):
    """P(expert right) = sigmoid of its score, which a perceptron with two hidden layers gives.

    The softmax of the scores of the active experts is how much the one that writes listens to each.
    ``collegium train latent`` trains it with a collaboration, through these gates and, if there is
    an outcome table, on who was right; ``fit`` does the latter alone.

    Args:
        encoder: An encoder's name or an encoder.
        hidden: Width of the hidden layers.
        dropout: Share of their outputs that is left out in training.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most so many passes.
        random_state: Seed of initial values, held-out rows, dropout and order.

    Attributes:
        first_, second_: Hidden layers, shape (hidden, width) and (hidden, hidden).
        last_: Hidden layer to scores, shape (n_models, hidden).
        first_bias_, second_bias_, last_bias_: Their biases.

    References:
        "Mixture of Thoughts" (arXiv:2509.21164), whose router it is. Departs from it in learning
        who is right, and from the loss of what is written: there the scores multiply nothing.
    """

    method = "latent"
    arrays: ClassVar = {
        "first": ("hidden", "width"),
        "first_bias": ("hidden",),
        "second": ("hidden", "hidden"),
        "second_bias": ("hidden",),
        "last": ("models", "hidden"),
        "last_bias": ("models",),
    }
    first_: NDArray[np.float32]
    first_bias_: NDArray[np.float32]
    second_: NDArray[np.float32]
    second_bias_: NDArray[np.float32]
    last_: NDArray[np.float32]
    last_bias_: NDArray[np.float32]

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        hidden: int = 256,
        dropout: float = 0.1,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        epochs: int = 40,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.hidden = hidden
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "hidden", self.hidden, 1)
        check_number(self, "dropout", self.dropout, 0, 0.9)

    def network(self, n_models: int) -> torch.nn.Sequential:
        """A new network, drawn from torch's random state: vectors to scores of all models."""
        from torch import nn

        width = self._encoder().width
        last = nn.Linear(self.hidden, n_models)
        nn.init.normal_(last.weight, std=INITIAL_SPREAD)
        nn.init.zeros_(last.bias)
        return nn.Sequential(
            nn.Linear(width, self.hidden), nn.ReLU(), nn.Dropout(self.dropout),
            nn.Linear(self.hidden, self.hidden), nn.ReLU(), nn.Dropout(self.dropout),
            last,
        )  # fmt: skip

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """What the network reads of texts, shape (n_texts, width)."""
        import numpy as np
        import torch

        return torch.from_numpy(np.asarray(self._encode_all(texts), np.float32))

    def teach(
        self, network: torch.nn.Sequential, vectors: torch.Tensor, scores: torch.Tensor
    ) -> None:
        """Teach a network who is right, until that gets no better on held-out rows.

        Args:
            network: What ``network`` made.
            vectors: What it reads, shape (n_rows, width).
            scores: Shape (n_rows, n_models), NaN where missing.
        """

        def loss(part: torch.Tensor) -> torch.Tensor:
            return masked_bce(network(vectors[part]), scores[part])

        self._check_params()
        self._train(network, loss, len(vectors))

    def adopt(
        self,
        network: torch.nn.Sequential,
        models: Sequence[str],
        metrics: dict[str, Any],
        *,
        table: OutcomeTable | None = None,
        split: str | None = None,
    ) -> None:
        """Become the router of a network that was trained elsewhere.

        Args:
            network: What ``network`` made, trained.
            models: What its scores are of.
            metrics: What was measured in training.
            table: The outcome table it learnt from.
            split: The split of that table.
        """
        self._check_params()
        self.models_, self.categories_, self.updates_ = list(models), None, []
        self.metrics_ = metrics
        if table is not None and split is not None:
            self.measured = table.measured(split, models)
            self._table_sha256, self._split = table.sha256, split
        self._take(network)

    def _learn(self, rows: TrainingRows) -> None:
        vectors, scores = self._tensors(rows)
        network = self.network(len(rows.models))
        self.teach(network, vectors, scores)
        self._take(network)

    def _take(self, network: torch.nn.Sequential) -> None:
        from torch import nn

        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        for name, layer in zip(("first", "second", "last"), layers, strict=True):
            for suffix, tensor in (("_", layer.weight), ("_bias_", layer.bias)):
                setattr(self, f"{name}{suffix}", tensor.detach().cpu().numpy().copy())

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        inside = given
        for weights, biases in (
            (self.first_, self.first_bias_),
            (self.second_, self.second_bias_),
        ):
            inside = np.maximum((weights * inside).sum(axis=1) + biases, 0)
        return sigmoid((self.last_ * inside).sum(axis=1) + self.last_bias_), Explanation()
