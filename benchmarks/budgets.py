"""``coe`` under budgets of active parameters, beside a priced policy and all single models.

    python -m benchmarks.budgets --data DIR
    python -m benchmarks.budgets --data DIR --split test   (when all choices are made)

For each bound on the mean number of active parameters ``coe`` plans its table of experts, and
decides on rows it has not seen; wrong categories make what is reached differ from the plan. The
other curve is ``coe`` with the policy ``budget``, whose price is found on
the training rows. Cross-validation sees only the rows of the split ``train``.

The plans' optima are checked against every possible assignment, where there are few enough.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.pages import command_line, how_judged, parser_of, with_interval, write
from benchmarks.tables import load, parts_of
from evals.calibrate import find_price
from evals.metrics import bootstrap_mean, chosen, paired_difference
from orchestrator.policies import BudgetPolicy
from routers.assignment import assign
from routers.base import Query, RouterError
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable
from routers.training import shrunken_means

TABLE = "mmlu_pro open"
FOLDS = 3
# Besides the size of each model; 13 and 31 are what published compositions were given.
BUDGETS = (5.0, 6.0, 7.0, 10.0, 13.0, 20.0, 31.0, 45.0, 60.0)
# Experts to the power of so many categories are all tried: 7,776 assignments of six experts.
FEW = 5
CASES = 200

CURVES = {
    "plan": "`coe max_active_params_b=...`",
    "price": "`coe`, policy `budget`",
}


def sizes_of(table: OutcomeTable) -> NDArray[np.float64]:
    """Active parameters of each model, in billions."""
    return np.array([table.cards[name]["active_params_b"] for name in table.models], np.float64)


def decided(
    parts: list[OutcomeTable], budgets: list[float]
) -> dict[str, dict[float, dict[str, Any]]]:
    """Choices on the parts' test rows and planned parameters, by curve and budget."""
    found: dict[str, dict[float, dict[str, Any]]] = {
        name: {budget: {"choice": [], "planned": []} for budget in budgets} for name in CURVES
    }
    bar = tqdm(total=len(parts) * (len(budgets) + 1), unit="training", delay=2)
    for table in parts:
        learnt, judged = table.with_prompts_of("train"), table.with_prompts_of("test")
        queries = [Query(text) for text in judged.texts]
        soft = CoERouter().fit(table)
        known = soft.predict([Query(text) for text in learnt.texts], table.models).quality
        quality = soft.predict(queries, table.models).quality
        router = CoERouter()
        bar.update()
        for budget in budgets:
            policy = BudgetPolicy(type="budget", cost="active_params_b", max_mean_cost=budget)
            costs = np.tile(sizes_of(table), (len(known), 1))
            price = find_price(policy, table.models, known, costs)
            priced = policy.model_copy(update={"price": price})
            on_train = priced.choices(table.models, known, costs)
            choice = priced.choices(
                table.models, quality, np.tile(sizes_of(table), (len(quality), 1))
            )
            found["price"][budget]["choice"].append(choice)
            found["price"][budget]["planned"].append(float(sizes_of(table)[on_train].mean()))
            router.max_active_params_b = budget
            router.fit(table)
            predicted = router.predict(queries, table.models).quality
            picks = dict(zip(router.categories_ or [], router.quality_.argmax(axis=1), strict=True))
            planned = sizes_of(table)[[picks[name] for name in learnt.categories or ()]].mean()
            found["plan"][budget]["choice"].append(predicted.argmax(axis=1))
            found["plan"][budget]["planned"].append(float(planned))
            bar.update()
    bar.close()
    return found


