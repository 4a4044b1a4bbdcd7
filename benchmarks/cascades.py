"""Cascades beside routing: what asking a second expert brings when its answer can be judged.

    python -m benchmarks.cascades --data DIR [--tables NAME ...]

The router learns from the split ``train``; prices, thresholds and calibrations are found on
``validation``; everything is judged once on ``test``. Outcome tables hold no answers, so what an
answer says of itself is simulated: the true score seen through normal noise, as strong as a judge
with a stated AUROC (the chance that a right answer gets the higher signal than a wrong one). The
noise is independent of prompt and expert. Judging is taken to cost nothing, as the tokens'
probabilities do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cost_curves import TABLES, Costs, cells, load
from benchmarks.pages import command_line, parser_of, with_interval, write
from evals.calibrate import find_price
from evals.cascades import (
    Cells,
    Replay,
    calibrations_of,
    replay,
    simulated_threshold,
    tune_cascade,
    tune_cascade_routing,
)
from evals.decisions import expected_of
from evals.metrics import auroc, best_single_choice, bootstrap_mean, chosen, paired_difference
from orchestrator.policies import BudgetPolicy, UtilityPolicy
from orchestrator.strategies.cascade import CascadeStrategy
from routers.base import Query
from routers.outcomes import OutcomeTable
from routers.registry import get_router_class

# What ``blend`` chooses on all of these tables.
ROUTER = "coe"
# AUROC of the judges; none judges nothing.
JUDGES = (None, 0.7, 0.8, 0.9)
# Where budgets lie between the cheapest model and the best single one.
BUDGETS = {"low": 0.15, "middle": 0.4, "high": 0.8}
MAX_ANSWERS = 3
CHARGES = (0.02, 0.05, 0.1, 0.2)


class Part:
    """One split of a table as a replay sees it, without signals, and what was measured.

    Attributes:
        cells: Of the prompts on which every model was run and its cost is known.
        costs: Measured, else expected, in the unit of the table.
        latency: Seconds, NaN where unknown, same shape.
    """

    def __init__(
        self, router: Any, table: OutcomeTable, timed: OutcomeTable, kind: Costs, split: str
    ) -> None:
        scores, costs = table.scores(split), cells(table, kind, split, table.models)
        whole = np.asarray(~np.isnan(scores + costs).any(axis=1))
        prompts = table.with_prompts_of(split)
        texts = [text for text, kept in zip(prompts.texts, whole.tolist(), strict=True) if kept]
        quality = router.predict([Query(text) for text in texts], table.models).quality
        expected = expected_of(router, UtilityPolicy(cost=kind.unit), table, texts, table.models)
        nothing = np.full(quality.shape, np.nan)
        self.cells = Cells(
            table.models, quality.astype(np.float64), expected, scores[whole], nothing
        )
        self.costs = costs[whole]
        self.latency = timed.latency_s(split, table.models)[whole]

    def judged(self, strength: float | None, seed: int) -> Cells:
        """The cells with the signals of a judge."""
        old = self.cells
        if strength is None:
            return old
        rng = np.random.default_rng(seed)
        signals = distance(strength) * old.scores + rng.standard_normal(old.scores.shape)
        return Cells(old.names, old.quality, old.costs, old.scores, signals)


def distance(strength: float) -> float:
    """How far apart, in standard deviations, such a judge sees a right and a wrong answer."""
    return 2**0.5 * NormalDist().inv_cdf(strength)


def compared(tuned: Part, judged: Part, strength: float | None, best: int, seed: int) -> Any:
    """Routing, plain cascade and cascade routing at each budget."""
    learn, look = tuned.judged(strength, seed), judged.judged(strength, seed + 1)
    means = learn.costs.mean(axis=0)
    found: dict[str, Any] = {}
    for name, share in BUDGETS.items():
        bound = float((1 - share) * means.min() + share * means[best])
        policy = BudgetPolicy(type="budget", max_mean_cost=bound)
        price = find_price(policy, learn.names, learn.quality.astype(np.float32), learn.costs)
        routed = policy.model_copy(update={"price": price})
        plain = tune_cascade(
            learn, bound=bound, max_answers=MAX_ANSWERS, signal="logprob", judge=None
        )
        priced, cascade = tune_cascade_routing(
            policy, learn, max_answers=MAX_ANSWERS, signal="logprob", judge=None
        )
        single = CascadeStrategy(max_answers=1)
        lines = {
            "routing": line(single, routed, look, judged),
            "plain cascade": line(plain, routed, look, judged),
            "cascade routing": line(cascade, priced, look, judged),
        }
        own = lines["cascade routing"]
        for other in ("routing", "plain cascade"):
            gap = own["scores"] - lines[other]["scores"]
            spent = own["costs"] - lines[other]["costs"]
            own[f"less {other}"] = bootstrap_mean(gap)._asdict()
            own[f"less {other}, at equal cost"] = bootstrap_mean(gap - price * spent)._asdict()
        believed = max((one.information for one in cascade.calibrations.values()), default=0.0)
        found[name] = {
            "bound": bound,
            "price": price,
            "order": plain.order,
            "thresholds": plain.thresholds,
            "most_information": believed,
            "lines": {
                label: {key: value for key, value in one.items() if key not in ("scores", "costs")}
                for label, one in lines.items()
            },
        }
    return found


def line(
    strategy: CascadeStrategy, policy: BudgetPolicy, look: Cells, judged: Part
) -> dict[str, Any]:
    """Score, cost, calls and seconds of one way to answer."""
    started = time.perf_counter()
    made = replay(strategy, policy, look)
    microseconds = (time.perf_counter() - started) / len(made.given) * 1e6
    scores = chosen(look.scores, made.given)
    costs = made.spent(judged.costs)
    return {
        "scores": scores,
        "costs": costs,
        "score": bootstrap_mean(scores)._asdict(),
        "cost": float(costs.mean()),
        "expected_cost": float(made.spent(look.costs).mean()),
        "answers": float(made.answers.mean()),
        "most_answers": int(made.answers.max()),
        "given_other_than_last": share_not_last(made),
        "latency_s": float(np.nanmean(made.spent(judged.latency)))
        if not np.isnan(judged.latency).all()
        else None,
        "microseconds": microseconds,
    }


def share_not_last(made: Replay) -> float:
    """How often an earlier answer than the last is given."""
    pairs = zip(made.asked, made.given.tolist(), strict=True)
    return float(np.mean([asked[-1] != given for asked, given in pairs]))


def bounds_of(judged: Part, best: int) -> dict[str, Any]:
    """The best single model, and the best answer to each prompt at the least cost."""
    scores, costs = judged.cells.scores, judged.costs
    top = scores == scores.max(axis=1, keepdims=True)
    oracle = np.where(top, costs, np.inf).argmin(axis=1)
    return {
        name: {
            "score": bootstrap_mean(chosen(scores, choice))._asdict(),
            "cost": float(chosen(costs, choice).mean()),
        }
        for name, choice in (("best single", np.full(len(scores), best)), ("oracle", oracle))
    }


def stand_ins(tuned: Part, judged: Part, best: int, strength: float, seed: int) -> dict[str, Any]:
    """What is lost by finding a threshold with weaker stand-ins for both models."""
    learn, look = tuned.judged(strength, seed), judged.judged(strength, seed + 1)
    means, costs = learn.scores.mean(axis=0), learn.costs.mean(axis=0)
    small = int(costs.argmin())
    between = [j for j in range(len(means)) if costs[small] < costs[j] < costs[best]]
    if not between:
        return {}
    medium = max(between, key=lambda j: means[j])
    calibrations = calibrations_of(learn)

    def chances(seen: Cells, j: int) -> NDArray[np.float64]:
        known = calibrations[seen.names[j]]
        pairs = zip(seen.signals[:, j].tolist(), seen.quality[:, j].tolist(), strict=True)
        return np.array([known.chance(signal, quality) for signal, quality in pairs])

    def utility(threshold: float, charge: float) -> NDArray[np.float64]:
        going = chances(look, medium) < threshold
        return np.where(going, look.scores[:, best] - charge, look.scores[:, medium])

    lines = {}
    for charge in CHARGES:
        simulated = simulated_threshold(
            (chances(learn, small), learn.scores[:, small]), learn.scores[:, medium], charge=charge
        )
        true = simulated_threshold(
            (chances(learn, medium), learn.scores[:, medium]), learn.scores[:, best], charge=charge
        )
        got, could = utility(simulated, charge), utility(true, charge)
        ends = [utility(0.0, charge), utility(2.0, charge)]
        lines[f"{charge:g}"] = {
            "simulated": simulated,
            "true": true,
            "utility": bootstrap_mean(got)._asdict(),
            "with_true": bootstrap_mean(could)._asdict(),
            "lost": paired_difference(could, got)._asdict(),
            "better_constant": max(float(end.mean()) for end in ends),
        }
    names = [learn.names[j] for j in (small, medium, best)]
    return {"models": names, "charges": lines}


def run(data: Path, name: str, split: str, seed: int) -> dict[str, Any]:
    """Everything about one table."""
    kind, table = TABLES[name], load(data, name)
    router = get_router_class(ROUTER)().fit(table)
    timed = OutcomeTable.load(data / kind.folder)
    tuned = Part(router, table, timed, kind, "validation")
    judged = Part(router, table, timed, kind, split)
    categories = table.with_prompts_of("train").categories
    best = best_single_choice(table.scores("train"), categories)
    found: dict[str, Any] = {
        "n_models": len(table.models),
        "n_tuned": len(tuned.costs),
        "n_judged": len(judged.costs),
        "bounds": bounds_of(judged, best),
        "judges": {},
        "stand_ins": {},
    }
    for strength in JUDGES:
        label = "none" if strength is None else f"{strength:g}"
        found["judges"][label] = {
            "auroc": reached(judged.judged(strength, seed + 1)),
            "budgets": compared(tuned, judged, strength, best, seed),
        }
        if strength is not None:
            found["stand_ins"][label] = stand_ins(tuned, judged, best, strength, seed)
    return found


def reached(look: Cells) -> float | None:
    """The judge's AUROC on fully right against fully wrong answers of a model, on average."""
    if np.isnan(look.signals).all():
        return None
    values = []
    for j in range(len(look.names)):
        clear = np.isin(look.scores[:, j], (0.0, 1.0))
        values.append(auroc(look.signals[clear, j], look.scores[clear, j] == 1.0))
    return float(np.nanmean(values))


