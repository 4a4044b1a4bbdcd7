"""What is measured of routers' decisions besides their mean score. Prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evals.decisions import Decisions
from evals.metrics import (
    UNKNOWN,
    Estimate,
    Point,
    Resamples,
    aiq,
    apgr,
    bootstrap_mean,
    calibration_error,
    chosen,
    cost_save,
    cpt,
    pareto_distance,
    perf_gain,
    pgr,
    recall_at,
    regret,
    reliability,
    strong_weak_curve,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Figures", "Loss", "figures_of", "mean_point"]

RARE_WINNERS = 3
SHOWN_LOSSES = 12


@dataclass(frozen=True, slots=True)
class Loss:
    """A decision that lost score: what was chosen, and what would have been better."""

    prompt_id: str
    text: str
    category: str | None
    chosen: str
    predicted: float
    score: float
    best: str
    best_predicted: float
    best_score: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What is measured of a router besides its mean score.

    Attributes:
        regret: Utility lost against the oracle; at a knob of 1 that is score.
        recall: Whether the model predicted best is right, on prompts that some model gets right.
        rare_recall: The same on prompts that at most three models get right.
        recall_3: Whether one of the three predicted best is right.
        calibration_error: Expected calibration error of the predicted quality.
        microseconds: Median time of one decision.
        training_s: Seconds that training took; NaN where nobody knows.
        curve: Mean cost and score along the knob.
        reliability: Mean predicted quality, mean score and number of cells, in bins of equal mass
            over the cells of all models.
        shares: Share of each model among a category's prompts, by category.
        losses: The decisions that lost most, worst first.
        experts_asked: Mean number of models that shall answer a prompt.
        best_of_asked: Best score among them; none where the policy never wants more than one.
        aiq, perf_gain, cost_save, pareto_distance: Of the curve; see ``evals.metrics``. Unknown
            where costs are.
        pgr, apgr, cpt_50, cpt_80: RouteLLM's metrics for two models, the strong one being that with
            the higher mean of the scores judged on; unknown where there are more, or a score is
            missing. ``pgr`` is that of the decisions.
    """

    regret: Estimate
    recall: Estimate
    rare_recall: Estimate
    recall_3: Estimate
    calibration_error: Estimate
    microseconds: float
    training_s: float
    curve: dict[float, Point]
    reliability: list[tuple[float, float, int]]
    shares: dict[str, dict[str, float]]
    losses: list[Loss]
    experts_asked: float = 1.0
    best_of_asked: Estimate | None = None
    aiq: Estimate = UNKNOWN
    perf_gain: Estimate = UNKNOWN
    cost_save: Estimate = UNKNOWN
    pareto_distance: Estimate = UNKNOWN
    pgr: Estimate = UNKNOWN
    apgr: Estimate = UNKNOWN
    cpt_50: Estimate = UNKNOWN
    cpt_80: Estimate = UNKNOWN


def figures_of(
    decisions: Sequence[Decisions], scores: NDArray[np.float64], costs: NDArray[np.float64]
) -> dict[str, Figures]:
    """Figures of every router; their curves share one Pareto frontier with all single models.

    Args:
        decisions: With the same prompts and candidates.
        scores: Shape (n_prompts, n_candidates), NaN where missing.
        costs: Same shape, NaN where unknown.
    """
    import numpy as np

    n_prompts, n_models = scores.shape
    resamples = Resamples(n_prompts)
    # A model that was not run on this split is no point to compare with.
    run = [j for j in range(n_models) if not np.isnan(scores[:, j]).all()]
    choices = [np.full(n_prompts, j, np.intp) for j in run]
    choices += [choice for d in decisions for choice in d.sweep.values()]
    drawn = _Points.of(choices, scores, costs, resamples)
    start = len(run)
    figures = {}
    for d in decisions:
        own = slice(start, start := start + len(d.sweep))
        known = Figures(
            regret=bootstrap_mean(regret(scores, costs, d.choice, cost_quality=d.cost_quality)),
            recall=bootstrap_mean(recall_at(1, d.quality, scores)),
            rare_recall=bootstrap_mean(
                recall_at(1, d.quality, scores, at_most_winners=RARE_WINNERS)
            ),
            recall_3=bootstrap_mean(recall_at(3, d.quality, scores)),
            calibration_error=calibration_error(d.quality, scores, resamples),
            microseconds=d.microseconds,
            training_s=d.training_s,
            curve=dict(zip(d.sweep, drawn.points[own], strict=True)),
            reliability=reliability(d.quality, scores),
            shares=_shares(d),
            losses=_losses(d, scores),
        )
        if d.asked is not None:
            asked = np.zeros(scores.shape, bool)
            for row, models in enumerate(d.asked):
                asked[row, models] = True
            got = np.where(asked & ~np.isnan(scores), scores, -1.0).max(axis=1)
            known = replace(
                known,
                experts_asked=float(asked.sum(axis=1).mean()),
                best_of_asked=bootstrap_mean(np.where(got < 0, np.nan, got)),
            )
        if n_models == 2 and not np.isnan(scores).any():
            known = replace(known, **_of_two(d, scores, resamples))
        if run and d.sweep and drawn.priced:
            known = replace(known, **drawn.figures(own, len(run), resamples))
        figures[d.name] = known
    return figures


