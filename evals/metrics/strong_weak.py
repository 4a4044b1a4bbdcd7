"""RouteLLM's metrics for two models: how much of the strong one's gain few of its calls bring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["StrongWeakCurve", "apgr", "cpt", "pgr", "strong_weak_curve"]


@dataclass(frozen=True, slots=True)
class StrongWeakCurve:
    """Mean score against the share of calls that go to the strong model.

    Attributes:
        shares: Ascending from 0 to 1; prompts with the same predicted win rate move together.
        scores: Mean score at each share, same shape.
    """

    shares: NDArray[np.float64]
    scores: NDArray[np.float64]

    @property
    def weak(self) -> float:
        """Mean score of the weak model alone."""
        return float(self.scores[0])

    @property
    def strong(self) -> float:
        """Mean score of the strong model alone."""
        return float(self.scores[-1])


def strong_weak_curve(
    win_rate: NDArray[np.floating],
    strong: NDArray[np.float64],
    weak: NDArray[np.float64],
    counts: NDArray[np.integer] | None = None,
) -> StrongWeakCurve:
    """Send the prompts with the highest predicted win rates to the strong model, one by one.

    Args:
        win_rate: What calls are ordered by, such as the difference of predicted qualities,
            shape (n_prompts,).
        strong: Scores of the strong model, shape (n_prompts,), without gaps.
        weak: Scores of the weak model, same shape.
        counts: How often each prompt counts, same shape; once by default.
    """
    import numpy as np

    order = np.argsort(-np.asarray(win_rate, np.float64), kind="stable")
    often = np.ones(len(order)) if counts is None else counts.astype(np.float64)
    gains = np.concatenate([[0.0], np.cumsum((often * (strong - weak))[order])])
    sent = np.concatenate([[0.0], np.cumsum(often[order])])
    ordered = np.asarray(win_rate, np.float64)[order]
    # Between equal win rates no threshold can lie.
    ends = np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])
    total = max(float(sent[-1]), 1.0)
    return StrongWeakCurve(sent[ends] / total, ((often * weak).sum() + gains[ends]) / total)


def pgr(score: float, weak: float, strong: float) -> float:
    """Performance gap recovered: 0 for the weak model, 1 for the strong one; NaN without a gap."""
    return (score - weak) / (strong - weak) if strong != weak else float("nan")


def apgr(curve: StrongWeakCurve) -> float:
    """Mean PGR over all shares of strong calls, by the trapezoid rule; random routing has 0.5.

    References:
        Ong et al., "RouteLLM" (arXiv:2406.18665). Departs from its code in using every threshold
        instead of ten.
    """
    import numpy as np

    area = float(np.trapezoid(curve.scores, curve.shares))
    return pgr(area, curve.weak, curve.strong)


def cpt(curve: StrongWeakCurve, recovered: float) -> float:
    """Least share of strong calls that recovers so much of the gap; NaN without a gap.

    References:
        RouteLLM, CPT(x). Departs from its code in taking the first crossing: interpolating the
        share over the score is wrong where more strong calls lower the score.
    """
    import numpy as np

    if curve.strong <= curve.weak:
        return float("nan")
    values = (curve.scores - curve.weak) / (curve.strong - curve.weak)
    first = int(np.argmax(values >= recovered - 1e-12))
    if first == 0:
        return 0.0
    low, high = values[first - 1], values[first]
    part = (recovered - low) / (high - low)
    return float(curve.shares[first - 1] + part * (curve.shares[first] - curve.shares[first - 1]))
