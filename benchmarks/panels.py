"""Strategies that ask several experts, replayed on outcome tables beside the router's first choice.

    python -m benchmarks.panels --data DIR [--tables NAME ...]

The router learns from the split ``train`` and orders the models by predicted quality; nothing is
tuned. Tables hold scores and no answers, so what strategies make of them is simulated or bounded:

* ``best_of``: the judge sees the true score through noise, as in ``benchmarks.cascades``.
* ``vote``: answers that score at least one half agree with each other. Whether wrong ones do is not
  known, so there are two lines: they never agree, and they always do. Ties go to the first.
* ``hedge``: the second is asked when the first has taken longer than the 95th percentile of its
  times on training rows, and the first whole answer is given.
* ``fallback``: one call in ten fails at once, with ``single`` under the same failures beside it.

What fusion and chains would have written cannot be known from scores. Costs are those of all calls,
also of those that would be cancelled; times are those of the slowest that is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.cascades import ROUTER, Part, distance
from benchmarks.cost_curves import TABLES, load
from benchmarks.pages import GAIN, command_line, parser_of, with_interval, write
from evals.metrics import best_single_choice, bootstrap_mean, paired_difference
from orchestrator.policies import order_by_utility
from routers.outcomes import OutcomeTable
from routers.registry import get_router_class

JUDGES = (0.7, 0.8, 0.9)
FAILING = 0.1
RIGHT = 0.5


class Way(NamedTuple):
    """One way to answer every prompt; all arrays have shape (n_prompts,).

    Attributes:
        scores: Of the answers that are given.
        costs: Of all calls.
        calls: How many.
        seconds: Until the answer, NaN where unknown.
    """

    scores: NDArray[np.float64]
    costs: NDArray[np.float64]
    calls: NDArray[np.float64]
    seconds: NDArray[np.float64]


class Panel:
    """The judged prompts with each one's models in the order in which they would be asked.

    Attributes:
        scores: Shape (n_prompts, n_models), best predicted first, as all that follow.
        costs: Measured, else expected.
        seconds: NaN where unknown.
        waits: Seconds after which each one's second is asked.
        noise: Of judges.
        fails: Which calls fail.
    """

    def __init__(self, part: Part, waits: NDArray[np.float64], seed: int) -> None:
        pairs = zip(part.cells.quality.tolist(), part.costs.tolist(), strict=True)
        order = np.array([order_by_utility(quality, costs) for quality, costs in pairs])
        self.scores = np.take_along_axis(part.cells.scores, order, axis=1)
        self.costs = np.take_along_axis(part.costs, order, axis=1)
        self.seconds = np.take_along_axis(part.latency, order, axis=1)
        self.waits = waits[order]
        rng = np.random.default_rng(seed)
        self.noise = rng.standard_normal(order.shape)
        self.fails = rng.random(order.shape) < FAILING

    def asked(self, given: NDArray[np.intp], n: int) -> Way:
        """The first ``n`` are asked together, and one of their answers is given."""
        rows = np.arange(len(given))
        calls = np.full(len(given), float(n))
        slowest = self.seconds[:, :n].max(axis=1)
        return Way(self.scores[rows, given], self.costs[:, :n].sum(axis=1), calls, slowest)

    def best_of(self, n: int, strength: float) -> Way:
        """A judge of this AUROC chooses among the first ``n``."""
        signals = distance(strength) * self.scores[:, :n] + self.noise[:, :n]
        return self.asked(signals.argmax(axis=1), n)

    def vote(self, n: int, *, wrong_agree: bool) -> Way:
        """The answer most agree with, of the first ``n``."""
        right = self.scores[:, :n] >= RIGHT
        votes = np.where(right, right.sum(axis=1, keepdims=True), 1)
        if wrong_agree:
            votes = np.where(right, votes, (~right).sum(axis=1, keepdims=True))
        return self.asked(votes.argmax(axis=1), n)

    def hedge(self) -> Way:
        """A second is asked where the first takes long."""
        first, second, wait = self.seconds[:, 0], self.seconds[:, 1], self.waits[:, 0]
        hedged = first > wait
        later = hedged & (wait + second < first)
        return Way(
            np.where(later, self.scores[:, 1], self.scores[:, 0]),
            self.costs[:, 0] + np.where(hedged, self.costs[:, 1], 0.0),
            1.0 + hedged,
            np.where(later, wait + second, first),
        )

    def tried(self, n: int) -> Way:
        """One after the other until one of the first ``n`` does not fail; failures cost nothing."""
        works = ~self.fails[:, :n]
        place, rows = works.argmax(axis=1), np.arange(len(works))
        answered = works.any(axis=1)
        return Way(
            np.where(answered, self.scores[rows, place], 0.0),
            np.where(answered, self.costs[rows, place], 0.0),
            np.where(answered, place + 1.0, float(n)),
            np.where(answered, self.seconds[rows, place], np.nan),
        )

    def chosen(self, place: NDArray[np.intp]) -> Way:
        """One call each, known or named beforehand."""
        rows = np.arange(len(place))
        ones = np.ones(len(place))
        return Way(
            self.scores[rows, place], self.costs[rows, place], ones, self.seconds[rows, place]
        )


def ways(panel: Panel, best: Way, *, timed: bool) -> dict[str, Way]:
    """Every line of a table's section, in order."""
    first = np.zeros(len(panel.scores), np.intp)
    top = panel.scores == panel.scores.max(axis=1, keepdims=True)
    lines = {
        "single": panel.chosen(first),
        "best single model": best,
        "oracle": panel.chosen(np.where(top, panel.costs, np.inf).argmin(axis=1)),
        "vote of 3, wrong answers never agree": panel.vote(3, wrong_agree=False),
        "vote of 3, wrong answers always agree": panel.vote(3, wrong_agree=True),
    }
    for n in (2, 3):
        for strength in JUDGES:
            lines[f"best of {n}, judge {strength:g}"] = panel.best_of(n, strength)
    if timed:
        lines["hedge"] = panel.hedge()
    lines["single, one call in ten fails"] = panel.tried(1)
    lines["fallback, one call in ten fails"] = panel.tried(3)
    return lines


