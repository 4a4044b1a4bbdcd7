"""Whom to ask next, and when to stop: what is known of one request's experts, and what asking pays.

Pure functions of numbers: strategies feed them with answers, replays with outcome tables.

Each expert's quality has a mean, at first the router's prediction ``q``, and a variance, at first
``q (1 - q)``: that of being right or not. All experts' qualities have the same correlation, since a
prompt that is hard for one is hard for others. Once an expert's answer was judged, its mean is the
calibrated confidence, and the others' means and variances follow as they do for normal variables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Beliefs", "best_supermodel"]

# Further experts that are weighed together. The expected best of some grows by less with each.
LOOKAHEAD = 3
# Of more experts only those that are worth most by themselves: triples of all would be too many.
WEIGHED = 12
# Points that stand for a distribution; pairs of opposite ones, so that means are exact.
POINTS = 128
# Differences below are rounding, not gains.
ROUNDING = 1e-9
LEAST_VARIANCE = 1e-6


class Beliefs:
    """What is known of the quality of each expert's answer to one request.

    Args:
        quality: Predicted, in [0, 1], one per expert.
        information: Share of each quality's variance that judging the answer explains, in [0, 1).
        correlation: Of any two experts' qualities, given the prediction, in [0, 1).

    Attributes:
        quality: Means, shape (n_experts,).
        covariance: Of the qualities, shape (n_experts, n_experts).
        information: Shape (n_experts,).

    References:
        Dekoninck et al., "A Unified Approach to Routing and Cascading for LLMs" (arXiv:2410.10347):
        qualities as normal variables whose estimates change as models answer. Departs from it in
        one matrix made of three kinds of numbers, instead of one estimated for each of the 2^n sets
        of models that may have answered.
    """

    def __init__(
        self,
        quality: Sequence[float] | NDArray[np.float64],
        information: Sequence[float] | NDArray[np.float64],
        correlation: float,
    ) -> None:
        import numpy as np

        self.quality = np.array(quality, np.float64)
        self.information = np.array(information, np.float64)
        spread = np.sqrt(np.maximum(self.quality * (1 - self.quality), LEAST_VARIANCE))
        correlations = np.full((len(spread), len(spread)), correlation)
        np.fill_diagonal(correlations, 1.0)
        self.covariance = correlations * np.outer(spread, spread)

    def observe(self, expert: int, quality: float) -> None:
        """An expert's answer was judged; the others' qualities follow.

        Args:
            expert: Its position.
            quality: The chance that it is right, by all that is known.
        """
        import numpy as np

        column, variance = self.covariance[:, expert].copy(), self.covariance[expert, expert]
        moved = self.quality + column / variance * (quality - self.quality[expert])
        self.quality = np.clip(moved, 0.0, 1.0)
        explained = self.information[expert] / variance
        self.covariance = self.covariance - explained * np.outer(column, column)

    def fix(self, expert: int, quality: float) -> None:
        """An expert's quality is certain, and nothing else follows from it."""
        self.quality[expert] = quality
        self.covariance[expert, :] = self.covariance[:, expert] = 0.0


def best_supermodel(
    beliefs: Beliefs,
    charges: NDArray[np.float64],
    unasked: Sequence[int],
    *,
    best: float | None,
    at_most: int,
) -> list[int]:
    """The experts worth asking besides those that have answered; none if none is worth it.

    Of all sets it is the one of greatest tau = E[quality of the best answer] - sum of charges,
    where those who have answered are in each set. The best answer is that of the best estimate
    after all were judged, so experts whose answers cannot be judged add nothing but their own mean.
    Ties go to fewer experts, then to the earlier.

    Args:
        beliefs: What is known of all experts.
        charges: Points of quality that asking costs, one per expert.
        unasked: Positions of those that may be asked.
        best: Estimate of the best answer so far; none if nobody has answered.
        at_most: How many may still be asked.

    Returns:
        Positions, in the order of ``unasked``.

    References:
        arXiv:2410.10347, section 4. Departs from it in fixed points instead of 100 random samples,
        so that equal requests get equal decisions, and in weighing at most ``LOOKAHEAD`` further
        experts together.
    """
    import numpy as np

    if not unasked or at_most < 1:
        return []
    kept = np.array(unasked, np.intp)
    means, prices = beliefs.quality[kept], charges[kept]
    if best is None and at_most == 1:
        return [int(kept[(means - prices).argmax()])]
    drawn = _drawn(beliefs, kept)
    if best is not None:
        drawn = np.maximum(drawn, best)
    worth = (means if best is None else drawn.mean(axis=1)) - prices
    if len(kept) > WEIGHED:
        some = np.sort(np.argsort(-worth, kind="stable")[:WEIGHED])
        kept, prices, drawn, worth = kept[some], prices[some], drawn[some], worth[some]
    found, highest = [], -np.inf if best is None else best
    if worth.max() > highest + ROUNDING:
        found, highest = [int(worth.argmax())], float(worth.max())
    sets, maxima, totals = np.arange(len(kept))[:, None], drawn, prices
    for size in range(2, min(at_most, LOOKAHEAD, len(kept)) + 1):
        sets, parents = _sets(len(kept), size)
        maxima = np.maximum(maxima[parents], drawn[sets[:, -1]])
        totals = totals[parents] + prices[sets[:, -1]]
        worth = maxima.mean(axis=1) - totals
        if worth.max() > highest + ROUNDING:
            found, highest = sets[worth.argmax()].tolist(), float(worth.max())
    return [int(kept[place]) for place in found]


def _drawn(beliefs: Beliefs, kept: NDArray[np.intp]) -> NDArray[np.float64]:
    """What estimates may become once answers are judged, shape (n_kept, POINTS)."""
    import numpy as np

    drawn = np.repeat(beliefs.quality[kept, None], POINTS, axis=1)
    judged = np.flatnonzero(beliefs.information[kept] > 0)
    if len(judged):
        experts = kept[judged]
        known = beliefs.information[experts]
        covariance = beliefs.covariance[np.ix_(experts, experts)] * np.outer(known, known)
        own = known * beliefs.covariance[experts, experts]
        np.fill_diagonal(covariance, np.maximum(own, LEAST_VARIANCE**2))
        drawn[judged] += np.linalg.cholesky(covariance) @ _points(len(judged))
    return drawn


@lru_cache(maxsize=64)
def _points(dimensions: int) -> NDArray[np.float64]:
    """Evenly spread normal points, shape (dimensions, POINTS), each with its opposite.

    References:
        Roberts, "The Unreasonable Effectiveness of Quasirandom Sequences" (2018): steps by powers
        of the root of x^(d+1) = x + 1.
    """
    import numpy as np

    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1, dimensions + 1)
    places = (0.5 + np.outer(steps, np.arange(1, POINTS // 2 + 1))) % 1.0
    inverse = NormalDist().inv_cdf
    normal = np.array([[inverse(place) for place in row] for row in places.tolist()])
    return np.concatenate([normal, -normal], axis=1)


@lru_cache(maxsize=256)
def _sets(experts: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All sets of a size, and for each the position of the smaller set without its last expert."""
    import numpy as np

    smaller = {s: n for n, s in enumerate(itertools.combinations(range(experts), size - 1))}
    sets = list(itertools.combinations(range(experts), size))
    return np.array(sets, np.intp), np.array([smaller[s[:-1]] for s in sets], np.intp)