def unnamed(found: dict[str, Any]) -> dict[str, Any]:
    """The results without names of models, for tables that may not be copied."""
    for judge in found["judges"].values():
        for one in judge["budgets"].values():
            one["order"] = len(one["order"])
    for one in found["stand_ins"].values():
        one.pop("models", None)
    return found


def verdict(lines: dict[str, Any]) -> str:
    """Whether cascade routing is below the better of the others, by the whole interval."""
    own = lines["cascade routing"]
    better = max(("routing", "plain cascade"), key=lambda name: lines[name]["score"]["mean"])
    gap = own[f"less {better}, at equal cost"]
    if better == "routing" and gap["low"] == gap["high"] == 0:
        return "the same"
    if gap["low"] > 0:
        return "better"
    if gap["high"] < 0:
        return "**worse**"
    return "equal, above" if gap["mean"] >= 0 else "equal, below"


def markdown(command: str, results: dict[str, Any], split: str) -> str:
    """The results as a page."""
    lines = [
        "# Cascades",
        "",
        f"`{command}`: router `{ROUTER}` from the training rows; prices, orders, thresholds and "
        f"calibrations found on validation rows, judged on split `{split}`; 95% intervals over "
        f"prompts, in points. At most {MAX_ANSWERS} answers per prompt. Tables hold no answers, so "
        "judges are simulated: the true score seen through normal noise that is independent of "
        "prompt and expert, as strong as the stated AUROC. Their cost is not counted. Budgets are "
        "mean costs that the tuned rows keep to; `low`, `middle`, `high` lie "
        + ", ".join(f"{share:.0%}" for share in BUDGETS.values())
        + " of the way from the cheapest model to the best single one. Less routing, less plain: "
        "cascade routing's mean score less the other's, where costs that differ are valued at "
        "routing's price. The verdict is against the better of the two; `the same` means that "
        "tuning left it at routing. The best single model with as much spent on further samples "
        "is missing: tables have one answer per cell.",
    ]
    for name, found in results.items():
        kind = TABLES[name]
        bounds = ", ".join(
            f"{label} {with_interval(one['score'])} at {one['cost'] * kind.scale:.4g}"
            for label, one in found["bounds"].items()
        )
        lines += [
            "",
            f"## {name}",
            "",
            f"{found['n_judged']} prompts judged on, {found['n_tuned']} tuned on, "
            f"{found['n_models']} models; costs in {kind.shown}. {bounds}.",
            "",
            "| judge | budget | routing: score, cost | plain cascade: score, cost, answers | "
            "cascade routing: score, cost, answers | less routing | less plain | verdict |",
            "|---|---|--:|--:|--:|--:|--:|---|",
        ]
        for label, judge in found["judges"].items():
            for budget, one in judge["budgets"].items():
                rows = one["lines"]
                own = rows["cascade routing"]
                shown = [
                    f"{row['score']['mean']:.3f}, {row['cost'] * kind.scale:.4g}"
                    + ("" if who == "routing" else f", {row['answers']:.2f}")
                    for who, row in rows.items()
                ]
                lines.append(
                    f"| {label} | {budget}, {one['bound'] * kind.scale:.4g} | "
                    f"{' | '.join(shown)} | {gap(own, 'routing')} | "
                    f"{gap(own, 'plain cascade')} | {verdict(rows)} |"
                )
        lines += ["", counted(found)]
        lines += latency_lines(found) + stand_in_lines(found)
    return "\n".join(lines) + "\n"


