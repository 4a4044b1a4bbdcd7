"""Judges routers on an outcome table: decisions first, frozen and hashed; then the scores.

``evals.decisions`` sees prompts, cards and a fitted router; ``judge`` takes what was decided and
reads the scores. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from evals.decisions import Decisions
from evals.figures import Figures, figures_of
from evals.metrics import (
    UNKNOWN,
    Estimate,
    Resamples,
    best_single_choice,
    bootstrap_mean,
    chosen,
    gap_closed,
    macro_mean,
    oracle_scores,
    paired_difference,
    random_scores,
)
from orchestrator.costs import CostUnit, ExpectedCosts
from orchestrator.policies import Policy
from orchestrator.pool import estimated_tokens
from routers.baselines import category_table_choice
from routers.outcomes import OutcomeTable, Prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Evaluation", "Line", "judge"]

# Baselines that every line is compared with.
VERSUS = ("best single", "random", "category table")


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a report: a router, a baseline or a single model.

    Attributes:
        kind: ``router``, ``baseline``, ``model`` or ``bound`` (what no deployed router can reach).
        score: Mean score.
        by_category: Mean score within each category.
        macro: Mean of the category means; none without categories.
        cost: Mean cost of a prompt, in the evaluation's ``cost_unit``.
        shares: Share of prompts each model got.
        versus: Paired differences to the baselines, by their names.
        against: Of a router, paired differences to the others, by their names.
        gap_closed: Share of the way from best single to the oracle.
        category_gap_closed: The same to the category oracle.
    """

    name: str
    kind: str
    score: Estimate
    by_category: dict[str, Estimate] = field(default_factory=dict)
    macro: Estimate | None = None
    cost: Estimate = UNKNOWN
    shares: dict[str, float] = field(default_factory=dict)
    versus: dict[str, Estimate] = field(default_factory=dict)
    against: dict[str, Estimate] = field(default_factory=dict)
    gap_closed: Estimate = UNKNOWN
    category_gap_closed: Estimate = UNKNOWN


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything a report shows.

    Attributes:
        split: The split judged on.
        cost_unit: What costs are: measured ``USD``, ``expected USD`` from prices and prompt
            lengths where nothing was measured, billions of ``active params``, or ``seconds``.
        table_sha256: Hash of the table's contents.
        decisions: Hash of each router's decisions, taken before any score was read.
        figures: Further figures of each router.
        notes: What a reader must know to read the numbers right.
    """

    split: str
    n_prompts: int
    candidates: list[str]
    policy: Policy
    cost_quality: float
    cost_unit: str
    table_sha256: str
    decisions: dict[str, str]
    fallbacks: dict[str, int]
    lines: list[Line]
    notes: list[str]
    figures: dict[str, Figures] = field(default_factory=dict)


def judge(
    decisions: Sequence[Decisions],
    table: OutcomeTable,
    *,
    split: str,
    cost: CostUnit | None = None,
) -> Evaluation:
    """Read the scores and compare the decisions with baselines and bounds.

    Args:
        decisions: Of one or more routers, with the same prompts and candidates.
        table: The table they were made for.
        split: The split they were made for.
        cost: What costs are; none takes the first of US dollars, active parameters and latency
            that is known.
    """
    first = decisions[0]
    candidates = first.candidates
    scores = table.scores(split, candidates)
    costs, cost_unit = _costs(table, first.prompts, split, candidates, cost)
    maker = _LineMaker(first.prompts, candidates, scores, costs)
    notes = _notes(table, candidates, scores, costs)
    lines = [maker.chosen(d.name, "router", d.choice) for d in decisions]
    lines += _baselines(maker, table, split, notes)
    lines += [maker.chosen(name, "model", maker.constant(j)) for j, name in enumerate(candidates)]
    return Evaluation(
        split=split,
        n_prompts=len(first.prompts),
        candidates=candidates,
        policy=first.policy,
        cost_quality=first.cost_quality,
        cost_unit=cost_unit,
        table_sha256=table.sha256,
        decisions={d.name: d.sha256 for d in decisions},
        fallbacks={d.name: d.fallbacks for d in decisions},
        lines=maker.compared(lines),
        notes=notes,
        figures=figures_of(decisions, scores, costs),
    )


def _costs(
    table: OutcomeTable,
    prompts: Prompts,
    split: str,
    candidates: Sequence[str],
    unit: CostUnit | None,
) -> tuple[NDArray[np.float64], str]:
    """Cost of each cell, shape (n_prompts, n_candidates), NaN where unknown, and its unit."""
    import numpy as np

    cards = [table.card(model) for model in candidates]
    if unit in ("usd", None):
        costs = table.costs_usd(split, candidates)
        priced = any(card.input_usd_per_mtok or card.output_usd_per_mtok for card in cards)
        if np.isnan(costs).all() and priced:
            tokens = [estimated_tokens(text) for text in prompts.texts]
            return ExpectedCosts.of(cards).usd(tokens), "expected USD"
        # A price of 0 is that of whoever has none, if nobody has another: as policies see it.
        if unit == "usd" or (costs > 0).any():
            return costs, "USD"
    sizes = [card.active_params_b or card.total_params_b or float("nan") for card in cards]
    latency = table.latency_s(split, candidates)
    if unit == "latency_s" or (unit is None and np.isnan(sizes).all()
                               and not np.isnan(latency).all()):  # fmt: skip
        return latency, "seconds"
    return np.tile(sizes, (len(prompts), 1)), "active params (B)"


def _notes(
    table: OutcomeTable,
    candidates: Sequence[str],
    scores: NDArray[np.float64],
    costs: NDArray[np.float64],
) -> list[str]:
    import numpy as np

    notes = []
    if left_out := [repr(name) for name in table.models if name not in candidates]:
        notes.append(
            f"left out, also by the baselines and the oracle: {', '.join(left_out)}; a model is "
            "compared if every router predicts for it"
        )
    if table.prompts.splits is None:
        notes.append("the table has no column 'split': all prompts are judged on")
    missing = int(np.isnan(scores).sum())
    if missing:
        notes.append(
            f"{missing} of {scores.size} scores are missing; each line averages the prompts on "
            "which its models were run"
        )
    for what, cells in (("score", scores), ("cost", costs)):
        unknown = np.isnan(cells).all(axis=0)
        if 0 < unknown.sum() < len(candidates):
            listed = ", ".join(repr(candidates[j]) for j in np.flatnonzero(unknown))
            notes.append(f"no {what} of {listed} is known, so the curve's figures may be missing")
    return notes


def _baselines(maker: _LineMaker, table: OutcomeTable, split: str, notes: list[str]) -> list[Line]:
    """Random, best single, category table, category oracle and oracle, as far as they exist."""
    lines = [maker.values("random", "baseline", random_scores(maker.scores))]
    learnt = "train" if table.has_split("train") and split != "train" else split
    if learnt == split:
        notes.append(f"best single and category table are chosen on {split} itself: in hindsight")
    train = table.scores(learnt, maker.candidates)
    categories = maker.prompts.categories
    known = table.with_prompts_of(learnt).categories
    best = maker.constant(best_single_choice(train, known))
    lines.append(maker.chosen("best single", "baseline", best))
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
        self._resamples = Resamples(len(scores))
        self._values: dict[tuple[str, str], NDArray[np.float64]] = {}

    def constant(self, model: int) -> NDArray[np.intp]:
        """The choice of one model for every prompt."""
        import numpy as np

        return np.full(len(self.scores), model, np.intp)

    def chosen(self, name: str, kind: str, choice: NDArray[np.intp]) -> Line:
        """The line of a choice."""
        import numpy as np

        counts = np.bincount(choice, minlength=len(self.candidates)) / max(len(choice), 1)
        shares = {m: float(c) for m, c in zip(self.candidates, counts, strict=True) if c > 0}
        cost = bootstrap_mean(chosen(self.costs, choice))
        return self.values(name, kind, chosen(self.scores, choice), cost, shares)

    def values(
        self,
        name: str,
        kind: str,
        values: NDArray[np.float64],
        cost: Estimate = UNKNOWN,
        shares: dict[str, float] | None = None,
    ) -> Line:
        """The line of one score per prompt."""
        import numpy as np

        self._values[kind, name] = values
        score = bootstrap_mean(values)
        by_category, macro = {}, None
        if self.prompts.categories is not None:
            labels = np.array(self.prompts.categories)
            for category in sorted(set(self.prompts.categories)):
                by_category[category] = bootstrap_mean(values[labels == category])
            macro = macro_mean(values, self.prompts.categories)
        return Line(name, kind, score, by_category, macro, cost, shares or {})

    def compared(self, lines: Sequence[Line]) -> list[Line]:
        """The lines with their differences and gaps, each on the prompts that all parties have."""
        routers = [line.name for line in lines if line.kind == "router"]
        found = []
        for line in lines:
            versus = self._differences(line, "baseline", VERSUS)
            against = self._differences(line, "router", routers if line.kind == "router" else ())
            found.append(replace(line, versus=versus, against=against))
        best = ("baseline", "best single")
        gaps = self._gaps(found, best, ("bound", "oracle"))
        found = [replace(one, gap_closed=gap) for one, gap in zip(found, gaps, strict=True)]
        if ("bound", "category oracle") in self._values:
            gaps = self._gaps(found, best, ("bound", "category oracle"))
            found = [
                replace(one, category_gap_closed=gap) for one, gap in zip(found, gaps, strict=True)
            ]
        return found

    def _differences(self, line: Line, kind: str, names: Sequence[str]) -> dict[str, Estimate]:
        own = (line.kind, line.name)
        return {
            name: paired_difference(self._values[own], self._values[kind, name])
            for name in names
            if (kind, name) in self._values and (kind, name) != own
        }

    def _gaps(
        self, lines: Sequence[Line], low: tuple[str, str], high: tuple[str, str]
    ) -> list[Estimate]:
        """Share of the way between two lines that each line goes."""
        import numpy as np

        ends = np.stack([self._values[low], self._values[high]], axis=1)
        sets = []
        for line in lines:
            values = np.column_stack([self._values[line.kind, line.name], ends])
            values[np.isnan(values).any(axis=1)] = np.nan
            sets.append(values)
        drawn = self._resamples.means(np.concatenate(sets, axis=1))
        gaps = []
        for number, values in enumerate(sets):
            known = values[~np.isnan(values[:, 0])]
            samples = drawn[:, 3 * number : 3 * number + 3].tolist()
            gaps.append(
                self._resamples.estimate(
                    gap_closed(*known.mean(axis=0).tolist()),
                    [gap_closed(*means) for means in samples],
                    len(known),
                )
                if len(known)
                else UNKNOWN
            )
        return gaps
