"""Gradient descent for the routers that need it: torch trains, numpy serves.

Knows nothing of any method: it gets a module that maps rows to predictions, and a loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["held_out_share", "masked_bce", "train"]

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


def train(
    module: torch.nn.Module,
    loss: Callable[[torch.Tensor], torch.Tensor],
    n_rows: int,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    random_state: int,
    name: str,
) -> dict[str, float]:
    """Train until the held-out loss has not improved for a while; keep the best parameters.

    Args:
        module: What is trained.
        loss: Positions of rows to their mean loss under the module as it is.
        n_rows: How many rows there are.
        epochs: At most so many passes.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        batch_size: Rows per step.
        random_state: Seed of the held-out rows and of the order.
        name: What the progress bar calls it.

    Returns:
        The best held-out loss and the number of passes, for the manifest.
    """
    import torch
    from tqdm import tqdm

    held_out = held_out_share(n_rows, random_state)
    learnt, checked = torch.where(~held_out)[0], torch.where(held_out)[0]
    if not len(checked) or not len(learnt):
        learnt = checked = torch.arange(n_rows)
    optimiser = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(random_state + 1)
    best, best_loss, waited, passes = _copy(module), float("inf"), 0, 0
    with tqdm(total=epochs, desc=name, unit="epoch", delay=2, file=sys.stderr) as bar:
        for _ in range(epochs):
            module.train()
            for rows in learnt[torch.randperm(len(learnt), generator=generator)].split(batch_size):
                optimiser.zero_grad()
                value = loss(rows)
                if value.requires_grad:
                    value.backward()
                    optimiser.step()
            module.eval()
            with torch.no_grad():
                now = float(loss(checked))
            passes += 1
            bar.update()
            bar.set_postfix(held_out=f"{now:.4f}")
            if now < best_loss - 1e-5:
                best, best_loss, waited = _copy(module), now, 0
            elif (waited := waited + 1) >= PATIENCE:
                break
    module.load_state_dict(best)
    module.eval()
    return {"held_out_loss": best_loss, "epochs": passes}


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
