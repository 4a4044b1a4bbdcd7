"""Cost-quality curves of ``blend`` and of what it must not lie below.

    python -m benchmarks.cost_curves --data DIR [--tables NAME ...]
    python -m benchmarks.cost_curves --data DIR --split test   (when all choices are made)

Curves are drawn along the knob of the policy ``utility``. Mixing two points of a curve at random
reaches every point between them, so a curve's height is that of its convex hull. Each point of a
baseline is compared with ``blend`` at equal cost, prompt by prompt. Cross-validation sees only the
rows of the split ``train``.

``nine_mixed`` has prices, and costs are those expected from prices and prompt lengths; ``bfcl`` has
measured latencies and tokens, each a table of costs of its own. Its 71 models are reduced to those
that no other beats on the training rows in mean cost and mean score, and the best by score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.pages import command_line, how_judged, parser_of, with_interval, write
from benchmarks.tables import parts_of
from evals.decisions import KNOBS, expected_of
from evals.metrics import (
    Estimate,
    Point,
    aiq,
    best_single_choice,
    bootstrap_mean,
    chosen,
    convex_hull,
    cost_save,
    pareto_frontier,
    perf_gain,
)
from evals.svg import Plot
from orchestrator.costs import CostUnit, ExpectedCosts
from orchestrator.policies import UtilityPolicy
from orchestrator.pool import estimated_tokens
from routers.base import Query
from routers.outcomes import OutcomeTable
from routers.params import parse_settings
from routers.registry import get_router_class
from routers.training import shrunken_means

FOLDS = 3
METHODS = ("blend", "coe", "kmeans", "knn", "ridge", "uniroute")
# Of the models with measured costs, besides those on the frontier.
BEST_MODELS = 8
MIXTURE_STEPS = 20
RESAMPLES = 500
# Okabe and Ito's, as in the pages of ``collegium evaluate``.
CURVE_COLOURS = (
    "#0072b2", "#000000", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8b000",
)  # fmt: skip
MODEL_COLOUR = "#8a8f98"


@dataclass(frozen=True)
class Costs:
    """A table with one kind of cost.

    Attributes:
        folder: Name of the table.
        unit: What policies weigh.
        shown: The unit in pages.
        scale: What costs are multiplied by to have the shown unit.
        named: Whether pages may name its models; without a licence, they get numbers.
    """

    folder: str
    unit: CostUnit
    shown: str
    scale: float = 1.0
    named: bool = False


TABLES = {
    "nine_mixed": Costs("nine_mixed", "usd", "USD per 1,000 prompts", 1e3, named=True),
    "bfcl latency": Costs("bfcl", "latency_s", "seconds per prompt"),
    "bfcl tokens": Costs("bfcl", "usd", "tokens per prompt", 1e6),
}


@dataclass(frozen=True)
class Curve:
    """Operating points, prompt by prompt.

    Attributes:
        scores: Shape (n_prompts, n_points).
        costs: Same shape.
    """

    scores: NDArray[np.float64]
    costs: NDArray[np.float64]

    def points(self, weights: NDArray[np.float64] | None = None) -> list[Point]:
        """Mean cost and score of each point, prompts weighed if wanted."""
        costs = np.average(self.costs, axis=0, weights=weights)
        scores = np.average(self.scores, axis=0, weights=weights)
        return [Point(c, s) for c, s in zip(costs.tolist(), scores.tolist(), strict=True)]


def load(data: Path, name: str) -> OutcomeTable:
    """A table with scores and one kind of cost."""
    kind = TABLES[name]
    table = OutcomeTable.load(data / kind.folder)
    if kind.folder == "nine_mixed":
        return table
    if kind.unit == "latency_s":
        numbers = {"score": table.scores("all"), "latency_s": table.latency_s("all")}
    else:
        # A dollar for a million tokens makes costs of tokens. No model is asked without a token.
        prices = {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 1.0}
        table.cards = {name: dict(prices) for name in table.models}
        tokens = table.costs_usd("all")
        numbers = {"score": table.scores("all"), "cost_usd": np.where(tokens > 0, tokens, np.nan)}
    measured = OutcomeTable(table.prompts, models=table.models, numbers=numbers)
    return measured.restricted_to(pool(measured, kind))


def pool(table: OutcomeTable, kind: Costs) -> list[str]:
    """The models on the training rows' frontier of cost and score, and the best by score."""
    costs, scores = cells(table, kind, "train", table.models), table.scores("train")
    known = [j for j in range(len(table.models)) if np.isnan(costs[:, j]).mean() < 0.5]
    means = np.nanmean(costs, axis=0).tolist(), np.nanmean(scores, axis=0).tolist()
    points = {j: Point(means[0][j], means[1][j]) for j in known}
    best = sorted(known, key=lambda j: -points[j].score)[:BEST_MODELS]
    frontier = pareto_frontier(list(points.values()))
    return [table.models[j] for j in known if j in best or points[j] in frontier]