def run(data: Path, name: str, split: str, seed: int) -> list[dict[str, Any]]:
    """The lines of one table."""
    kind, table = TABLES[name], load(data, name)
    router = get_router_class(ROUTER)().fit(table)
    times = OutcomeTable.load(data / kind.folder)
    part = Part(router, table, times, kind, split)
    trained = times.latency_s("train", table.models)
    timed = not np.isnan(trained).all()
    waits = np.nanquantile(trained, 0.95, axis=0) if timed else np.full(len(table.models), np.nan)
    panel = Panel(part, waits, seed)
    best = best_single_choice(table.scores("train"), table.with_prompts_of("train").categories)
    alone = Way(
        part.cells.scores[:, best], part.costs[:, best], np.ones(len(part.costs)),
        part.latency[:, best],
    )  # fmt: skip
    found = ways(panel, alone, timed=timed)
    reference = found["single"].scores
    return [described(label, way, reference) for label, way in found.items()]


def described(label: str, way: Way, reference: NDArray[np.float64]) -> dict[str, Any]:
    """One line's figures."""
    gain = dict(zip(GAIN, paired_difference(way.scores, reference)[:3], strict=True))
    known = way.seconds[~np.isnan(way.seconds)]
    return {
        "name": label,
        "n": len(way.scores),
        **bootstrap_mean(way.scores)._asdict(),
        **gain,
        "cost": bootstrap_mean(way.costs)._asdict(),
        "calls": float(way.calls.mean()),
        "seconds": None
        if not len(known)
        else {f"p{share}": float(np.quantile(known, share / 100)) for share in (50, 95, 99)},
    }


def markdown(command: str, results: dict[str, list[dict[str, Any]]], split: str) -> str:
    """The results as a page."""
    lines = [
        "# Panels: strategies that ask several, replayed",
        "",
        f"`{command}`: router `{ROUTER}` from the training rows, judged on split `{split}`, "
        "nothing tuned; 95% intervals over prompts. `single` is the router's first choice, by "
        "quality alone. Tables hold scores and no answers. Judges are simulated: the true score "
        "seen through independent noise, as strong as the stated AUROC; their cost and time are "
        f"not counted. Of votes, answers that score {RIGHT:g} or more agree; whether wrong ones do "
        "is not known, so the truth lies between two lines. Hedge: the second model is asked after "
        "the 95th percentile of the first one's training times. Costs are those of all calls, "
        "cancelled ones in full; a failing call costs nothing. The best single model with as many "
        "samples is missing, as tables have one answer per cell; so are fusion and chain. What "
        "cascades make of the same tables at equal cost: [cascades](cascades.md).",
    ]
    for name, rows in results.items():
        kind = TABLES[name]
        timed = any(row["seconds"] for row in rows)
        lines += ["", f"## {name}", "", f"{rows[0]['n']} prompts; costs in {kind.shown}.", ""]
        lines.append(
            "| | score | less `single` | cost | calls |"
            + (" seconds: median, 95 %, 99 % |" if timed else "")
        )
        lines.append("|---|--:|--:|--:|--:|" + ("--:|" if timed else ""))
        for row in rows:
            cells = [
                row["name"],
                with_interval(row),
                with_interval(row, "+.3f", keys=GAIN),
                with_interval(row["cost"], ".4g", scale=kind.scale),
                f"{row['calls']:.2f}",
            ]
            if timed and row["seconds"]:
                cells.append(", ".join(f"{value:.2f}" for value in row["seconds"].values()))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, and write it with all numbers as JSON where wanted."""
    parser = parser_of(__doc__, tables=TABLES)
    parser.add_argument("--split", default="test", help="judge on this split")
    parser.add_argument("--seed", type=int, default=0, help="of judges and failures")
    options = parser.parse_args(arguments)
    results = {
        name: run(options.data, name, options.split, options.seed) for name in options.tables
    }
    page = markdown(command_line(), results, options.split)
    print(page)
    write(options.out, page, results)


if __name__ == "__main__":
    main()
