"""Every router method on outcome tables: cross-validated on training rows, or on a named split.

    python -m benchmarks.routers --data DIR [--tables NAME ...] [--methods NAME ...]
    python -m benchmarks.routers --data DIR --split test      (when all choices are made)

Cross-validation sees only the rows of the split ``train``; it is what settings are chosen by.
``DIR`` holds the tables ``seven_7b``, ``nine_mixed``, ``mmlu_pro`` and ``bfcl``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.decisions import decisions_sha256
from evals.metrics import best_single_choice, bootstrap_mean, chosen, macro_mean, oracle_scores
from routers.base import Query, RouterError
from routers.baselines import category_table_choice
from routers.outcomes import OutcomeTable
from routers.params import parse_settings
from routers.registry import ROUTERS, get_router_class

FOLDS = 5
# Name of a benchmark to its folder and its pool; no pool means all models.
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "seven_7b": ("seven_7b", ()),
    "nine_mixed": ("nine_mixed", ()),
    "mmlu_pro open": (
        "mmlu_pro",
        (
            "Phi-3-mini-4k-instruct",
            "mathstral-7B",
            "Meta-Llama-3_1-8B-Instruct",
            "Mixtral-8x7B-Instruct-v0.1",
            "Qwen1.5-72B-Chat",
            "jamba-1.5-large",
        ),
    ),
    "mmlu_pro frontier": (
        "mmlu_pro",
        (
            "gpt-4o-2024-05-13",
            "gemini-1.5-pro-002",
            "gemini-1.5-flash-002",
            "Meta-Llama-3_1-70B-Instruct",
        ),
    ),
}


def load(data: Path, name: str) -> OutcomeTable:
    """A benchmark's table, restricted to its pool."""
    folder, pool = TABLES[name]
    table = OutcomeTable.load(data / folder)
    return table.restricted_to(list(pool)) if pool else table


def part(table: OutcomeTable, learn: NDArray[np.intp], judge: NDArray[np.intp]) -> OutcomeTable:
    """Some rows as the split ``train``, others as ``test``."""
    return table.resplit({"train": learn, "test": judge})


def folds(table: OutcomeTable, seed: int, n_folds: int = FOLDS) -> Iterator[OutcomeTable]:
    """Parts for cross-validation of the training rows, stratified by category."""
    from sklearn.model_selection import StratifiedKFold

    rows = table.rows("train")
    labels = [table.prompts.categories[row] if table.prompts.categories else "" for row in rows]
    made = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for learn, judge in made.split(rows, labels):
        yield part(table, rows[learn], rows[judge])


