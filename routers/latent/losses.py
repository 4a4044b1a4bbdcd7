"""Which experts take part, how much each counts, and what the router is taught besides.

Knows scores only: neither experts nor texts. Imports torch.
"""

from __future__ import annotations

import torch

__all__ = ["choose", "entropy_loss", "gates", "load_balance_loss"]


def choose(
    scores: torch.Tensor,
    active: int,
    *,
    writer: int | None = None,
    draws: torch.Tensor | None = None,
) -> torch.Tensor:
    """The active experts of each text, the one that writes first; carries no gradient.

    Args:
        scores: Shape (n_texts, n_experts).
        active: How many take part.
        writer: The expert that always writes; by default the one with the highest score.
        draws: Numbers that say in the scores' place who is listened to, same shape.

    Returns:
        Positions of experts, shape (n_texts, active).

    Examples:
        >>> choose(torch.tensor([[0.1, 0.9, 0.5]]), 2).tolist()
        [[1, 2]]
        >>> choose(torch.tensor([[0.1, 0.9, 0.5]]), 2, writer=0).tolist()
        [[0, 1]]
    """
    scores = scores.detach()
    first = scores.argmax(1) if writer is None else torch.full((len(scores),), writer)
    ranked = (scores if draws is None else draws).scatter(1, first[:, None], torch.inf)
    return ranked.topk(active, dim=1).indices


def gates(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """How much each active expert counts: softmax of their scores.

    Args:
        scores: Shape (n_texts, n_experts).
        chosen: Positions of experts, shape (n_texts, active).

    Returns:
        Shape (n_texts, active), rows add up to 1.
    """
    return scores.gather(1, chosen).softmax(1)


def entropy_loss(scores: torch.Tensor) -> torch.Tensor:
    """Less the mean entropy of the softmax of scores: low when nobody is favoured.

    Args:
        scores: Shape (n_texts, n_experts).
    """
    logs = scores.log_softmax(1)
    return (logs.exp() * logs).sum(1).mean()


def load_balance_loss(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Number of experts times the product of their share of choices and of probability, summed.

    1 if all are chosen alike, more if those that are chosen often are likely, too. The gradient
    goes through the probabilities; counts have none.

    References:
        Fedus et al., "Switch Transformers" (arXiv:2101.03961), equation 4. The public code of
        Mixture of Thoughts takes the spread of the counts instead, which teaches nothing.

    Args:
        scores: Shape (n_texts, n_experts).
        chosen: Whether an expert takes part, same shape.
    """
    counts = chosen.to(scores).sum(0)
    shares = counts / counts.sum().clamp(min=1)
    return scores.shape[1] * (shares * scores.softmax(1).mean(0)).sum()