@dataclass(frozen=True, slots=True)
class _Points:
    """Operating points, and where they are in bootstrap samples.

    Attributes:
        points: One for each choice, single models first.
        costs: Mean cost of each in each sample, shape (resamples, n_points).
        scores: Mean score, same shape.
        n_prompts: How many prompts there are.
    """

    points: list[Point]
    costs: NDArray[np.float64]
    scores: NDArray[np.float64]
    n_prompts: int

    @classmethod
    def of(
        cls,
        choices: Sequence[NDArray[np.intp]],
        scores: NDArray[np.float64],
        costs: NDArray[np.float64],
        resamples: Resamples,
    ) -> _Points:
        import numpy as np

        if not choices:
            return cls([], np.zeros((0, 0)), np.zeros((0, 0)), len(scores))
        score = np.stack([chosen(scores, choice) for choice in choices], axis=1)
        cost = np.stack([chosen(costs, choice) for choice in choices], axis=1)
        points = [mean_point(scores, costs, choice) for choice in choices]
        return cls(points, resamples.means(cost), resamples.means(score), len(scores))

    @property
    def priced(self) -> bool:
        return all(math.isfinite(x) for point in self.points for x in point)

    def figures(self, own: slice, n_single: int, resamples: Resamples) -> dict[str, Any]:
        """Figures of one router's points, given all points."""
        names = ("aiq", "perf_gain", "cost_save", "pareto_distance")
        drawn = [
            _of_curve([Point(*point) for point in zip(costs, scores, strict=True)], own, n_single)
            for costs, scores in zip(self.costs.tolist(), self.scores.tolist(), strict=True)
        ]
        found = zip(_of_curve(self.points, own, n_single), zip(*drawn, strict=True), strict=True)
        return {
            name: resamples.estimate(value, draws, self.n_prompts)
            for name, (value, draws) in zip(names, found, strict=True)
        }


def _of_curve(points: Sequence[Point], own: slice, n_single: int) -> tuple[float, ...]:
    mine = points[own]
    best = max(points[:n_single], key=lambda point: point.score)
    # All areas reach to the same cost, or a router would gain by wasting money.
    dearest = max(point.cost for point in points)
    return (
        aiq([*mine, Point(dearest, 0.0)]),
        perf_gain(mine, best),
        cost_save(mine, best),
        pareto_distance(mine, points),
    )


def _of_two(
    decisions: Decisions, scores: NDArray[np.float64], resamples: Resamples
) -> dict[str, Any]:
    """RouteLLM's metrics: which model is strong is settled by all prompts, for all samples."""
    import numpy as np

    weak, strong = (int(j) for j in np.argsort(scores.mean(axis=0), kind="stable"))
    win_rate = decisions.quality[:, strong] - decisions.quality[:, weak]
    got = chosen(scores, decisions.choice)

    def of(counts: NDArray[np.integer] | None) -> tuple[float, ...]:
        curve = strong_weak_curve(win_rate, scores[:, strong], scores[:, weak], counts)
        reached = float(np.average(got, weights=counts))
        return (
            pgr(reached, curve.weak, curve.strong),
            apgr(curve),
            cpt(curve, 0.5),
            cpt(curve, 0.8),
        )

    drawn = zip(*(of(counts) for counts in resamples.counts), strict=True)
    return {
        name: resamples.estimate(value, draws, len(scores))
        for name, value, draws in zip(
            ("pgr", "apgr", "cpt_50", "cpt_80"), of(None), drawn, strict=True
        )
    }


def mean_point(
    scores: NDArray[np.float64], costs: NDArray[np.float64], choice: NDArray[np.intp]
) -> Point:
    """Mean cost and score of a choice; NaN where nothing is known."""
    return Point(_mean(chosen(costs, choice)), _mean(chosen(scores, choice)))


def _mean(values: NDArray[np.float64]) -> float:
    import numpy as np

    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _shares(decisions: Decisions) -> dict[str, dict[str, float]]:
    import numpy as np

    if decisions.prompts.categories is None:
        return {}
    labels, models = np.array(decisions.prompts.categories), decisions.candidates
    shares = {}
    for category in sorted(set(decisions.prompts.categories)):
        counts = np.bincount(decisions.choice[labels == category], minlength=len(models))
        shares[category] = dict(zip(models, (counts / counts.sum()).tolist(), strict=True))
    return shares


def _losses(decisions: Decisions, scores: NDArray[np.float64]) -> list[Loss]:
    """The worst decisions; of equal losses those first that the router was surest of."""
    import numpy as np

    prompts, models, quality = decisions.prompts, decisions.candidates, decisions.quality
    rows = np.arange(len(scores))
    best = np.where(np.isnan(scores), -1.0, scores).argmax(axis=1)
    lost = scores[rows, best] - scores[rows, decisions.choice]
    sure = quality[rows, decisions.choice] - quality[rows, best]
    order = [int(row) for row in np.lexsort((-sure, -np.nan_to_num(lost))) if lost[row] > 0]
    return [
        Loss(
            prompt_id=prompts.ids[row],
            text=prompts.texts[row],
            category=prompts.categories[row] if prompts.categories is not None else None,
            chosen=models[decisions.choice[row]],
            predicted=float(quality[row, decisions.choice[row]]),
            score=float(scores[row, decisions.choice[row]]),
            best=models[best[row]],
            best_predicted=float(quality[row, best[row]]),
            best_score=float(scores[row, best[row]]),
        )
        for row in order[:SHOWN_LOSSES]
    ]