def run(
    parts: list[OutcomeTable], methods: dict[str, tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Mean scores of methods and baselines over the parts' test rows."""
    values: dict[str, list[NDArray[np.float64]]] = {}
    seconds: dict[str, float] = {}
    hashes: dict[str, list[str]] = {}
    categories: list[str] = []
    for table in parts:
        texts = table.with_prompts_of("test")
        queries = [Query(text) for text in texts.texts]
        choices = {}
        for name, (method, settings) in methods.items():
            started = time.perf_counter()
            try:
                router = get_router_class(method)(**settings).fit(table)
                quality = router.predict(queries, table.models).quality
            except RouterError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
            choices[name] = quality.argmax(axis=1).astype(np.intp)
            digest = decisions_sha256(texts.ids, [table.models[j] for j in choices[name]])
            hashes.setdefault(name, []).append(digest)
        # Only now are scores of the judged rows looked at.
        scores, train = table.scores("test"), table.scores("train")
        known = table.with_prompts_of("train").categories
        rows = {
            "random": np.nanmean(scores, axis=1),
            "best single": scores[:, best_single_choice(train)],
            "oracle": oracle_scores(scores),
        }
        if known is not None and texts.categories is not None:
            categories += texts.categories
            by_table = category_table_choice(train, known, texts.categories)
            in_hindsight = category_table_choice(scores, texts.categories, texts.categories)
            rows["category table"] = chosen(scores, by_table)
            rows["category oracle"] = chosen(scores, in_hindsight)
        rows |= {name: chosen(scores, choice) for name, choice in choices.items()}
        for name, row in rows.items():
            values.setdefault(name, []).append(row)
    lines: dict[str, dict[str, Any]] = {}
    for name, found in values.items():
        joined = np.concatenate(found)
        mean = bootstrap_mean(joined)
        lines[name] = {"mean": mean.mean, "low": mean.low, "high": mean.high}
        if len(categories) == len(joined):
            lines[name]["macro"] = macro_mean(joined, categories).mean
        reference = np.concatenate(values["category table" if categories else "best single"])
        gain = bootstrap_mean(joined - reference)
        lines[name] |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        lines[name]["seconds"] = seconds.get(name, 0.0)
        if name in hashes:
            lines[name]["decisions_sha256"] = hashes[name]
    return lines


def text(name: str, lines: dict[str, Any]) -> str:
    """The lines as a table, best last."""
    head = (
        f"{name:<34}{'mean':>7}{'interval':>15}{'by cat.':>9}{'against category table':>27}{'s':>7}"
    )
    rows = [head]
    for label, line in sorted(lines.items(), key=lambda item: item[1]["mean"]):
        rows.append(
            f"  {label:<32}{line['mean']:7.3f}  {line['low']:.3f}-{line['high']:.3f}"
            f"{line.get('macro', float('nan')):9.3f}"
            f"   {line['gain']:+.3f} ({line['gain_low']:+.3f} to {line['gain_high']:+.3f})"
            f"{line['seconds']:7.1f}"
        )
    return "\n".join(rows)


def markdown(command: str, results: dict[str, Any], split: str | None) -> str:
    """The tables as a page."""
    how = f"split `{split}`" if split else f"{FOLDS}-fold cross-validation of the training rows"
    lines = [
        "# Routers on outcome tables",
        "",
        f"`{command}`: {how}; 95% intervals. Gain: against the category table on the same prompts, "
        "which is told each prompt's true category; routers are not. Seconds: training and "
        "predicting, vectors of the prompts known. All decisions were made and hashed before a "
        "score of the judged rows was read; the JSON file beside this one has the hashes.",
    ]
    for name, found in results.items():
        lines += ["", f"## {name}", ""]
        lines += ["| | mean score | by category | gain | s |", "|---|--:|--:|--:|--:|"]
        for label, line in sorted(found.items(), key=lambda item: item[1]["mean"]):
            lines.append(
                f"| {label} | {line['mean']:.3f} ({line['low']:.3f} to {line['high']:.3f}) | "
                f"{line.get('macro', float('nan')):.3f} | {line['gain']:+.3f} "
                f"({line['gain_low']:+.3f} to {line['gain_high']:+.3f}) | {line['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print one table per benchmark, and write all of it as JSON where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--methods", nargs="+", help="'METHOD' or 'METHOD KEY=VALUE ...'")
    parser.add_argument("--split", help="judge on this split instead of cross-validating")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    # 'bert' takes hours on a CPU: it runs where --methods names it.
    plain = [name for name in ROUTERS if name not in ("random", "best_single", "bert")]
    methods = {}
    for wanted in arguments.methods or plain:
        method, *settings = wanted.split()
        methods[wanted] = (method, parse_settings(settings))
    results = {}
    for name in arguments.tables:
        table = load(arguments.data, name)
        if arguments.split:
            parts = [part(table, table.rows("train"), table.rows(arguments.split))]
        else:
            parts = list(folds(table, arguments.seed))
        results[name] = run(parts, methods)
        print(text(name, results[name]) + "\n", flush=True)
    if arguments.out:
        command = "python -m benchmarks.routers " + shlex.join(sys.argv[1:])
        page = markdown(command, results, arguments.split)
        arguments.out.with_suffix(".md").write_text(page, encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
