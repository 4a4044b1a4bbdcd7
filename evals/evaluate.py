"""Judges routers on an outcome table: decisions first, frozen and hashed; then the scores.

``decide`` sees prompts, cards and a fitted router. ``judge`` takes what was decided and reads the
scores. Nothing here prints.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from evals.metrics import (
    Estimate,
    Point,
    aiq,
    apgr,
    best_single_choice,
    bootstrap_mean,
    calibration_error,
    chosen,
    cost_save,
    cpt,
    gap_closed,
    macro_mean,
    oracle_scores,
    paired_difference,
    pareto_distance,
    perf_gain,
    random_scores,
    recall_at,
    regret,
    reliability,
    strong_weak_curve,
)
from experts.types import ExpertCard
from orchestrator.policies import UtilityPolicy, expected_cost_usd, relative_costs
from routers.base import Query, Router, RouterError
from routers.baselines import category_table_choice
from routers.outcomes import OutcomeTable, Prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Decisions",
    "Evaluation",
    "Figures",
    "Line",
    "decide",
    "decisions_sha256",
    "judge",
    "shared_pool",
]

# As in serving (orchestrator.pool): English text has about four characters per token.
CHARACTERS_PER_TOKEN = 4
# Where the cost-quality curve is drawn.
KNOBS = tuple(step / 20 for step in range(21))
RARE_WINNERS = 3
SHOWN_LOSSES = 12
TIMED_PROMPTS = 50


@dataclass(frozen=True, slots=True)
class Decisions:
    """What a router and a policy chose, from prompts alone.

    Attributes:
        name: What the report calls the router.
        prompts: The prompts decided on.
        candidates: The models to choose from; the columns of ``quality``.
        quality: Predicted, shape (n_prompts, n_candidates).
        choice: Positions of the chosen models, shape (n_prompts,).
        cost_quality: The policy's knob.
        fallbacks: For how many prompts the router fell back to its general category.
        sha256: Hash of the decisions; see ``decisions_sha256``.
        microseconds: Median time of predicting for one prompt, encoding included.
        sweep: The choices at other values of the knob, for the cost-quality curve.
    """

    name: str
    prompts: Prompts
    candidates: list[str]
    quality: NDArray[np.float32]
    choice: NDArray[np.intp]
    cost_quality: float
    fallbacks: int
    sha256: str
    microseconds: float = float("nan")
    sweep: dict[float, NDArray[np.intp]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The chosen model of each prompt."""
        return [self.candidates[j] for j in self.choice]


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a report: a router, a baseline or a single model.

    Attributes:
        kind: ``router``, ``baseline``, ``model`` or ``bound`` (what no deployed router can reach).
        score: Mean score.
        by_category: Mean score within each category.
        macro: Mean of the category means; none without categories.
        cost: Mean cost of a prompt, in the evaluation's ``cost_unit``; NaN where unknown.
        shares: Share of prompts each model got.
        versus: Paired differences, by the other line's name.
        gap_closed: Share of the way from best single to the oracle.
    """

    name: str
    kind: str
    score: Estimate
    by_category: dict[str, Estimate] = field(default_factory=dict)
    macro: Estimate | None = None
    cost: float = float("nan")
    shares: dict[str, float] = field(default_factory=dict)
    versus: dict[str, Estimate] = field(default_factory=dict)
    gap_closed: float = float("nan")


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
    aiq: float = float("nan")
    perf_gain: float = float("nan")
    cost_save: float = float("nan")
    pareto_distance: float = float("nan")
    apgr: float = float("nan")
    cpt_50: float = float("nan")
    cpt_80: float = float("nan")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything a report shows.

    Attributes:
        split: The split judged on.
        cost_unit: What costs are: measured ``USD``, ``expected USD`` from prices and prompt
            lengths where nothing was measured, or billions of ``active params`` without prices.
        table_sha256: Hash of the table's contents.
        decisions: Hash of each router's decisions, taken before any score was read.
        figures: Further figures of each router.
        notes: What a reader must know to read the numbers right.
    """

    split: str
    n_prompts: int
    candidates: list[str]
    cost_quality: float
    cost_unit: str
    table_sha256: str
    decisions: dict[str, str]
    fallbacks: dict[str, int]
    lines: list[Line]
    notes: list[str]
    figures: dict[str, Figures] = field(default_factory=dict)


