"""Contrastive routing: queries are drawn to the models that answer them and away from others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.calibration import fit_platt, sigmoid
from routers.clusters import cluster
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.params import check_count, check_number
from routers.torch_training import GradientRouter

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["ContrastiveRouter"]

# As in the paper.
TOP_MODELS = 3
LOW_MODELS = 3
WRONG_BELOW = 0.5
LOW_SAMPLES = 3


class ContrastiveRouter(GradientRouter):
    """Cosine between a projected query and a learnt vector per model, calibrated to quality.

    Args:
        encoder: An encoder's name or an encoder.
        latent: Length of the projected vectors.
        temperature: Cosines are divided by it in the loss.
        sample_weight: Weight of the loss between queries of one cluster.
        n_clusters: Number of those clusters.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most so many passes.
        random_state: Seed of initial values, clusters and order.

    Attributes:
        projection_: Query to latent space, shape (latent, width).
        vectors_: Unit vectors of models, shape (n_models, latent).
        slope_, biases_: Cosine to quality, see ``routers.calibration``; biases (n_models,).

    References:
        Chen et al., "RouterDC" (arXiv:2409.19886): the best models of a query against its worst
        ones, and queries of one cluster against others. Departs from it in a frozen encoder with a
        learnt projection, in calibrated predictions, in a temperature of .2 (there 1) and a weight
        of .5 for the loss between queries (0 by default in its code), and in two slips of that
        code: rows without a right model are left out of the loss (there the mask broadcasts and
        rescales the whole batch), and no query is its own positive.
    """

    method = "contrastive"
    arrays: ClassVar = {
        "projection": ("latent", "width"),
        "vectors": ("models", "latent"),
        "biases": ("models",),
    }
    numbers = ("slope",)

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        latent: int = 128,
        temperature: float = 0.2,
        sample_weight: float = 0.5,
        n_clusters: int = 8,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        epochs: int = 40,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.latent = latent
        self.temperature = temperature
        self.sample_weight = sample_weight
        self.n_clusters = n_clusters
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "latent", self.latent, 1)
        check_number(self, "temperature", self.temperature, 0, low_open=True)
        check_number(self, "sample_weight", self.sample_weight, 0)
        check_count(self, "n_clusters", self.n_clusters, 1)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np
        import torch

        vectors, scores = self._tensors(rows)
        _, labels = cluster(rows.vectors, self.n_clusters, self.random_state)
        groups = torch.from_numpy(labels)
        projection = torch.nn.Linear(vectors.shape[1], self.latent, bias=False)
        models = torch.nn.Linear(self.latent, len(rows.models), bias=False)
        module = torch.nn.Sequential(projection, models)

        def loss(part: torch.Tensor) -> torch.Tensor:
            latent = torch.nn.functional.normalize(projection(vectors[part]), dim=1)
            directions = torch.nn.functional.normalize(models.weight, dim=1)
            by_model = model_loss(latent @ directions.T / self.temperature, scores[part])
            by_sample = sample_loss(latent @ latent.T / self.temperature, groups[part])
            return by_model + self.sample_weight * by_sample

        self._train(module, loss, len(rows))
        self.projection_ = projection.weight.detach().numpy()
        directions = torch.nn.functional.normalize(models.weight, dim=1)
        self.vectors_ = directions.detach().numpy()
        cosines = np.array([self._cosines(vector) for vector in rows.vectors])
        self.slope_, self.biases_ = fit_platt(cosines, rows.scores)

    def _cosines(self, vector: NDArray[np.float32]) -> NDArray[Any]:
        import numpy as np

        latent = (self.projection_ * vector).sum(axis=1)
        latent = latent / max(float(np.sqrt((latent**2).sum())), 1e-12)
        return np.asarray((self.vectors_ * latent).sum(axis=1))

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        return sigmoid(self.slope_ * self._cosines(given) + self.biases_), Explanation()


def model_loss(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Each of a query's best models against its worst wrong ones, mean over queries with both.

    Args:
        logits: Shape (batch, n_models).
        scores: In [0, 1], NaN where a model was not run, same shape.
    """
    import torch

    known = scores.nan_to_num(-1.0)
    k = min(TOP_MODELS, scores.shape[1])
    top, best = known.topk(k, dim=1)
    worst = known.where(known >= 0, 2.0).topk(min(LOW_MODELS, scores.shape[1]), largest=False)[1]
    wrong = scores.gather(1, worst) <= WRONG_BELOW  # NaN compares false
    negatives = logits.gather(1, worst).masked_fill(~wrong, -torch.inf)
    right = top > WRONG_BELOW
    positives = logits.gather(1, best)
    rest = negatives.logsumexp(dim=1, keepdim=True)
    losses = torch.logaddexp(positives, rest) - positives
    counted = right & wrong.any(dim=1, keepdim=True)
    return losses[counted].mean() if counted.any() else logits.sum() * 0.0


def sample_loss(logits: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Each query against others: one of its own cluster, a few of other clusters.

    Args:
        logits: Similarities within the batch, shape (batch, batch).
        groups: Cluster of each query, shape (batch,).
    """
    import torch

    same = groups[:, None] == groups[None, :]
    other = same & ~torch.eye(len(groups), dtype=torch.bool)
    usable = other.any(dim=1) & (~same).any(dim=1)
    if not usable.any():
        return logits.sum() * 0.0
    # The first of its cluster in the batch, whose order is random.
    positive = other.float().argmax(dim=1)
    negatives = logits.masked_fill(same, -torch.inf)
    hardest = negatives.topk(min(LOW_SAMPLES, len(groups)), dim=1)[0]
    own = logits.gather(1, positive[:, None])
    losses = torch.logaddexp(own, hardest.logsumexp(dim=1, keepdim=True)) - own
    return losses[usable].mean()
