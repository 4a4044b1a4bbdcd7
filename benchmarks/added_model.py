"""A model added with a few hundred labelled prompts, against training with all of its scores.

    python -m benchmarks.added_model --data DIR [--tables NAME ...] [--methods NAME ...]
    python -m benchmarks.added_model --data DIR --split test   (when all choices are made)

Each model in turn is left out, the router is trained on the others, and the model is added with its
scores on random training prompts. Compared are the mean scores of decisions (the model of highest
predicted quality) with those of the same router trained on all models, prompt by prompt.
Cross-validation sees only the rows of the split ``train``; tables as in ``benchmarks.tables``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.pages import command_line, how_judged, parser_of, with_interval, write
from benchmarks.tables import FOLDS, TABLES, load, parts_of
from evals.metrics import bootstrap_mean, chosen, paired_difference
from routers.base import Query, Router
from routers.outcomes import OutcomeTable
from routers.params import parse_settings
from routers.registry import get_router_class

METHODS = ("kmeans", "nexus", "ridge", "uniroute")
PROMPTS = 400


def run(
    parts: list[OutcomeTable], method: str, settings: dict[str, Any], n_prompts: int, seed: int
) -> dict[str, Any]:
    """Mean scores of decisions with all models trained, and the differences for each one added."""
    models = parts[0].models
    full: list[NDArray[np.float64]] = []
    added: list[NDArray[np.float64]] = []
    for number, table in enumerate(parts):
        full.append(judged(get_router_class(method)(**settings).fit(table), table))
        columns = []
        for left_out, name in enumerate(models):
            rng = np.random.default_rng([seed, number, left_out])
            router = joined(table, name, get_router_class(method)(**settings), n_prompts, rng)
            columns.append(judged(router, table))
        added.append(np.stack(columns, axis=1))
    reference, scores = np.concatenate(full), np.concatenate(added)
    # Each prompt is judged once per added model; its mean is one value, so that intervals hold.
    return {
        "full": bootstrap_mean(reference)._asdict(),
        "added": bootstrap_mean(scores.mean(axis=1))._asdict(),
        "difference": paired_difference(scores.mean(axis=1), reference)._asdict(),
        "models": {
            name: paired_difference(scores[:, j], reference)._asdict()
            for j, name in enumerate(models)
        },
    }


def joined(
    table: OutcomeTable, name: str, router: Any, n_prompts: int, rng: np.random.Generator
) -> Router:
    """A router trained on the other models, with one added by its scores on random prompts."""
    router.fit(table.restricted_to([other for other in table.models if other != name]))
    texts, scores = table.with_prompts_of("train").texts, table.scores("train", [name])[:, 0]
    labelled = np.flatnonzero(~np.isnan(scores))
    some = rng.choice(labelled, min(n_prompts, len(labelled)), replace=False)
    found: Router = router.add_model(name, [texts[row] for row in some], scores[some])
    return found


def judged(router: Router, table: OutcomeTable) -> NDArray[np.float64]:
    """Scores of the models it predicts the highest quality of, shape (n_test_prompts,)."""
    queries = [Query(text) for text in table.with_prompts_of("test").texts]
    quality = router.predict(queries, table.models).quality
    return chosen(table.scores("test"), quality.argmax(axis=1).astype(np.intp))


def markdown(
    command: str, results: dict[str, dict[str, Any]], split: str | None, n_prompts: int
) -> str:
    """The results as a page."""
    how = how_judged(split, FOLDS)
    lines = [
        f"# A model added with {n_prompts} labelled prompts",
        "",
        f"`{command}`: {how}; 95% intervals, in points. Each model in turn is left out, the router "
        "trained on the others, and the model added with its scores on random training prompts; "
        "mean over the models. Difference: to the same router trained on all models, prompt by "
        "prompt. Worst: the model that joining costs the most.",
        "",
        "| table | method | all trained | one added | difference | worst |",
        "|---|---|--:|--:|--:|---|",
    ]
    for table, methods in results.items():
        for method, found in methods.items():
            worst = min(found["models"], key=lambda name: found["models"][name]["mean"])
            lines.append(
                f"| {table} | {method} | {100 * found['full']['mean']:.1f} | "
                f"{100 * found['added']['mean']:.1f} | {points(found['difference'])} | "
                f"{points(found['models'][worst])} `{worst}` |"
            )
    return "\n".join(lines) + "\n"


def points(found: dict[str, Any]) -> str:
    """A difference with its interval, in points."""
    return with_interval(found, "+.2f", scale=100)


def main() -> None:
    """Print the page, and write it with all numbers as JSON where wanted."""
    parser = parser_of(__doc__, tables=TABLES, seed="of folds and of prompts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="'METHOD KEY=VALUE'")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of an added model")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {name: {} for name in arguments.tables}
    todo = [(name, wanted) for name in arguments.tables for wanted in arguments.methods]
    for name, wanted in tqdm(todo, unit="run", delay=2):
        table = load(arguments.data, name)
        parts = parts_of(table, arguments.split, arguments.seed)
        method, *settings = wanted.split()
        results[name][wanted] = run(
            parts, method, parse_settings(settings), arguments.prompts, arguments.seed
        )
    page = markdown(command_line(), results, arguments.split, arguments.prompts)
    print(page)
    write(arguments.out, page, results)


if __name__ == "__main__":
    main()