def shared_pool(
    routers: Mapping[str, Router], table: OutcomeTable, models: Sequence[str] | None = None
) -> list[str]:
    """The models every router can predict for and the table knows, in the first router's order.

    Reads models' names, no score.

    Raises:
        RouterError: There is none, or a wanted model is not among them.
    """
    known = [set(router.models) for router in routers.values()]
    if table.has_outcomes:
        known.append(set(table.models))
    first = next(iter(routers.values())).models
    pool = [name for name in first if all(name in names for names in known)]
    if models is not None:
        for name in models:
            if name not in pool:
                listed = ", ".join(map(repr, pool)) or "none"
                raise RouterError(
                    f"unknown model {name!r}; known to all routers and the table: {listed}"
                )
        return list(models)
    if not pool:
        raise RouterError(
            "no model is known to every router and to the table; the first router knows "
            + ", ".join(map(repr, first))
        )
    return pool


def decide(
    name: str,
    router: Router,
    table: OutcomeTable,
    *,
    split: str,
    candidates: Sequence[str],
    cost_quality: float = 1.0,
) -> Decisions:
    """Predict and choose for every prompt of a split. Reads no outcome.

    Costs are those a service expects: prices of the cards, estimated prompt length and a typical
    answer; see ``orchestrator.policies``.
    """
    prompts = table.with_prompts_of(split)
    prediction = router.predict([Query(text) for text in prompts.texts], candidates)
    relative = _relative_costs([table.card(model) for model in candidates], prompts.texts)
    choice = UtilityPolicy(cost_quality).choose_all(prediction.quality, relative)
    models = [candidates[int(j)] for j in choice]
    return Decisions(
        name=name,
        prompts=prompts,
        candidates=list(candidates),
        quality=prediction.quality,
        choice=choice,
        cost_quality=cost_quality,
        fallbacks=sum(explanation.fallback for explanation in prediction.explanations),
        sha256=decisions_sha256(prompts.ids, models),
        microseconds=_microseconds(router, prompts.texts, candidates),
        sweep={
            knob: UtilityPolicy(knob).choose_all(prediction.quality, relative) for knob in KNOBS
        },
    )


def _microseconds(router: Router, texts: Sequence[str], candidates: Sequence[str]) -> float:
    times = []
    for text in texts[:TIMED_PROMPTS]:
        # Vectors of the prompts themselves are cached; a blank makes another text of it.
        query = Query(f"{text} ")
        started = time.perf_counter()
        router.predict([query], candidates)
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times)