def cells(
    table: OutcomeTable, kind: Costs, split: str, models: Sequence[str]
) -> NDArray[np.float64]:
    """Costs of a split's cells: measured, else expected from prices and the prompts' lengths."""
    if kind.unit == "latency_s":
        return table.latency_s(split, models)
    costs = table.costs_usd(split, models)
    if not np.isnan(costs).all():
        return costs
    tokens = [estimated_tokens(text) for text in table.with_prompts_of(split).texts]
    return ExpectedCosts.of([table.card(name) for name in models]).usd(tokens)


def curves_of(
    parts: list[OutcomeTable], kind: Costs, methods: Sequence[str]
) -> tuple[dict[str, Curve], dict[str, Curve], dict[str, list[str]]]:
    """Curves of routers and baselines, points of single models, and what was chosen in each part.

    Prompts on which some model's cost was not measured are left out.
    """
    found: dict[str, list[Curve]] = {}
    models = parts[0].models
    made: dict[str, list[str]] = {}
    bar = tqdm(total=len(parts) * len(methods), unit="router", delay=2)
    for table in parts:
        scores, costs = table.scores("test"), cells(table, kind, "test", models)
        whole = np.asarray(~np.isnan(scores + costs).any(axis=1))
        texts = [text for text, kept in zip(table.with_prompts_of("test").texts, whole, strict=True)
                 if kept]  # fmt: skip
        scores, costs = scores[whole], costs[whole]
        qualities: dict[str, NDArray[np.floating]] = {}
        router: Any = None
        for wanted in methods:
            method, *settings = wanted.split()
            router = get_router_class(method)(**parse_settings(settings)).fit(table)
            if "chosen" in router.metrics_:
                made.setdefault(wanted, []).append(str(router.metrics_["chosen"]))
            qualities[wanted] = router.predict([Query(text) for text in texts], models).quality
            bar.update()
        qualities["category table (told)"] = told(table, whole)
        policy = UtilityPolicy(cost=kind.unit)
        expected = expected_of(router, policy, table, texts, models)
        for name, quality in qualities.items():
            choices = [policy.choices(models, quality, expected, cost_quality=k) for k in KNOBS]
            found.setdefault(name, []).append(along(scores, costs, choices))
        learnt = table.with_prompts_of("train").categories
        best = best_single_choice(table.scores("train"), learnt)
        made.setdefault("best single", []).append(models[best])
        cheapest = int(expected.mean(axis=0).argmin())
        ends = along(scores, costs, [np.full(len(texts), j) for j in (cheapest, best)])
        shares = np.linspace(0.0, 1.0, MIXTURE_STEPS + 1)
        mixing = np.stack([1 - shares, shares])
        found.setdefault("random mixture", []).append(
            Curve(ends.scores @ mixing, ends.costs @ mixing)
        )
        found.setdefault("best single", []).append(Curve(ends.scores[:, 1:], ends.costs[:, 1:]))
        for j, name in enumerate(models):
            found.setdefault(f"model {name}", []).append(Curve(scores[:, [j]], costs[:, [j]]))
    bar.close()
    joined = {
        name: Curve(
            np.concatenate([one.scores for one in ones]),
            np.concatenate([one.costs for one in ones]),
        )
        for name, ones in found.items()
    }
    single = {
        name.removeprefix("model "): joined.pop(name)
        for name in list(joined)
        if name.startswith("model ")
    }
    return joined, single, made


