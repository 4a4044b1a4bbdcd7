"""Cascades on outcome tables: what they would have asked, and the numbers they go by.

A table has scores and, in its column ``confidence``, what experts' answers said of themselves; no
answer is read. Prints nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from orchestrator.policies import LEAST_KNOB, BudgetPolicy, Policy, order_by_utility
from orchestrator.strategies.cascade import CascadeStrategy, Walk
from orchestrator.strategies.confidence import Calibration, Signal
from routers.base import RouterError
from routers.category_classifier import equal_mass_bins

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Cells",
    "Replay",
    "calibrations_of",
    "correlation_of",
    "replay",
    "simulated_threshold",
    "tune_cascade",
    "tune_cascade_routing",
]

# Prompts per point of a calibration, and points at most.
PROMPTS_PER_POINT, MOST_POINTS = 30, 10
# Prompts that a calibration needs to be worth anything.
LEAST_PROMPTS = 60
# Scores added to each point as if they were the mean's.
PRIOR_SCORES = 2.0
# How much of the measured information is believed; 0 is routing.
TRUST = (1.0, 0.5, 0.25, 0.0)
PRICE_STEPS = 8
THRESHOLDS = 12


@dataclass(frozen=True, slots=True)
class Cells:
    """What a replay sees of each prompt and model, all of shape (n_prompts, n_models).

    Attributes:
        names: Of the models.
        quality: Predicted.
        costs: Expected, in the policy's unit.
        scores: What answers scored, NaN where a model was not run.
        signals: What answers said of themselves, NaN where nothing.
    """

    names: Sequence[str]
    quality: NDArray[np.float64]
    costs: NDArray[np.float64]
    scores: NDArray[np.float64]
    signals: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a cascade did on prompts with known outcomes.

    Attributes:
        asked: Positions of the models that were asked, in order, for each prompt.
        given: Position of the model whose answer was given, shape (n_prompts,).
    """

    asked: list[list[int]]
    given: NDArray[np.intp]

    def spent(self, cells: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over all models asked, such as of costs or seconds, shape (n_prompts,)."""
        import numpy as np

        return np.array([cells[row, asked].sum() for row, asked in enumerate(self.asked)])

    @property
    def answers(self) -> NDArray[np.float64]:
        """How many models were asked, shape (n_prompts,)."""
        import numpy as np

        return np.array([len(asked) for asked in self.asked], np.float64)


def replay(strategy: CascadeStrategy, policy: Policy, cells: Cells) -> Replay:
    """Go through every prompt as a service would, without limits of time and money.

    Args:
        strategy: The cascade.
        policy: Says what asking costs.
        cells: What there is to see. The scores are not looked at.
    """
    import numpy as np

    quality = cells.quality.astype(np.float64)
    utilities = policy.utilities(cells.names, quality, cells.costs)
    charges = quality - utilities / max(LEAST_KNOB, policy.cost_quality)
    asked, given = [], []
    for row, utility in enumerate(utilities):
        order = order_by_utility(utility.tolist(), cells.costs[row].tolist())
        names = [cells.names[j] for j in order]
        walk = Walk(
            strategy,
            names,
            quality[row, order].tolist(),
            charges[row, order].tolist(),
            cells.costs[row, order].tolist(),
            able=names,
            at_most=strategy.max_answers,
        )
        best = _walked(walk, cells.signals[row, order])
        asked.append([order[place] for place in walk.answered])
        given.append(order[best])
    return Replay(asked, np.array(given, np.intp))


def _walked(walk: Walk, signals: NDArray[np.float64]) -> int:
    """Ask until it pays no more; the position of the answer that is given."""
    import math

    while (place := walk.next(walk.open)) is not None:
        rest = [other for other in walk.open if other != place]
        signal = float(signals[place])
        if walk.settled(place, rest):
            walk.answer(place, None)
            return place
        known = walk.judged(place) and not math.isnan(signal)
        walk.answer(place, walk.chance(place, signal) if known else None)
    return max(walk.answered, key=walk.rank)


def calibrations_of(cells: Cells) -> dict[str, Calibration]:
    """What each model's signal says of its score; models with too few signals are left out.

    Points are means over equally many answers, made monotone. What a signal explains is measured
    on halves of the answers that the points were not made from.
    """
    import numpy as np

    found = {}
    for j, name in enumerate(cells.names):
        known = ~np.isnan(cells.signals[:, j]) & ~np.isnan(cells.scores[:, j])
        signals, scores = cells.signals[known, j], cells.scores[known, j]
        base = float(np.clip(scores.mean(), 0.01, 0.99)) if len(scores) else 0.0
        if len(scores) < LEAST_PROMPTS or not signals.std() or not scores.std():
            continue
        expected = np.clip(cells.quality[known, j].astype(np.float64), 0.001, 0.999)
        chances = np.empty(len(scores))
        for half in (0, 1):
            learn, judge = np.arange(len(scores)) % 2 != half, np.arange(len(scores)) % 2 == half
            made = Calibration(points=_points(signals[learn], scores[learn], base),
                               base=base, information=0.5)  # fmt: skip
            chances[judge] = [made.chance(s, q) for s, q in zip(
                signals[judge].tolist(), expected[judge].tolist(), strict=True)]  # fmt: skip
        left = scores - expected
        share = float(((chances - expected) * left).mean() / (left**2).mean())
        found[name] = Calibration(
            points=_points(signals, scores, base),
            base=round(base, 4),
            information=round(float(np.clip(share, 0.0, 0.95)), 4),
        )
    return found


def _points(
    signals: NDArray[np.float64], scores: NDArray[np.float64], base: float
) -> tuple[tuple[float, float], ...]:
    import numpy as np
    from sklearn.isotonic import IsotonicRegression

    wanted = max(2, min(MOST_POINTS, len(scores) // PROMPTS_PER_POINT))
    bins = equal_mass_bins(signals, wanted)
    at = [round(float(signals[part].mean()), 4) for part in bins]
    sizes = np.array([len(part) for part in bins])
    totals = np.array([scores[part].sum() for part in bins])
    means = (totals + PRIOR_SCORES * base) / (sizes + PRIOR_SCORES)
    model = IsotonicRegression(y_min=0.0, y_max=1.0).fit(at, means, sample_weight=sizes)
    rising = model.predict(at)
    # Rounding may make neighbours equal; the last of them stands for all.
    points = {signal: round(float(chance), 4) for signal, chance in zip(at, rising, strict=True)}
    return tuple(sorted(points.items()))


def correlation_of(cells: Cells) -> float:
    """The mean correlation of two models' scores beyond what was predicted of them."""
    import numpy as np

    expected = cells.quality.astype(np.float64)
    left = (cells.scores - expected) / np.sqrt(np.maximum(expected * (1 - expected), 0.01))
    whole = left[~np.isnan(left).any(axis=1)]
    kept = whole[:, whole.std(axis=0) > 0] if len(whole) > 2 else whole[:, :0]
    if kept.shape[1] < 2:
        return 0.0
    pairs = np.corrcoef(kept.T)[np.triu_indices(kept.shape[1], 1)]
    return round(float(np.clip(pairs.mean(), 0.0, 0.95)), 4)


def tune_cascade_routing(
    policy: BudgetPolicy, cells: Cells, *, max_answers: int, signal: Signal, judge: str | None
) -> tuple[BudgetPolicy, CascadeStrategy]:
    """The price and the calibrations with the best score whose mean cost keeps to the bound.

    How much of the measured information is believed is chosen with them, down to nothing, which is
    routing. That is left only for a mean gain of at least its standard error: a table of few
    prompts promises more than there is.

    References:
        Breiman et al., "Classification and Regression Trees" (1984): the rule of one standard
        error.

    Raises:
        RouterError: The bound is missing, or cannot be kept.
    """
    import numpy as np

    from evals.calibrate import find_price

    routed = find_price(policy, cells.names, cells.quality.astype(np.float32), cells.costs)
    bound = policy.max_mean_cost
    assert bound is not None, "find_price has seen it"
    calibrations, correlation = calibrations_of(cells), correlation_of(cells)
    found: list[tuple[NDArray[np.float64], BudgetPolicy, CascadeStrategy]] = []
    bar: tqdm[Any] = tqdm(total=len(TRUST) * PRICE_STEPS, unit="replay", delay=2)
    for trust in TRUST if calibrations else TRUST[-1:]:
        believed = {
            name: one.model_copy(update={"information": round(trust * one.information, 4)})
            for name, one in calibrations.items()
            if trust * one.information > 0
        }
        strategy = CascadeStrategy(
            max_answers=max_answers,
            signal=signal,
            judge=judge,
            calibrations=believed,
            correlation=correlation,
        )
        price = routed
        if believed and max_answers > 1:
            price = _price(policy, strategy, cells, bound, bar)
        priced = policy.model_copy(update={"price": price})
        made = replay(strategy, priced, cells)
        if made.spent(cells.costs).mean() <= bound * (1 + 1e-9):
            scores = cells.scores[np.arange(len(made.given)), made.given]
            found.append((scores, priced, strategy))
    bar.close()
    if not found:
        raise RouterError(f"no cascade keeps to a mean cost of {bound:g}")
    scores, priced, strategy = max(found, key=lambda one: float(np.nanmean(one[0])))
    gains = scores - found[-1][0]
    known = gains[~np.isnan(gains)]
    if known.mean() < known.std() / len(known) ** 0.5:
        return found[-1][1:]
    return priced, strategy


def _price(
    policy: BudgetPolicy, strategy: CascadeStrategy, cells: Cells, bound: float, bar: tqdm[Any]
) -> float:
    """The least price whose mean cost keeps to the bound, by halving the ratio of two prices."""
    low, high = 1e-2 / cells.costs.max(), 1e2 / cells.costs.max()
    for _ in range(PRICE_STEPS):
        middle = float((low * high) ** 0.5)
        made = replay(strategy, policy.model_copy(update={"price": middle}), cells)
        if made.spent(cells.costs).mean() <= bound:
            high = middle
        else:
            low = middle
        bar.update()
    return float(high)


def tune_cascade(
    cells: Cells, *, bound: float, max_answers: int, signal: Signal, judge: str | None
) -> CascadeStrategy:
    """The order and thresholds with the best score whose mean cost keeps to the bound.

    Orders go from cheaper to dearer models; each answer but the last has a threshold of its own.

    Raises:
        RouterError: No order keeps to the bound.
    """
    import numpy as np

    calibrations = calibrations_of(cells)
    expected = cells.quality.astype(np.float64)
    chances = expected.copy()
    for j, name in enumerate(cells.names):
        if name in calibrations:
            for row in np.flatnonzero(~np.isnan(cells.signals[:, j])):
                signal_of, before = float(cells.signals[row, j]), float(expected[row, j])
                chances[row, j] = calibrations[name].chance(signal_of, before)
    by_cost = np.argsort(cells.costs.mean(axis=0), kind="stable").tolist()
    sizes = range(1, min(max_answers, 3, len(by_cost)) + 1)
    orders = [order for size in sizes for order in itertools.combinations(by_cost, size)]
    best: tuple[float, tuple[int, ...], tuple[float, ...]] | None = None
    for order in tqdm(orders, unit="order", delay=2):
        grids = [np.quantile(chances[:, j], np.linspace(0, 1, THRESHOLDS)) for j in order[:-1]]
        for thresholds in itertools.product(*(np.unique(grid).tolist() for grid in grids)):
            score, cost = _chained(cells, chances, expected, order, thresholds)
            if cost <= bound and (best is None or score > best[0]):
                best = (score, order, thresholds)
    if best is None:
        raise RouterError(f"no cascade keeps to a mean cost of {bound:g}")
    _, order, thresholds = best
    return CascadeStrategy(
        mode="cascade",
        max_answers=max(1, len(order)),
        signal=signal,
        judge=judge,
        calibrations={
            cells.names[j]: calibrations[cells.names[j]]
            for j in order
            if cells.names[j] in calibrations
        },
        order=tuple(cells.names[j] for j in order),
        thresholds=tuple(round(t, 6) for t in thresholds) or (0.0,),
    )


def _chained(
    cells: Cells,
    chances: NDArray[np.float64],
    expected: NDArray[np.float64],
    order: Sequence[int],
    thresholds: Sequence[float],
) -> tuple[float, float]:
    """Mean score and cost of going through an order, as ``replay`` does it."""
    import numpy as np

    going = np.ones(len(chances), bool)
    best, given = np.full(len(chances), -1.0), np.zeros(len(chances), np.intp)
    cost = np.zeros(len(chances))
    for stage, j in enumerate(order):
        cost[going] += cells.costs[going, j]
        quality = chances[:, j]
        if stage == len(order) - 1:
            # The last answer is streamed if it is expected to be the best, and not judged then.
            quality = np.where(expected[:, j] >= best, np.inf, quality)
        better = going & (quality > best)
        best[better], given[better] = quality[better], j
        if stage < len(thresholds):
            going &= best < thresholds[stage]
    picked = cells.scores[np.arange(len(given)), given]
    return float(np.nanmean(picked)), float(cost.mean())


def simulated_threshold(
    weak: tuple[NDArray[np.float64], NDArray[np.float64]],
    strong: NDArray[np.float64],
    *,
    charge: float,
) -> float:
    """The threshold of a cascade of two with the best mean score less what strong answers cost.

    With a small and a medium model in the place of a medium and a big one it can be found before
    the big one has any outcomes.

    Args:
        weak: Chance that the weak model's answer is right, and its score, shape (n_prompts,) each.
        strong: Scores of the strong one, same shape.
        charge: Points of quality that a strong answer costs.

    References:
        Danesh et al., "YRC-Bench" (arXiv:2502.09583): simulated validation with a weaker stand-in.
    """
    import numpy as np

    chances, scores = weak
    known = ~np.isnan(chances + scores + strong)
    order = np.argsort(chances[known], kind="stable")
    gains = np.cumsum((strong[known] - scores[known] - charge)[order])
    rising = chances[known][order]
    # Answers of equal chance stop or go on together.
    ends = np.append(rising[1:] != rising[:-1], True)
    worth = np.where(ends, gains, -np.inf)
    if not len(worth) or worth.max() <= 0:
        return 0.0
    last = int(worth.argmax())
    return float(rising[last + 1]) if last + 1 < len(rising) else 1.0