def decisions_sha256(prompt_ids: Sequence[str], models: Sequence[str]) -> str:
    """SHA-256 of the lines ``prompt_id,model``, each ended by a line break, as UTF-8."""
    lines = "".join(f"{p},{m}\n" for p, m in zip(prompt_ids, models, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def judge(decisions: Sequence[Decisions], table: OutcomeTable, *, split: str) -> Evaluation:
    """Read the scores and compare the decisions with baselines and bounds.

    Args:
        decisions: Of one or more routers, with the same prompts and candidates.
        table: The table they were made for.
        split: The split they were made for.
    """
    first = decisions[0]
    candidates = first.candidates
    scores = table.scores(split, candidates)
    costs, cost_unit = _costs(table, first.prompts, split, candidates)
    maker = _LineMaker(first.prompts, candidates, scores, costs)
    notes = _notes(table, scores)
    lines = [maker.chosen(d.name, "router", d.choice) for d in decisions]
    lines += _baselines(maker, table, split, notes)
    lines += [maker.chosen(name, "model", maker.constant(j)) for j, name in enumerate(candidates)]
    return Evaluation(
        split=split,
        n_prompts=len(first.prompts),
        candidates=candidates,
        cost_quality=first.cost_quality,
        cost_unit=cost_unit,
        table_sha256=table.sha256,
        decisions={d.name: d.sha256 for d in decisions},
        fallbacks={d.name: d.fallbacks for d in decisions},
        lines=[maker.compared(line) for line in lines],
        notes=notes,
        figures=_figures(decisions, maker),
    )


def _figures(decisions: Sequence[Decisions], maker: _LineMaker) -> dict[str, Figures]:
    """Figures of every router; their curves share one Pareto frontier with all single models."""
    import numpy as np

    curves = {
        d.name: {knob: maker.point(choice) for knob, choice in d.sweep.items()} for d in decisions
    }
    single = [maker.point(maker.constant(j)) for j in range(len(maker.candidates))]
    everybody = [*single, *(point for curve in curves.values() for point in curve.values())]
    priced = all(math.isfinite(point.cost) for point in everybody)
    best = max(single, key=lambda point: point.score)
    figures = {}
    for d in decisions:
        points = list(curves[d.name].values())
        known = Figures(
            regret=bootstrap_mean(regret(maker.scores, maker.costs, d.choice)),
            recall=bootstrap_mean(recall_at(1, d.quality, maker.scores)),
            rare_recall=bootstrap_mean(
                recall_at(1, d.quality, maker.scores, at_most_winners=RARE_WINNERS)
            ),
            recall_3=bootstrap_mean(recall_at(3, d.quality, maker.scores)),
            calibration_error=calibration_error(d.quality, maker.scores),
            microseconds=d.microseconds,
            curve=curves[d.name],
            reliability=reliability(d.quality, maker.scores),
            shares=_shares(d),
            losses=_losses(d, maker.scores),
        )
        if len(d.candidates) == 2 and not np.isnan(maker.scores).any():
            weak, strong = (int(j) for j in np.argsort(maker.scores.mean(axis=0), kind="stable"))
            win_rate = d.quality[:, strong] - d.quality[:, weak]
            by_share = strong_weak_curve(win_rate, maker.scores[:, strong], maker.scores[:, weak])
            known = replace(
                known, apgr=apgr(by_share), cpt_50=cpt(by_share, 0.5), cpt_80=cpt(by_share, 0.8)
            )
        if priced and points:
            known = replace(
                known,
                aiq=aiq(points),
                perf_gain=perf_gain(points, best),
                cost_save=cost_save(points, best),
                pareto_distance=pareto_distance(points, everybody),
            )
        figures[d.name] = known
    return figures


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


def _costs(
    table: OutcomeTable, prompts: Prompts, split: str, candidates: Sequence[str]
) -> tuple[NDArray[np.float64], str]:
    """Cost of each cell, shape (n_prompts, n_candidates), and its unit."""
    import numpy as np

    costs = table.costs_usd(split, candidates)
    if not np.isnan(costs).all():
        return costs, "USD"
    cards = [table.card(model) for model in candidates]
    if any(card.input_usd_per_mtok or card.output_usd_per_mtok for card in cards):
        return _expected_usd(cards, prompts.texts), "expected USD"
    sizes = [card.active_params_b or card.total_params_b or float("nan") for card in cards]
    return np.tile(sizes, (len(prompts), 1)), "active params (B)"


def _expected_usd(cards: Sequence[ExpertCard], texts: Sequence[str]) -> NDArray[np.float64]:
    """Expected cost of each prompt with each model, shape (n_prompts, n_models)."""
    import numpy as np

    tokens = {len(text) // CHARACTERS_PER_TOKEN for text in texts}
    known = {count: [expected_cost_usd(card, count) for card in cards] for count in tokens}
    return np.array([known[len(text) // CHARACTERS_PER_TOKEN] for text in texts])


def _relative_costs(cards: Sequence[ExpertCard], texts: Sequence[str]) -> NDArray[np.float64]:
    """What the policy weighs, as in serving, shape (n_prompts, n_models)."""
    import numpy as np

    costs = _expected_usd(cards, texts)
    known = {row.tobytes(): row for row in costs}
    relative = {key: relative_costs(cards, row.tolist()) for key, row in known.items()}
    return np.array([relative[row.tobytes()] for row in costs])


def _notes(table: OutcomeTable, scores: NDArray[np.float64]) -> list[str]:
    import numpy as np

    notes = []
    if table.prompts.splits is None:
        notes.append("the table has no column 'split': all prompts are judged on")
    missing = int(np.isnan(scores).sum())
    if missing:
        notes.append(
            f"{missing} of {scores.size} scores are missing; each line averages the prompts on "
            "which its models were run"
        )
    return notes


def _baselines(maker: _LineMaker, table: OutcomeTable, split: str, notes: list[str]) -> list[Line]:
    """Random, best single, category table, category oracle and oracle, as far as they exist."""
    lines = [maker.values("random", "baseline", random_scores(maker.scores))]
    learnt = "train" if table.has_split("train") and split != "train" else split
    if learnt == split:
        notes.append(f"best single and category table are chosen on {split} itself: in hindsight")
    train = table.scores(learnt, maker.candidates)
    best = maker.constant(best_single_choice(train))
    lines.append(maker.chosen("best single", "baseline", best))
    categories = maker.prompts.categories
    known = table.with_prompts_of(learnt).categories
    if categories is not None and known is not None:
        by_table = category_table_choice(train, known, categories)
        lines.append(maker.chosen("category table", "baseline", by_table))
        oracle = category_table_choice(maker.scores, categories, categories)
        lines.append(maker.chosen("category oracle", "bound", oracle))
    lines.append(maker.values("oracle", "bound", oracle_scores(maker.scores)))
    return lines


class _LineMaker:
    """Makes lines over the same prompts and remembers their scores for comparison."""

    def __init__(
        self,
        prompts: Prompts,
        candidates: list[str],
        scores: NDArray[np.float64],
        costs: NDArray[np.float64],
    ) -> None:
        self.prompts = prompts
        self.candidates = candidates
        self.scores = scores
        self.costs = costs
        self._values: dict[tuple[str, str], NDArray[np.float64]] = {}
        self._means: dict[str, float] = {}

    def point(self, choice: NDArray[np.intp]) -> Point:
        """Mean cost and score of a choice."""
        import numpy as np

        costs, scores = chosen(self.costs, choice), chosen(self.scores, choice)
        cost = float(np.nanmean(costs)) if not np.isnan(costs).all() else float("nan")
        score = float(np.nanmean(scores)) if not np.isnan(scores).all() else float("nan")
        return Point(cost, score)

    def constant(self, model: int) -> NDArray[np.intp]:
        """The choice of one model for every prompt."""
        import numpy as np

        return np.full(len(self.scores), model, np.intp)

    def chosen(self, name: str, kind: str, choice: NDArray[np.intp]) -> Line:
        """The line of a choice."""
        import numpy as np

        counts = np.bincount(choice, minlength=len(self.candidates)) / max(len(choice), 1)
        shares = {m: float(c) for m, c in zip(self.candidates, counts, strict=True) if c > 0}
        costs = chosen(self.costs, choice)
        known = costs[~np.isnan(costs)]
        cost = float(known.mean()) if len(known) else float("nan")
        return self.values(name, kind, chosen(self.scores, choice), cost, shares)

    def values(
        self,
        name: str,
        kind: str,
        values: NDArray[np.float64],
        cost: float = float("nan"),
        shares: dict[str, float] | None = None,
    ) -> Line:
        """The line of one score per prompt."""
        import numpy as np

        self._values[kind, name] = values
        score = bootstrap_mean(values)
        if kind != "model":
            self._means[name] = score.mean
        by_category, macro = {}, None
        if self.prompts.categories is not None:
            labels = np.array(self.prompts.categories)
            for category in sorted(set(self.prompts.categories)):
                by_category[category] = bootstrap_mean(values[labels == category])
            macro = macro_mean(values, self.prompts.categories)
        return Line(name, kind, score, by_category, macro, cost, shares or {})

    def compared(self, line: Line) -> Line:
        """The line with its differences to random and best single."""
        values = self._values[line.kind, line.name]
        versus = {
            other: paired_difference(values, self._values["baseline", other])
            for other in ("best single", "random")
            if other != line.name
        }
        closed = gap_closed(line.score.mean, self._means["best single"], self._means["oracle"])
        return replace(line, versus=versus, gap_closed=closed)