def counted(found: dict[str, Any]) -> str:
    """How often each verdict was given."""
    said = Counter(
        verdict(one["lines"]) for judge in found["judges"].values()
        for one in judge["budgets"].values()
    )  # fmt: skip
    listed = ", ".join(f"{words} {count}" for words, count in said.most_common())
    return f"Verdicts, of {said.total()}: {listed}."


def gap(own: dict[str, Any], other: str) -> str:
    """A difference at equal cost, in points."""
    return with_interval(own[f"less {other}, at equal cost"], "+.1f", scale=100)


def latency_lines(found: dict[str, Any]) -> list[str]:
    """Seconds, where known, and how long deciding takes."""
    rows = [
        (label, budget, one["lines"])
        for label, judge in found["judges"].items()
        for budget, one in judge["budgets"].items()
    ]
    micro = [row["cascade routing"]["microseconds"] for _, _, row in rows]
    other = [row["cascade routing"]["given_other_than_last"] for _, _, row in rows]
    said = [
        "",
        f"Deciding, all steps of a prompt together: {np.median(micro):.0f} microseconds in the "
        f"median of these rows. An earlier answer than the last was given to {min(other):.1%} to "
        f"{max(other):.1%} of the prompts.",
    ]
    if any(row["routing"]["latency_s"] is not None for _, _, row in rows):
        said += ["", "| judge | budget | routing, s | plain cascade, s | cascade routing, s |"]
        said += ["|---|---|--:|--:|--:|"]
        for label, budget, by in rows:
            seconds = " | ".join(f"{row['latency_s']:.2f}" for row in by.values())
            said.append(f"| {label} | {budget} | {seconds} |")
    return said


