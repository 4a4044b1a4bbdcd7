"""Gradient descent for the routers that need it: torch trains, numpy serves.

Knows nothing of any method: it gets a module and its loss on some rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from routers.fitted import TrainingRows, VectorRouter
from routers.params import check_count, check_number

if TYPE_CHECKING:
    import torch

__all__ = ["GradientRouter", "held_out_share", "masked_bce"]

BATCH_ROWS = 64
PATIENCE = 5


def masked_bce(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy over the cells that were run; scores in [0, 1], NaN where missing."""
    import torch

    present = ~torch.isnan(scores)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits[present], scores[present])


def held_out_share(n_rows: int, random_state: int, share: float = 0.15) -> torch.Tensor:
    """Which rows are kept from training to tell when to stop, shape (n_rows,)."""
    import torch

    generator = torch.Generator().manual_seed(random_state)
    return torch.rand(n_rows, generator=generator) < share


class GradientRouter(VectorRouter):
    """Base of routers that are trained by gradient descent.

    Args:
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        epochs: At most so many passes.
        random_state: Seed of initial values, held-out rows and order.
    """

    learning_rate: float
    weight_decay: float
    epochs: int
    random_state: int

    def _check_params(self) -> None:
        super()._check_params()
        check_number(self, "learning_rate", self.learning_rate, 0, low_open=True)
        check_number(self, "weight_decay", self.weight_decay, 0)
        check_count(self, "epochs", self.epochs, 1)
        check_count(self, "random_state", self.random_state, 0)

    def _tensors(self, rows: TrainingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors and scores of the rows; seeds torch, for the modules that are made next."""
        import numpy as np
        import torch

        torch.manual_seed(self.random_state)
        vectors = torch.from_numpy(np.asarray(rows.vectors, np.float32))
        return vectors, torch.from_numpy(rows.scores.astype(np.float32))

    def _train(
        self, module: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], n_rows: int
    ) -> None:
        """Train until the held-out loss has not improved for a while; keep the best parameters.

        The best held-out loss and the number of passes become ``metrics_``.

        Args:
            module: What is trained.
            loss: Positions of rows to their mean loss under the module as it is.
            n_rows: How many rows there are.
        """
        import torch
        from tqdm import tqdm

        held_out = held_out_share(n_rows, self.random_state)
        learnt, checked = torch.where(~held_out)[0], torch.where(held_out)[0]
        if not len(checked) or not len(learnt):
            learnt = checked = torch.arange(n_rows)
        with torch.no_grad():
            if not torch.isfinite(loss(checked)):  # no held-out row has a score
                learnt = checked = torch.arange(n_rows)
        optimiser = torch.optim.AdamW(
            module.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        generator = torch.Generator().manual_seed(self.random_state + 1)
        best, best_loss, waited, passes = _copy(module), float("inf"), 0, 0
        with tqdm(
            total=self.epochs, desc=self.method, unit="epoch", delay=2, file=sys.stderr
        ) as bar:
            for _ in range(self.epochs):
                module.train()
                order = learnt[torch.randperm(len(learnt), generator=generator)]
                for rows in order.split(BATCH_ROWS):
                    optimiser.zero_grad()
                    value = loss(rows)
                    # Rows without any score have no loss.
                    if value.requires_grad and torch.isfinite(value):
                        value.backward()
                        optimiser.step()
                module.eval()
                with torch.no_grad():
                    now = float(loss(checked))
                passes += 1
                # A refresh would show the bar at once, whatever its delay.
                bar.set_postfix(held_out=f"{now:.4f}", refresh=False)
                bar.update()
                if now < best_loss - 1e-5:
                    best, best_loss, waited = _copy(module), now, 0
                elif (waited := waited + 1) >= PATIENCE:
                    break
        module.load_state_dict(best)
        module.eval()
        self.metrics_ = {"held_out_loss": best_loss, "epochs": passes}


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
