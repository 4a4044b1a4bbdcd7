"""Metrics of routing, one kind per file. Pure functions of arrays.

Scores are matrices of shape (n_prompts, n_models) with NaN where a model was not run on a prompt.
A choice is a vector of model positions, one per prompt.
"""

from evals.metrics.calibration import auroc, calibration_error, reliability
from evals.metrics.choices import (
    best_single_choice,
    chosen,
    gap_closed,
    oracle_scores,
    random_scores,
)
from evals.metrics.cost_curve import (
    Point,
    aiq,
    convex_hull,
    cost_save,
    pareto_distance,
    pareto_frontier,
    perf_gain,
)
from evals.metrics.estimates import (
    UNKNOWN,
    Estimate,
    Resamples,
    bootstrap_mean,
    macro_mean,
    paired_difference,
)
from evals.metrics.rare_winners import recall_at
from evals.metrics.regret import regret
from evals.metrics.strong_weak import StrongWeakCurve, apgr, cpt, pgr, strong_weak_curve

__all__ = [
    "UNKNOWN",
    "Estimate",
    "Point",
    "Resamples",
    "StrongWeakCurve",
    "aiq",
    "apgr",
    "auroc",
    "best_single_choice",
    "bootstrap_mean",
    "calibration_error",
    "chosen",
    "convex_hull",
    "cost_save",
    "cpt",
    "gap_closed",
    "macro_mean",
    "oracle_scores",
    "paired_difference",
    "pareto_distance",
    "pareto_frontier",
    "perf_gain",
    "pgr",
    "random_scores",
    "recall_at",
    "regret",
    "reliability",
    "strong_weak_curve",
]