def curve(
    scores: NDArray[np.float64], sizes: NDArray[np.float64], found: dict[float, dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each budget planned, used and scored."""
    points = []
    for budget, made in found.items():
        choice = np.concatenate(made["choice"])
        points.append(
            {
                "budget_b": budget,
                "planned_b": float(np.mean(made["planned"])),
                "reached_b": float(sizes[choice].mean()),
                "score": bootstrap_mean(chosen(scores, choice))._asdict(),
            }
        )
    return points


def against_models(
    scores: NDArray[np.float64],
    table: OutcomeTable,
    points: list[dict[str, Any]],
    found: dict[float, dict[str, Any]],
) -> dict[str, Any]:
    """For each model the best point of no more parameters, less the model's scores."""
    lines = {}
    for column, name in enumerate(table.models):
        size = sizes_of(table)[column]
        # A plan for one model alone has its parameters, up to rounding.
        below = [point for point in points if point["reached_b"] <= size + 1e-9]
        line: dict[str, Any] = {
            "params_b": float(size),
            "score": bootstrap_mean(scores[:, column])._asdict(),
            "dominated": False,
        }
        if below:
            best = max(below, key=lambda point: point["score"]["mean"])
            choice = np.concatenate(found[best["budget_b"]]["choice"])
            gain = paired_difference(chosen(scores, choice), scores[:, column])
            line |= {
                "budget_b": best["budget_b"],
                "reached_b": best["reached_b"],
                "difference": gain._asdict(),
                "dominated": gain.mean >= 0,
            }
        lines[name] = line
    return lines


def brute_force(table: OutcomeTable, seed: int) -> dict[str, dict[str, int]]:
    """How often the programme's optimum is that of trying everything, on the training rows."""
    rng = np.random.default_rng(seed)
    names = table.with_prompts_of("train").categories or []
    known = sorted(set(names))
    labels = np.array([known.index(name) for name in names], np.intp)
    quality = shrunken_means(table.scores("train"), labels, len(known), 10.0)[:-1]
    weights = np.bincount(labels) / len(labels)
    active = sizes_of(table)
    total = np.array([table.cards[name]["total_params_b"] for name in table.models], np.float64)
    every = np.array(list(itertools.product(range(len(active)), repeat=FEW)), np.intp)
    kept = np.array([[j in row for j in range(len(active))] for row in every]) @ total
    counts = {}
    for kind in ("active", "total", "active and total"):
        equal = 0
        for _ in range(CASES):
            some = rng.choice(len(known), FEW, replace=False)
            share = weights[some] / weights[some].sum()
            bounds = {
                "active": rng.uniform(active.min(), active.max()),
                "total": rng.uniform(total.min(), total.sum()),
            }
            limits = {what: bounds[what] for what in kind.split(" and ")}
            worth = (quality[some][np.arange(FEW), every] * share).sum(axis=1)
            within = (active[every] @ share <= limits.get("active", np.inf)) & (
                kept <= limits.get("total", np.inf)
            )
            equal += same(quality[some], share, active, total, limits, worth[within])
        counts[f"{kind}, {FEW} categories"] = {"cases": CASES, "equal": equal}
    equal = 0
    groups = [list(g) for n in range(1, len(total) + 1)
              for g in itertools.combinations(range(len(total)), n)]  # fmt: skip
    for _ in range(CASES):
        bound = rng.uniform(total.min(), total.sum())
        worth = np.array(
            [quality[:, g].max(axis=1) @ weights for g in groups if total[g].sum() <= bound]
        )
        equal += same(quality, weights, active, total, {"total": bound}, worth)
    counts[f"total, all {len(known)} categories"] = {"cases": CASES, "equal": equal}
    return counts


def same(
    quality: NDArray[np.float64],
    weights: NDArray[np.float64],
    active: NDArray[np.float64],
    total: NDArray[np.float64],
    limits: dict[str, float],
    worth: NDArray[np.float64],
) -> bool:
    """Whether the programme keeps to the limits and is worth what the best of all others is."""
    try:
        picks = assign(
            quality,
            weights,
            total_params_b=total if "total" in limits else None,
            max_total_params_b=limits.get("total"),
            active_params_b=active if "active" in limits else None,
            max_active_params_b=limits.get("active"),
        )
    except RouterError:
        return not len(worth)
    reached = float(weights @ quality[np.arange(len(quality)), picks])
    keeps = weights @ active[picks] <= limits.get("active", np.inf) + 1e-6 and (
        total[np.unique(picks)].sum() <= limits.get("total", np.inf) + 1e-6
    )
    return bool(len(worth) and keeps and abs(reached - worth.max()) < 1e-9)


def run(parts: list[OutcomeTable], whole: OutcomeTable, seed: int) -> dict[str, Any]:
    """Both curves, each compared with every single model, and the check of the programme."""
    sizes = sizes_of(whole)
    budgets = sorted({*BUDGETS, *sizes.tolist()})
    scores = np.concatenate([table.scores("test") for table in parts])
    found = decided(parts, budgets)
    results: dict[str, Any] = {"models": {}, "curves": {}}
    for name in CURVES:
        points = curve(scores, sizes, found[name])
        results["curves"][name] = points
        results["models"][name] = against_models(scores, whole, points, found[name])
    results["brute_force"] = brute_force(whole, seed)
    return results


def markdown(command: str, results: dict[str, Any], split: str | None) -> str:
    """The results as a page."""
    how = how_judged(split, FOLDS)
    lines = [
        "# Budgets of active parameters",
        "",
        f"`{command}`: `{TABLE}`, {how}; 95% intervals, parameters in billions. Planned: mean over "
        "the training rows; reached: over the judged ones, where categories are guessed.",
    ]
    for name, title in CURVES.items():
        lines += ["", f"## {title}", "", "| at most | planned | reached | mean score |"]
        lines += ["|--:|--:|--:|--:|"]
        lines += [
            f"| {point['budget_b']:g} | {point['planned_b']:.1f} | {point['reached_b']:.1f} | "
            f"{with_interval(point['score'])} |"
            for point in results["curves"][name]
        ]
        lines += [
            "",
            "Every single model, and the best point, in hindsight, of no more parameters:",
            "",
        ]
        lines += ["| model | active | mean score | the point's | difference | as good |"]
        lines += ["|---|--:|--:|--:|--:|---|"]
        for model, line in results["models"][name].items():
            point = difference = "none"
            if "difference" in line:
                point = f"{line['reached_b']:.1f} of {line['budget_b']:g}"
                difference = with_interval(line["difference"], "+.3f")
            lines.append(
                f"| {model} | {line['params_b']:g} | {with_interval(line['score'])} | {point} | "
                f"{difference} | {'yes' if line['dominated'] else 'no'} |"
            )
    lines += [
        "",
        "## The programme against trying everything",
        "",
        "Random budgets and, where said, random categories, with the training rows' qualities.",
        "",
        "| budget | cases | equal |",
        "|---|--:|--:|",
    ]
    lines += [f"| {kind} | {n['cases']} | {n['equal']} |"
              for kind, n in results["brute_force"].items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, and write it with all numbers as JSON where wanted."""
    parser = parser_of(__doc__, seed="of folds and of random cases")
    arguments = parser.parse_args()
    table = load(arguments.data, TABLE)
    parts = parts_of(table, arguments.split, arguments.seed, FOLDS)
    results = run(parts, table, arguments.seed)
    page = markdown(command_line(), results, arguments.split)
    print(page)
    write(arguments.out, page, results)


if __name__ == "__main__":
    main()