def told(table: OutcomeTable, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean training scores of each test prompt's true category, shape (n_kept, n_models)."""
    learnt = table.with_prompts_of("train").categories or []
    asked = np.array(table.with_prompts_of("test").categories)[kept]
    known = sorted(set(learnt))
    labels = np.array([known.index(name) for name in learnt], np.intp)
    means = shrunken_means(table.scores("train"), labels, len(known), 0.0)
    rows = [known.index(name) if name in known else len(known) for name in asked]
    return np.asarray(means[rows])


def along(
    scores: NDArray[np.float64], costs: NDArray[np.float64], choices: Sequence[NDArray[np.intp]]
) -> Curve:
    """What choices scored and cost, prompt by prompt."""
    return Curve(
        np.stack([chosen(scores, choice) for choice in choices], axis=1),
        np.stack([chosen(costs, choice) for choice in choices], axis=1),
    )


def at_equal_cost(curve: Curve, other: Curve, number: int) -> Estimate:
    """How much higher a curve's hull is than one point of another, at the point's cost.

    Two corners of the hull are mixed so that the mean cost is the same. What is left of differences
    in cost, prompt by prompt, is valued at the hull's slope, so that the interval is one of scores
    at equal cost.
    """
    points = curve.points()
    corners = convex_hull(points)
    positions = [points.index(corner) for corner in corners]
    cost = float(other.costs[:, number].mean())
    weights, slope = np.zeros(len(points)), 0.0
    if cost >= corners[-1].cost or len(corners) == 1:
        weights[positions[-1]] = 1.0
    else:
        above = next((i for i, c in enumerate(corners) if c.cost > cost and i > 0), 1)
        a, b = corners[above - 1], corners[above]
        share = max(0.0, (cost - a.cost) / (b.cost - a.cost))
        weights[positions[above - 1]], weights[positions[above]] = 1 - share, share
        slope = (b.score - a.score) / (b.cost - a.cost)
    better = curve.scores @ weights - other.scores[:, number]
    return bootstrap_mean(better - slope * (curve.costs @ weights - other.costs[:, number]))


def equal_quality_cost(points: Sequence[Point], score: float) -> float:
    """Least cost at which a curve's hull has a score; NaN if it never has."""
    corners = convex_hull(points)
    if score <= corners[0].score:
        return corners[0].cost
    for a, b in pairwise(corners):
        if b.score >= score:
            return a.cost + (b.cost - a.cost) * (score - a.score) / (b.score - a.score)
    return float("nan")


def area(curve: Curve, dearest: float, weights: NDArray[np.float64] | None = None) -> float:
    """AIQ up to the same cost for all."""
    return aiq([*curve.points(weights), Point(dearest, 0.0)])


def compared(curves: dict[str, Curve], single: dict[str, Curve], seed: int) -> dict[str, Any]:
    """Figures of every curve, and how the first compares with each of the others."""
    first, *others = (name for name in curves if name != "best single")
    reference = curves["best single"]
    best = reference.points()[0]
    dearest = max(point.cost for curve in [*curves.values(), *single.values()]
                  for point in curve.points())  # fmt: skip
    n_prompts = len(reference.scores)
    rng = np.random.default_rng(seed)
    samples = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), RESAMPLES)
    areas = {name: [area(curves[name], dearest, w) for w in samples] for name in (first, *others)}
    lines = {}
    for name in (first, *others):
        points = curves[name].points()
        shares = [
            equal_quality_cost(curves[name].points(w), reference.points(w)[0].score)
            / reference.points(w)[0].cost
            for w in samples
        ]
        never = float(np.isnan(shares).mean())
        gap = np.array(areas[first]) - np.array(areas[name])
        lines[name] = {
            "points": [point._asdict() for point in points],
            "aiq": area(curves[name], dearest),
            "perf_gain": perf_gain(points, best),
            "cost_save": cost_save(points, best),
            "equal_quality_cost": equal_quality_cost(points, best.score),
            "equal_quality_share": interval(
                equal_quality_cost(points, best.score) / best.cost, np.array(shares)
            ),
            "never_equal": never,
            "aiq_above": interval(area(curves[first], dearest) - area(curves[name], dearest), gap),
            "at_equal_cost": [
                at_equal_cost(curves[first], curves[name], number)._asdict()
                for number in range(len(points))
            ]
            if name != first
            else [],
        }
    return {
        "reference": first,
        "n_prompts": n_prompts,
        "dearest": dearest,
        "best_single": best._asdict(),
        "curves": lines,
        "models": {
            name: {
                **curve.points()[0]._asdict(),
                "at_equal_cost": at_equal_cost(curves[first], curve, 0)._asdict(),
            }
            for name, curve in single.items()
        },
    }


