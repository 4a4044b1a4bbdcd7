"""Which experts may still be the best of a category, after only some of its prompts."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BATCH", "survivors"]

# Prompts asked between two looks, and before the first.
BATCH = 10
# What the variance of a difference is taken for at least, in prompts that differ: ten answers in a
# row with the same outcome do not prove that the eleventh has it too.
PRIOR_PROMPTS = 1.0


def survivors(
    scores: NDArray[np.float64], n_prompts: int, *, delta: float = 0.05
) -> NDArray[np.bool_]:
    """Experts whose mean over all prompts may still be the greatest.

    Everybody has been asked the same prompts, so differences to the leader are taken prompt by
    prompt. Their intervals hold for the mean over the category's own prompts (with the correction
    for finite populations, they close when all have been asked), and for all looks and experts
    together.

    Args:
        scores: Shape (n_asked, n_experts), NaN for answers that failed.
        n_prompts: Number of prompts of the category.
        delta: Chance of ever dropping the best expert, as far as differences are normal.

    Returns:
        Shape (n_experts,).

    References:
        Successive elimination, as in "Active Ranking of Experts" (arXiv:2306.03002). Departs from
        it in ranking within a category, so that nobody must be best everywhere, and in paired
        normal intervals, which are far shorter than Hoeffding's at a few dozen prompts.
    """
    import numpy as np

    n_asked, n_experts = scores.shape
    means = np.array([np.nanmean(s) if not np.isnan(s).all() else -1.0 for s in scores.T])
    leader = int(means.argmax())
    looks = max(1, -(-n_prompts // BATCH))
    quantile = NormalDist().inv_cdf(1 - delta / (looks * max(n_experts - 1, 1)))
    left = max(0.0, 1 - n_asked / n_prompts)
    keep = np.ones(n_experts, bool)
    for expert in range(n_experts):
        difference = scores[:, leader] - scores[:, expert]
        difference = difference[~np.isnan(difference)]
        count = len(difference)
        if expert == leader or count < BATCH:
            continue
        variance = (difference.var(ddof=1) * (count - 1) + PRIOR_PROMPTS) / count
        error = (variance / count * left) ** 0.5
        keep[expert] = difference.mean() <= quantile * error
    return keep
