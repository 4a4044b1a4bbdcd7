"""Comparing two means while outcomes come in: valid whenever one looks, however often.

Knows outcomes in [0, 1] of two arms; nothing of routes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Arm", "Comparison", "Verdict", "compare", "mean_interval", "verdict_on"]

Verdict = Literal["a", "b", "undecided"]

# Bets that are mixed. Half the square root of outcomes seen is about where the best one lies, so
# these serve from ten outcomes to a few millions.
LARGEST_BET, N_BETS = 0.8, 12
# Each round narrows the place of a minimum by eight.
ZOOMS, ZOOM_POINTS = 6, 17
BISECTIONS = 30


@dataclass(slots=True)
class Arm:
    """What is known of one arm's outcomes. Fields of several replicas add up.

    Attributes:
        n: How many outcomes.
        total: Their sum.
        squares: Sum of squared errors of guessing each outcome as the mean of earlier ones.
    """

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float | None:
        """Of the outcomes; none before the first."""
        return self.total / self.n if self.n else None

    def add(self, outcome: float) -> None:
        """Note an outcome.

        Raises:
            ValueError: It lies outside [0, 1].
        """
        if not 0.0 <= outcome <= 1.0:
            raise ValueError(f"an outcome must lie in [0, 1], got {outcome}")
        # The guess must not know the outcome, or the test would be no test.
        guess = (0.5 + self.total) / (1 + self.n)
        self.n += 1
        self.total += outcome
        self.squares += (outcome - guess) ** 2

    def log_wealth(self, means: NDArray[np.float64]) -> NDArray[np.float64]:
        """Evidence against each supposed mean, same shape.

        The logarithm of what a gambler has who began with 1 and bets against the mean: of a
        supposed mean that is true the wealth is not expected to grow.
        """
        import numpy as np

        bets = LARGEST_BET * 0.5 ** np.arange(N_BETS)
        prices = (-np.log1p(-bets) - bets) * self.squares
        gains = np.asarray(self.total - self.n * means)[..., None] * np.concatenate([bets, -bets])
        terms = gains - np.concatenate([prices, prices])
        top = terms.max(axis=-1, keepdims=True)
        return np.asarray(np.log(np.exp(terms - top).mean(axis=-1)) + top[..., 0])


class Comparison(NamedTuple):
    """What two arms' outcomes say.

    Attributes:
        difference: Mean of ``b`` less mean of ``a``; none while an arm has no outcome.
        low: Lower end of what the true difference may be.
        high: Upper end.
        verdict: The better arm, once 0 is outside.
    """

    difference: float | None
    low: float
    high: float
    verdict: Verdict


def compare(a: Arm, b: Arm, *, error: float = 0.05) -> Comparison:
    """Compare two arms' means, as often as one likes.

    The interval is a confidence sequence: the probability that it ever leaves out the true
    difference, at any of all the times one may look, is at most ``error``. So one may stop at the
    first verdict. Outcomes of an arm must have one mean given what came before; that is so where
    arms are drawn at random and neither changes.

    Both arms' wealth against a pair of means is a supermartingale if the pair is true; a difference
    is out when every pair that has it is.

    Args:
        a: One arm.
        b: The other.
        error: Probability of a wrong verdict.

    References:
        Howard et al., "Time-uniform, nonparametric, nonasymptotic confidence sequences"
        (arXiv:1810.08240), theorem 4: the empirical-Bernstein supermartingale; Ville's inequality
        for its bound. Departs from them in a discrete mixture of bets instead of a curved boundary,
        and in multiplying two arms' wealth instead of uniting two intervals.
    """
    import numpy as np

    mean_a, mean_b = a.mean, b.mean
    if mean_a is None or mean_b is None:
        return Comparison(None, -1.0, 1.0, "undecided")
    bound = float(np.log(1 / error))
    found = mean_b - mean_a

    def evidence(difference: float) -> float:
        return _least_evidence(a, b, difference)

    low, high = _edge(evidence, bound, found, -1.0), _edge(evidence, bound, found, 1.0)
    return Comparison(found, low, high, verdict_on(a, b, error=error))


def verdict_on(a: Arm, b: Arm, *, error: float = 0.05) -> Verdict:
    """The verdict of ``compare`` alone, which takes a fiftieth of the time."""
    import numpy as np

    mean_a, mean_b = a.mean, b.mean
    if mean_a is None or mean_b is None or _least_evidence(a, b, 0.0) < float(np.log(1 / error)):
        return "undecided"
    return "b" if mean_b > mean_a else "a"


def mean_interval(arm: Arm, *, error: float = 0.05) -> tuple[float, float]:
    """Where the mean of one arm's outcomes may lie; valid as ``compare`` is."""
    import numpy as np

    if arm.mean is None:
        return 0.0, 1.0

    def evidence(mean: float) -> float:
        return float(arm.log_wealth(np.array([mean]))[0])

    bound = float(np.log(1 / error))
    return _edge(evidence, bound, arm.mean, 0.0), _edge(evidence, bound, arm.mean, 1.0)


def _edge(evidence: Callable[[float], float], bound: float, inside: float, outside: float) -> float:
    """Where evidence against a value reaches the bound, between two values."""
    if evidence(outside) < bound:
        return outside
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if evidence(middle) < bound:
            inside = middle
        else:
            outside = middle
    return outside


def _least_evidence(a: Arm, b: Arm, difference: float) -> float:
    """Evidence against the pair of means with this difference that has the least against it."""
    import numpy as np

    low, high = max(0.0, -difference), min(1.0, 1.0 - difference)
    least = np.inf
    # Evidence is convex, so the minimum lies beside the least of some points.
    for _ in range(ZOOMS):
        means = np.linspace(low, high, ZOOM_POINTS)
        against = a.log_wealth(means) + b.log_wealth(means + difference)
        place = int(against.argmin())
        least = min(least, float(against[place]))
        low, high = means[max(place - 1, 0)], means[min(place + 1, ZOOM_POINTS - 1)]
        if high <= low:
            break
    return float(least)
