"""Item response theory: queries have a difficulty, models have abilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from routers.base import Explanation
from routers.encoders import DEFAULT_ENCODER, Encoder
from routers.fitted import TrainingRows
from routers.params import check_count
from routers.torch_training import GradientRouter, masked_bce

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["IRTRouter"]


class IRTRouter(GradientRouter):
    """P(model right) = sigmoid(discrimination(query) . ability(model) - difficulty(query)).

    Discrimination is never negative, so that more ability never hurts and each ability can be read
    as skill of one kind. Queries' parameters are functions of their vectors; nothing is learnt per
    prompt, so new queries need no warm-up.

    Args:
        encoder: An encoder's name or an encoder.
        abilities: Number of abilities of a model.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most so many passes.
        random_state: Seed of initial values and order.

    Attributes:
        discrimination_: Query to logits of discriminations, shape (n_abilities, width).
        offsets_: Their constants, shape (n_abilities,).
        abilities_: Shape (n_models, n_abilities).
        difficulty_: Query to difficulty, shape (width,).
        base_: Constant of the difficulty.

    References:
        Song et al., "IRT-Router" (arXiv:2506.01048), the multidimensional variant. Departs from it
        in the abilities, which are free parameters instead of functions of a model's description,
        and in leaving out its cold start by neighbours.
    """

    method = "irt"
    arrays: ClassVar = {
        "discrimination": ("abilities", "width"),
        "offsets": ("abilities",),
        "abilities": ("models", "abilities"),
        "difficulty": ("width",),
    }
    numbers = ("base",)

    def __init__(
        self,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        abilities: int = 16,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        epochs: int = 80,
        random_state: int = 0,
    ) -> None:
        self.encoder = encoder
        self.abilities = abilities
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.random_state = random_state

    def _check_params(self) -> None:
        super()._check_params()
        check_count(self, "abilities", self.abilities, 1)

    def _learn(self, rows: TrainingRows) -> None:
        import numpy as np
        import torch

        vectors, scores = self._tensors(rows)
        query = torch.nn.Linear(vectors.shape[1], self.abilities)
        models = torch.nn.Embedding(len(rows.models), self.abilities)
        difficulty = torch.nn.Linear(vectors.shape[1], 1)
        means = torch.logit(torch.nanmean(scores, dim=0).clamp(0.02, 0.98))
        with torch.no_grad():
            # Every ability starts as the model's mean score, and the discriminations add up to 1.
            models.weight.copy_(means[:, None] + 0.1 * torch.randn_like(models.weight))
            query.bias.fill_(float(np.log(np.expm1(1 / self.abilities))))
            difficulty.weight.zero_()
            difficulty.bias.zero_()
        module = torch.nn.ModuleList([query, models, difficulty])

        def loss(part: torch.Tensor) -> torch.Tensor:
            inputs = vectors[part]
            sharp = torch.nn.functional.softplus(query(inputs))
            return masked_bce(sharp @ models.weight.T - difficulty(inputs), scores[part])

        self._train(module, loss, len(rows))
        self.discrimination_ = query.weight.detach().numpy()
        self.offsets_ = query.bias.detach().numpy()
        self.abilities_ = models.weight.detach().numpy()
        self.difficulty_ = difficulty.weight.detach().numpy()[0]
        self.base_ = float(difficulty.bias.detach())

    def _predict_one(self, given: NDArray[np.float32]) -> tuple[NDArray[Any], Explanation]:
        import numpy as np

        sharp = np.logaddexp((self.discrimination_ * given).sum(axis=1) + self.offsets_, 0.0)
        difficulty = float((self.difficulty_ * given).sum()) + self.base_
        logits = (self.abilities_ * sharp).sum(axis=1) - difficulty
        return 1.0 / (1.0 + np.exp(-logits)), Explanation(detail={"difficulty": difficulty})
