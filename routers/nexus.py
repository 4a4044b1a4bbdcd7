"""Routing vectors generated from a model's error profile: new models join without retraining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.calibration import sigmoid
from routers.clusters import ClusterRouter
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.params import check_count
from routers.torch_training import GradientRouter, masked_bce

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["NexusRouter"]

# Keeps logits of clusters that a model always or never gets right finite.
LEAST_QUALITY = 0.02


class NexusRouter(GradientRouter, ClusterRouter):
    """What a model's mean scores per cluster say, corrected by a vector generated from them.

    The logit of a quality is that of the query's clusters plus the product of the projected query
    with the model's vector, which a small network makes from the model's profile (its mean scores
    per cluster). The network ends in zeros at first, so that an untrained one changes nothing.
    In training, profiles are taken from random parts of the rows, as a new model's will be.

    Args:
        encoder: An encoder's name or an encoder.
        n_clusters: Number of clusters, which is the length of a profile.
        latent: Length of the generated vectors.
        hidden: Width of the generating network.
        top_k: How many of the nearest clusters count.
        beta: How fast a cluster's weight falls with its cosine distance.
        shrinkage: Number of prompts with the model's mean score that a cluster's is mixed with.
        profile_prompts: Prompts that a profile is taken from in training; as many as a new model
            will bring.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most so many passes.
        random_state: Seed of clusters, initial values and order.

    Attributes:
        centres_: Unit vectors, shape (n_clusters, width).
        profiles_: Mean scores, shape (n_models, n_clusters).
        projection_: Query to latent space, shape (latent, width).
        gate_, up_: Profile to hidden, shape (hidden, n_clusters + 1), for a constant 1 behind it.
        down_: Hidden to latent, shape (latent, hidden).

    References:
        Gritsch et al., "Nexus" (arXiv:2408.15901): a router's rows generated from domain embeddings
        by a two-layer SwiGLU network. Departs from it in routing whole models, in profiles instead
        of domain embeddings, and in the part that is always on: the clusters' mean scores.
    """

    method = "nexus"
    arrays: ClassVar = {
        "centres": ("clusters", "width"),
        "profiles": ("models", "clusters"),
        "projection": ("latent", "width"),
        "gate": ("hidden", "profile"),
        "up": ("hidden", "profile"),
        "down": ("latent", "hidden"),
    }

    profiles_: NDArray[np.float64]

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        n_clusters: int = 24,
        latent: int = 32,
        hidden: int = 32,
        top_k: int = 3,
        beta: float = 9.0,
        shrinkage: float = 10.0,
        profile_prompts: int = 400,
        learning_rate: float = 1e-3,
        weight_decay: float = 3e-2,
        epochs: int = 40,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.latent = latent
        self.hidden = hidden
        self.top_k = top_k
        self.beta = beta
        self.shrinkage = shrinkage
        self.profile_prompts = profile_prompts
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "latent", self.latent, 1)
        check_count(self, "hidden", self.hidden, 1)
        check_count(self, "profile_prompts", self.profile_prompts, 1)

    def _profiles(self, means: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
        return {"profiles": means.T}

    def _known_means(self) -> NDArray[np.float64]:
        return self.profiles_.T

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np
        import torch

        labels = self._cluster(rows)
        size = len(self.centres_)
        rng = np.random.default_rng(self.random_state)
        vectors, scores = self._tensors(rows)
        memberships = torch.from_numpy(
            np.array([self._memberships(vector) for vector in rows.vectors], np.float32)
        )
        projection = torch.nn.Linear(vectors.shape[1], self.latent, bias=False)
        gate, up = torch.nn.Linear(size, self.hidden), torch.nn.Linear(size, self.hidden)
        down = torch.nn.Linear(self.hidden, self.latent, bias=False)
        torch.nn.init.zeros_(down.weight)
        module = torch.nn.ModuleList([projection, gate, up, down])
        whole = torch.from_numpy(self._means(rows.scores, labels).T.astype(np.float32))

        def loss(part: torch.Tensor) -> torch.Tensor:
            profiles = whole
            if module.training:
                some = rng.choice(len(rows), min(self.profile_prompts, len(rows)), replace=False)
                drawn = self._means(rows.scores[some], labels[some])
                profiles = torch.from_numpy(drawn.T.astype(np.float32))
                # A model without a score in the draw is not one that is always wrong.
                unseen = torch.from_numpy(np.asarray(np.isnan(rows.scores[some]).all(axis=0)))
                profiles[unseen] = whole[unseen]
            made = down(torch.nn.functional.silu(gate(profiles)) * up(profiles))
            base = torch.logit(
                (memberships[part] @ profiles.T).clamp(LEAST_QUALITY, 1 - LEAST_QUALITY)
            )
            return masked_bce(base + projection(vectors[part]) @ made.T, scores[part])

        self._train(module, loss, len(rows))
        self.profiles_ = whole.numpy().astype(np.float64)
        self.projection_ = projection.weight.detach().numpy()
        self.gate_, self.up_ = (
            torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy()
            for layer in (gate, up)
        )
        self.down_ = down.weight.detach().numpy()

    def _memberships(self, vector: NDArray[np.float32]) -> NDArray[np.float64]:
        import numpy as np

        nearest, weights = self._nearest(vector)
        whole = np.zeros(len(self.centres_))
        whole[nearest] = weights
        return whole

    def _ready(self) -> None:
        import numpy as np

        profiles = np.hstack([self.profiles_, np.ones((len(self.profiles_), 1))])
        gated, up = profiles @ self.gate_.T, profiles @ self.up_.T
        self._vectors = (gated * sigmoid(gated) * up) @ self.down_.T

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        base = (self.profiles_ * self._memberships(given)).sum(axis=1)
        base = base.clip(LEAST_QUALITY, 1 - LEAST_QUALITY)
        latent = (self.projection_ * given).sum(axis=1)
        logits = np.log(base / (1 - base)) + (self._vectors * latent).sum(axis=1)
        return sigmoid(logits), Explanation()
