"""Matrix factorisation: models and queries as vectors whose product tells who would be right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.params import check_count, check_number
from routers.torch_training import GradientRouter, masked_bce

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MFRouter"]


class MFRouter(GradientRouter):
    """P(model right) = sigmoid of the product of a model's vector and a projected query.

    Trained with binary cross-entropy over the cells that were run; a share of the rows tells when
    to stop. A prediction is two small products.

    Args:
        encoder: An encoder's name or an encoder.
        latent: Length of the models' vectors.
        noise: Standard deviation of the noise on query vectors in training, times their length.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most so many passes.
        random_state: Seed of initial values and order.

    Attributes:
        projection_: Query to latent space, shape (latent, width of the encoder).
        vectors_: Models in it, shape (n_models, latent).
        biases_: Shape (n_models,).

    References:
        Ong et al., "RouteLLM" (arXiv:2406.18665), matrix factorisation, and EmbedLLM, whose noise
        on queries is kept. Departs from them in serving any number of models, a bias per model
        that starts at its mean score, and one product instead of a final layer over elementwise
        products, which it can be folded into.
    """

    method = "mf"
    arrays: ClassVar = {
        "projection": ("latent", "width"),
        "vectors": ("models", "latent"),
        "biases": ("models",),
    }

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        latent: int = 64,
        noise: float = 0.05,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-2,
        epochs: int = 60,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.latent = latent
        self.noise = noise
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "latent", self.latent, 1)
        check_number(self, "noise", self.noise, 0)

    def _learn(self, rows: TrainingRows) -> None:
        import torch

        vectors, scores = self._tensors(rows)
        projection = torch.nn.Linear(vectors.shape[1], self.latent, bias=False)
        models = torch.nn.Linear(self.latent, len(rows.models))
        means = torch.nanmean(scores, dim=0).clamp(0.02, 0.98)
        with torch.no_grad():
            models.bias.copy_(torch.logit(means))
        module = torch.nn.Sequential(projection, models)
        scale = self.noise / vectors.shape[1] ** 0.5

        def loss(part: torch.Tensor) -> torch.Tensor:
            inputs = vectors[part]
            if module.training and scale:
                inputs = inputs + scale * torch.randn_like(inputs)
            return masked_bce(module(inputs), scores[part])

        self._train(module, loss, len(rows))
        self.projection_ = projection.weight.detach().numpy()
        self.vectors_ = models.weight.detach().numpy()
        self.biases_ = models.bias.detach().numpy()

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        latent = (self.projection_ * given).sum(axis=1)
        logits = (self.vectors_ * latent).sum(axis=1) + self.biases_
        return 1.0 / (1.0 + np.exp(-logits)), Explanation()
