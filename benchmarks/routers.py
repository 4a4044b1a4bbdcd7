"""Every router method on outcome tables: cross-validated on training rows, or on a named split.

    python -m benchmarks.routers --data DIR [--tables NAME ...] [--methods NAME ...]
    python -m benchmarks.routers --data DIR --split test      (when all choices are made)

Cross-validation sees only the rows of the split ``train``; it is what settings are chosen by.
``DIR`` holds the tables ``seven_7b``, ``nine_mixed``, ``mmlu_pro`` and ``bfcl``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pages import GAIN, command_line, how_judged, parser_of, with_interval, write
from benchmarks.tables import FOLDS, TABLES, load, parts_of
from evals.decisions import decisions_sha256
from evals.metrics import best_single_choice, bootstrap_mean, chosen, macro_mean, oracle_scores
from routers.base import Query, RouterError
from routers.baselines import category_table_choice
from routers.outcomes import OutcomeTable
from routers.params import parse_settings
from routers.registry import ROUTERS, get_router_class


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
            "best single": scores[:, best_single_choice(train, known)],
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
            f"   {with_interval(line, '+.3f', keys=GAIN)}{line['seconds']:7.1f}"
        )
    return "\n".join(rows)


def markdown(command: str, results: dict[str, Any], split: str | None) -> str:
    """The tables as a page."""
    how = how_judged(split, FOLDS)
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
                f"| {label} | {with_interval(line)} | {line.get('macro', float('nan')):.3f} | "
                f"{with_interval(line, '+.3f', keys=GAIN)} | {line['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print one table per benchmark, and write all of it as JSON where wanted."""
    parser = parser_of(__doc__, tables=TABLES, seed="of the folds")
    parser.add_argument("--methods", nargs="+", help="'METHOD' or 'METHOD KEY=VALUE ...'")
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
        results[name] = run(parts_of(table, arguments.split, arguments.seed), methods)
        print(text(name, results[name]) + "\n", flush=True)
    write(arguments.out, markdown(command_line(), results, arguments.split), results)


if __name__ == "__main__":
    main()