def interval(value: float, samples: NDArray[np.float64]) -> dict[str, float]:
    """A value with the interval of its bootstrap samples that are numbers."""
    known = samples[~np.isnan(samples)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (float("nan"),) * 2
    return {"mean": value, "low": float(low), "high": float(high)}


def below(found: dict[str, Any]) -> list[int]:
    """Points whose whole interval lies below the other curve."""
    return [n for n, one in enumerate(found["at_equal_cost"]) if one["high"] < 0]


def markdown(command: str, results: dict[str, Any], split: str | None, folder: str) -> str:
    """The results as a page."""
    how = how_judged(split, FOLDS)
    lines = [
        "# Cost-quality curves",
        "",
        f"`{command}`: {how}; 95% bootstrap intervals over prompts. A curve is drawn along the "
        "policy's knob; its height between points is that of its convex hull. AIQ: mean height "
        "from the cheapest choice to the dearest single model. PerfGain, CostSave: against the "
        "best single model, at the points themselves. Cost at equal quality: where the hull has "
        "the best single model's score, as a share of its cost. Above, at equal cost: the least "
        "and the greatest difference in points at the other curve's own points, and at how many of "
        "them the whole interval lies below it. Mixtures are chosen on the judged rows themselves.",
    ]
    for name, found in results.items():
        kind, first, best = TABLES[name], found["reference"], found["best_single"]
        lines += ["", f"## {name}", "", f"![curves]({folder}_{name.replace(' ', '_')}.svg)", ""]
        lines += [
            f"{found['n_prompts']} prompts, {len(found['models'])} models. Best single model (by "
            f"training rows): score {best['score']:.3f}, {best['cost'] * kind.scale:.4g} "
            f"{kind.shown}. Chosen in each part: "
            + "; ".join(
                f"{who}: {', '.join(map(str, what))}" for who, what in found["chosen"].items()
            )
            + ".",
            "",
            f"| | AIQ | PerfGain | CostSave | cost at equal quality | AIQ of {first} less this | "
            f"{first} above, at equal cost | points below |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for label, line in found["curves"].items():
            gaps = line["at_equal_cost"]
            low = min(gaps, key=lambda one: one["mean"]) if gaps else None
            high = max(gaps, key=lambda one: one["mean"]) if gaps else None
            against = f"{points(low)} to {100 * high['mean']:+.1f}" if low and high else ""
            area_gap = with_interval(line["aiq_above"], "+.4f") if gaps else ""
            lines.append(
                f"| {label} | {line['aiq']:.4f} | {line['perf_gain']:+.1%} | "
                f"{saved(line)} | {reached(line)}{never(line)} | {area_gap} | {against} | "
                f"{f'{len(below(line))} of {len(gaps)}' if gaps else ''} |"
            )
        lines += ["", f"| single model | {kind.shown} | score | {first} above, at equal cost |"]
        lines += ["|---|--:|--:|--:|"]
        for label, line in sorted(found["models"].items(), key=lambda item: item[1]["cost"]):
            lines.append(
                f"| {label} | {line['cost'] * kind.scale:.4g} | {line['score']:.3f} | "
                f"{points(line['at_equal_cost'])} |"
            )
    return "\n".join(lines) + "\n"


def reached(line: dict[str, Any]) -> str:
    """The cost at equal quality, as a share of the best single model's."""
    found = line["equal_quality_share"]
    return "not reached" if math.isnan(found["mean"]) else with_interval(found, ".2f")


def saved(line: dict[str, Any]) -> str:
    """The cost saved; nothing where no point is as good as the best single model."""
    return "none" if math.isnan(line["cost_save"]) else f"{line['cost_save']:+.0%}"


def never(line: dict[str, Any]) -> str:
    """How often a resampled curve does not have the best single model's score at any cost."""
    share = line["never_equal"]
    return f" ({share:.0%} of resamples never)" if 0 < share < 1 else ""


def points(found: dict[str, float]) -> str:
    """A difference with its interval, in points."""
    return with_interval(found, "+.1f", scale=100)


def picture(name: str, found: dict[str, Any]) -> str:
    """All curves and the single models near them as an SVG."""
    kind = TABLES[name]
    curves = found["curves"]
    on_curves = [point for line in curves.values() for point in line["points"]]
    # Models far off would leave the curves no room.
    worst = min(point["score"] for point in on_curves)
    dearest = 1.2 * max(point["cost"] for point in on_curves)
    models = {
        label: model
        for label, model in found["models"].items()
        if model["score"] >= worst and model["cost"] <= dearest
    }
    known = [*models.values(), *on_curves]
    plot = Plot(
        name,
        f"mean cost, {kind.shown}",
        "mean score",
        [point["cost"] * kind.scale for point in known],
        [point["score"] for point in known],
    )
    for label, model in models.items():
        plot.line([(model["cost"] * kind.scale, model["score"])], MODEL_COLOUR, [label])
    legend = [*zip(curves, CURVE_COLOURS, strict=False), ("single models", MODEL_COLOUR)]
    # The reference is drawn last, so that nothing hides it.
    for label, colour in reversed(legend[:-1]):
        line = curves[label]["points"]
        along_knob = [(point["cost"] * kind.scale, point["score"]) for point in line]
        plot.line(along_knob, colour, [label] * len(line))
    best = found["best_single"]
    plot.dot(best["cost"] * kind.scale, best["score"], MODEL_COLOUR, "best single")
    return plot.document(legend)


def main() -> None:
    """Print the page, and write it with pictures and all numbers as JSON where wanted."""
    parser = parser_of(
        __doc__,
        tables=TABLES,
        seed="of folds and of the bootstrap",
        out="write OUT.md, OUT.json and OUT_TABLE.svg",
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="'METHOD KEY=VALUE'")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.tables:
        table = load(arguments.data, name)
        parts = parts_of(table, arguments.split, arguments.seed, FOLDS)
        curves, single, made = curves_of(parts, TABLES[name], arguments.methods)
        found = compared(curves, single, arguments.seed)
        if not TABLES[name].named:
            by_cost = sorted(found["models"].values(), key=lambda model: model["cost"])
            found["models"] = {f"model {n}": model for n, model in enumerate(by_cost, start=1)}
            del made["best single"]
        results[name] = found | {"chosen": made}
    stem = arguments.out.stem if arguments.out else "cost_curves"
    page = markdown(command_line(), results, arguments.split, stem)
    print(page)
    write(arguments.out, page, results)
    if arguments.out:
        for name, found in results.items():
            file = f"{stem}_{name.replace(' ', '_')}.svg"
            arguments.out.with_name(file).write_text(picture(name, found), encoding="utf-8")


if __name__ == "__main__":
    main()
