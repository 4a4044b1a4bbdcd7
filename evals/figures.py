"""What is measured of routers' decisions besides their mean score. Prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from evals.decisions import Decisions
from evals.metrics import (
    Estimate,
    Point,
    aiq,
    apgr,
    bootstrap_mean,
    calibration_error,
    chosen,
    cost_save,
    cpt,
    pareto_distance,
    perf_gain,
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
        regret: Score lost against the oracle.
        recall: Whether the model predicted best is right, on prompts that some model gets right.
        rare_recall: The same on prompts that at most three models get right.
        recall_3: Whether one of the three predicted best is right.
        calibration_error: Expected calibration error of the predicted quality.
        microseconds: Median time of one decision.
        curve: Mean cost and score along the knob.
        reliability: Mean predicted quality, mean score and number of cells, in bins of equal mass
            over the cells of all models.
        shares: Share of each model among a category's prompts, by category.
        losses: The decisions that lost most, worst first.
        experts_asked: Mean number of models that shall answer a prompt.
        best_of_asked: Best score among them; none where the policy never wants more than one.
        aiq, perf_gain, cost_save, pareto_distance: Of the curve; see ``evals.metrics``. NaN where
            costs are unknown.
        apgr, cpt_50, cpt_80: RouteLLM's metrics for a strong and a weak model; NaN where there are
            more than two models, or a score is missing.
    """

    regret: Estimate
    recall: Estimate
    rare_recall: Estimate
    recall_3: Estimate
    calibration_error: float
    microseconds: float
    curve: dict[float, Point]
    reliability: list[tuple[float, float, int]]
    shares: dict[str, dict[str, float]]
    losses: list[Loss]
    experts_asked: float = 1.0
    best_of_asked: Estimate | None = None
    aiq: float = float("nan")
    perf_gain: float = float("nan")
    cost_save: float = float("nan")
    pareto_distance: float = float("nan")
    apgr: float = float("nan")
    cpt_50: float = float("nan")
    cpt_80: float = float("nan")


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
    curves = {
        d.name: {knob: mean_point(scores, costs, choice) for knob, choice in d.sweep.items()}
        for d in decisions
    }
    single = [mean_point(scores, costs, np.full(n_prompts, j)) for j in range(n_models)]
    # A model that was not run on this split is no point to compare with.
    single = [point for point in single if math.isfinite(point.score)]
    everybody = [*single, *(point for curve in curves.values() for point in curve.values())]
    priced = bool(single) and all(math.isfinite(x) for point in everybody for x in point)
    dearest = max((point.cost for point in everybody), default=0.0)
    figures = {}
    for d in decisions:
        points = list(curves[d.name].values())
        known = Figures(
            regret=bootstrap_mean(regret(scores, costs, d.choice)),
            recall=bootstrap_mean(recall_at(1, d.quality, scores)),
            rare_recall=bootstrap_mean(
                recall_at(1, d.quality, scores, at_most_winners=RARE_WINNERS)
            ),
            recall_3=bootstrap_mean(recall_at(3, d.quality, scores)),
            calibration_error=calibration_error(d.quality, scores),
            microseconds=d.microseconds,
            curve=curves[d.name],
            reliability=reliability(d.quality, scores),
            shares=_shares(d),
            losses=_losses(d, scores),
        )
        if d.asked is not None:
            asked = np.zeros(scores.shape, bool)
            for row, models in enumerate(d.asked):
                asked[row, models] = True
            run = np.where(asked & ~np.isnan(scores), scores, -1.0).max(axis=1)
            known = replace(
                known,
                experts_asked=float(asked.sum(axis=1).mean()),
                best_of_asked=bootstrap_mean(np.where(run < 0, np.nan, run)),
            )
        if n_models == 2 and not np.isnan(scores).any():
            weak, strong = (int(j) for j in np.argsort(scores.mean(axis=0), kind="stable"))
            win_rate = d.quality[:, strong] - d.quality[:, weak]
            by_share = strong_weak_curve(win_rate, scores[:, strong], scores[:, weak])
            known = replace(
                known, apgr=apgr(by_share), cpt_50=cpt(by_share, 0.5), cpt_80=cpt(by_share, 0.8)
            )
        if priced and points:
            best = max(single, key=lambda point: point.score)
            known = replace(
                known,
                # All areas reach to the same cost, or a router would gain by wasting money.
                aiq=aiq([*points, Point(dearest, 0.0)]),
                perf_gain=perf_gain(points, best),
                cost_save=cost_save(points, best),
                pareto_distance=pareto_distance(points, everybody),
            )
        figures[d.name] = known
    return figures


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