def stand_in_lines(found: dict[str, Any]) -> list[str]:
    """What simulated validation loses."""
    known = {label: one for label, one in found["stand_ins"].items() if one}
    if not known:
        return []
    said = [
        "",
        "Simulated validation: the threshold of (medium, big) found on (small, medium), as if big "
        "had no outcomes yet. Utility: mean score less the charge for each answer of big; the "
        "better constant asks big always or never.",
        "",
        "| judge | charge | threshold, simulated | threshold, true | utility | with the true one | "
        "lost, points | better constant |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for label, one in known.items():
        for charge, row in one["charges"].items():
            said.append(
                f"| {label} | {charge} | {row['simulated']:.3f} | {row['true']:.3f} | "
                f"{row['utility']['mean']:.3f} | {row['with_true']['mean']:.3f} | "
                f"{with_interval(row['lost'], '+.1f', scale=100)} | {row['better_constant']:.3f} |"
            )
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, and write it with all numbers as JSON where wanted."""
    parser = parser_of(__doc__, tables=TABLES)
    parser.add_argument("--split", default="test", help="judge on this split")
    parser.add_argument("--seed", type=int, default=0, help="of the judges")
    options = parser.parse_args(arguments)
    results = {}
    for name in options.tables:
        found = run(options.data, name, options.split, options.seed)
        results[name] = found if TABLES[name].named else unnamed(found)
    page = markdown(command_line(), results, options.split)
    print(page)
    write(options.out, page, results)


if __name__ == "__main__":
    main()
