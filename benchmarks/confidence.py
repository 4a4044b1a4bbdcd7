"""What ``coe`` says of its own certainty: calibration, coverage, and texts unlike all it learnt.

    python -m benchmarks.confidence --data DIR                 (validation rows, cross-validation)
    python -m benchmarks.confidence --data DIR --split test    (when all choices are made)

``DIR`` holds ``clinc150`` and the tables of ``benchmarks.tables``. Three questions:

* Are in-scope texts of ``clinc150`` told from out-of-scope ones, of which it learnt from none? It
  is calibrated on in-scope validation texts, so ``--split test`` alone is fair to the last digit.
* Are training prompts of an ``mmlu_pro`` category, all left out of training, told from others?
* Is the probability of the category calibrated, and do the likely ones cover the true one?
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pages import command_line, parser_of, with_interval, write
from benchmarks.tables import TABLES, load, part, parts_of
from evals.metrics import auroc, bootstrap_mean
from routers.base import Explanation, Query
from routers.category_classifier import expected_calibration_error
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable, Prompts

LEAST_ROWS = 50
RESAMPLES = 200


def intents(data: Path, split: str) -> tuple[OutcomeTable, list[str], NDArray[np.bool_]]:
    """In-scope texts as a table, and the texts to judge on with whether each is in scope."""
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "clinc150" / "intents.parquet").to_pylist()
    known = [row for row in rows if row["intent"] != "oos" and row["split"] != "test"]
    prompts = Prompts(
        [str(number) for number in range(len(known))],
        [row["text"] for row in known],
        [row["intent"] for row in known],
        [row["split"] for row in known],
    )
    judged = [row for row in rows if row["split"] == split]
    inside = np.array([row["intent"] != "oos" for row in judged])
    scores = {"score": np.ones((len(known), 1))}
    table = OutcomeTable(prompts, models=["any"], numbers=scores)
    return table, [row["text"] for row in judged], inside


def explained(router: CoERouter, texts: list[str]) -> list[Explanation]:
    """What it says of each text."""
    return router.predict([Query(text) for text in texts], router.models).explanations


def told_apart(explanations: list[Explanation], inside: NDArray[np.bool_]) -> dict[str, Any]:
    """AUROC of two signs of being at home, each with a bootstrap interval."""
    signs = {
        "familiarity": np.array([e.detail["familiarity"] for e in explanations]),
        "confidence": np.array([float(e.confidence or 0.0) for e in explanations]),
    }
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"inside": int(inside.sum()), "outside": int((~inside).sum())}
    for name, values in signs.items():
        draws = []
        for _ in range(RESAMPLES):
            rows = rng.integers(0, len(values), len(values))
            draws.append(auroc(values[rows], inside[rows]))
        low, high = np.quantile(draws, [0.025, 0.975])
        found[name] = {"auroc": auroc(values, inside), "low": float(low), "high": float(high)}
    return found


def left_out(data: Path, split: str) -> dict[str, Any]:
    """For each ``mmlu_pro`` category: its prompts against others of a split, it being left out."""
    table = OutcomeTable.load(data / "mmlu_pro")
    labels = np.array(table.prompts.categories)
    rows = {name: table.rows(name) for name in ("train", "validation", split)}
    found = {}
    for category in sorted(set(labels)):
        away = rows["train"][labels[rows["train"]] == category]
        if len(away) < LEAST_ROWS:
            continue
        learn = rows["train"][labels[rows["train"]] != category]
        check = rows["validation"][labels[rows["validation"]] != category]
        learnt = part(table, learn, check)
        prompts = replace(
            learnt.prompts, splits=["train"] * len(learn) + ["validation"] * len(check)
        )
        router = CoERouter().fit(
            OutcomeTable(prompts, models=table.models, numbers={"score": learnt.scores("all")})
        )
        home = rows[split][labels[rows[split]] != category]
        texts = [table.prompts.texts[row] for row in (*home, *away)]
        inside = np.arange(len(texts)) < len(home)
        found[category] = told_apart(explained(router, texts), inside)
    return found


def calibration(data: Path, name: str, split: str | None) -> dict[str, Any]:
    """Calibration and coverage on rows that were not learnt from."""
    table = load(data, name)
    judged = split if split and table.has_split(split) else None
    confidence: list[float] = []
    correct: list[bool] = []
    held: list[bool] = []
    sizes: list[int] = []
    for one in parts_of(table, judged, seed=0):
        router = CoERouter().fit(one)
        prompts = one.with_prompts_of("test")
        for true, e in zip(prompts.categories or [], explained(router, prompts.texts), strict=True):
            confidence.append(float(e.confidence or 0.0))
            correct.append(e.category == true)
            held.append(true in e.detail["likely"])
            sizes.append(len(e.detail["likely"]))
    coverage = bootstrap_mean(np.array(held, float))
    return {
        "judged": judged or "cross-validated",
        "rows": len(held),
        "accuracy": float(np.mean(correct)),
        "ece": expected_calibration_error(np.array(confidence), np.array(correct)),
        "coverage": {"mean": coverage.mean, "low": coverage.low, "high": coverage.high},
        "likely_categories": float(np.mean(sizes)),
    }


def markdown(command: str, found: dict[str, Any], split: str | None) -> str:
    """All of it as a page."""
    judged = split or "validation"
    lines = [
        "# Confidence of the category router",
        "",
        f"`{command}`; 95% intervals. AUROC: the chance that a text from inside looks more at home "
        "than one from outside. Familiarity is what `coe` reports; confidence is the probability "
        "of the likeliest category, for comparison. Outside of `mmlu_pro` are the training prompts "
        "of the category that was left out.",
        "",
        "## Texts unlike all it learnt",
        "",
        "| | inside | outside | familiarity | confidence |",
        "|---|--:|--:|--:|--:|",
    ]

    def cells(one: dict[str, Any]) -> str:
        return " | ".join(
            with_interval(one[sign], keys=("auroc", "low", "high"))
            for sign in ("familiarity", "confidence")
        )

    one = found["clinc150"]
    lines.append(
        f"| `clinc150` {judged}, in scope or not | {one['inside']} | {one['outside']} | "
        f"{cells(one)} |"
    )
    for category, one in found["mmlu_pro"].items():
        lines.append(
            f"| `mmlu_pro` {judged}, without {category} | {one['inside']} | {one['outside']} | "
            f"{cells(one)} |"
        )
    values = [one["familiarity"]["auroc"] for one in found["mmlu_pro"].values()]
    lines += ["", f"Mean over the categories of `mmlu_pro`: {np.mean(values):.3f}."]
    lines += [
        "",
        "## Calibration and coverage",
        "",
        "Likely categories are to hold the true one in 90 % of cases.",
        "",
        "| | rows | accuracy | ECE | coverage | likely categories |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, one in found["calibration"].items():
        lines.append(
            f"| {name}, {one['judged']} | {one['rows']} | {one['accuracy']:.3f} | "
            f"{one['ece']:.3f} | {with_interval(one['coverage'])} | "
            f"{one['likely_categories']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, and write it where wanted."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--split", help="judge on this split; a table without it is cross-validated"
    )
    arguments = parser.parse_args()
    judged = arguments.split or "validation"
    table, texts, inside = intents(arguments.data, judged)
    found: dict[str, Any] = {
        "clinc150": told_apart(explained(CoERouter().fit(table), texts), inside),
        "mmlu_pro": left_out(arguments.data, judged),
        "calibration": {
            name: calibration(arguments.data, name, arguments.split)
            for name in TABLES
            if name != "mmlu_pro frontier"  # the prompts of mmlu_pro open
        },
    }
    page = markdown(command_line(), found, arguments.split)
    print(page)
    write(arguments.out, page, found)


if __name__ == "__main__":
    main()
