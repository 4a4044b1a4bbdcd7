"""Evaluations as text, JSON and files. Computes nothing; ``evals.html_report`` draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from evals.decisions import Decisions
from evals.evaluate import Evaluation, Line
from evals.figures import Figures
from evals.metrics import UNKNOWN, Estimate
from routers.base import RouterError

__all__ = [
    "LEGEND",
    "as_json",
    "as_markdown",
    "as_text",
    "category_rows",
    "difference_rows",
    "facts_of",
    "figure_rows",
    "line_rows",
    "markdown_table",
    "title_of",
    "with_interval",
    "write_decisions",
    "write_quality",
]

LEGEND = (
    "macro: mean of the category means; gap: share of the way from best single to the oracle, "
    "category gap: to the category oracle; brackets: 95% intervals, of differences prompt by "
    "prompt; *: no deployed router can reach it"
)

# Figures by name: the field, and what it means.
FIGURES = {
    "regret": ("regret", "utility lost against the oracle: score, and cost if the knob is below 1"),
    "recall@1": ("recall", "the model predicted best is right, of prompts that some model solves"),
    "recall@3": ("recall_3", "one of the three predicted best is right"),
    "rare@1": ("rare_recall", "recall@1 where at most three models are right"),
    "ECE": ("calibration_error", "expected calibration error of the predicted quality"),
    "AIQ": ("aiq", "mean height of the cost-quality curve's hull, up to the dearest point of all"),
    "PerfGain": ("perf_gain", "best score on the curve, relative to the best single model's"),
    "CostSave": ("cost_save", "cost saved where the curve is as good as the best single model"),
    "ParetoDist": ("pareto_distance", "mean distance of the curve to the Pareto frontier of all"),
    "PGR": ("pgr", "of two models: share of the strong one's gain that the decisions bring"),
    "APGR": ("apgr", "the mean of that over all shares of strong calls"),
    "CPT(50%)": ("cpt_50", "least share of strong calls that brings half of the gain"),
    "CPT(80%)": ("cpt_80", "80 % of it"),
    "us": ("microseconds", "microseconds of a decision, encoding included, median"),
    "train s": ("training_s", "seconds of training, where the artefact says"),
}


def as_text(evaluation: Evaluation) -> str:
    """Tables for the terminal."""
    lines = [
        title_of(evaluation),
        "",
        *_aligned(line_rows(evaluation)),
        "",
        LEGEND,
    ]
    if evaluation.lines[0].by_category:
        lines += ["", "Mean score by category", "", *_aligned(category_rows(evaluation))]
    if differences := difference_rows(evaluation):
        lines += ["", "Routers against each other", "", *_aligned(differences)]
    lines += ["", "Share of prompts by chosen model"]
    lines += [f"  {text}" for text in share_lines(evaluation)]
    # Meanings are sentences: they stand to the left.
    rows = figure_rows(evaluation)
    cells = _aligned([row[:-1] for row in rows])
    lines += ["", "Further figures of the routers", ""]
    lines += [f"{text}  {row[-1]}".rstrip() for text, row in zip(cells, rows, strict=True)]
    return "\n".join([*lines, "", *facts_of(evaluation)]) + "\n"


def as_markdown(evaluation: Evaluation) -> str:
    """The same as Markdown; the worst decisions are in the HTML page alone."""
    parts = [
        f"# {title_of(evaluation)}",
        markdown_table(line_rows(evaluation)),
        f"{LEGEND}.",
    ]
    if evaluation.lines[0].by_category:
        parts += ["## Mean score by category", markdown_table(category_rows(evaluation))]
    if differences := difference_rows(evaluation):
        parts += ["## Routers against each other", markdown_table(differences)]
    parts += ["## Share of prompts by chosen model"]
    parts += ["\n".join(f"- {text}" for text in share_lines(evaluation))]
    parts += ["## Further figures of the routers", markdown_table(figure_rows(evaluation))]
    parts += ["\n".join(f"- {fact}" for fact in facts_of(evaluation))]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table, the first as its head."""
    cells = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title_of(evaluation: Evaluation) -> str:
    """What was judged."""
    return (
        f"{evaluation.n_prompts} prompts of split {evaluation.split!r}, "
        f"{len(evaluation.candidates)} models, policy {evaluation.policy.type!r} at cost-quality "
        f"{evaluation.cost_quality:g}"
    )


def facts_of(evaluation: Evaluation) -> list[str]:
    """Hashes and notes."""
    return [
        f"table sha256      {evaluation.table_sha256}",
        *(f"decisions sha256  {digest}  {name}" for name, digest in evaluation.decisions.items()),
        *(f"note: {note}" for note in evaluation.notes),
    ]


def line_rows(evaluation: Evaluation) -> list[list[str]]:
    """Routers, baselines, bounds and single models as a table, the head first."""
    # Without categories there is no such table, and random choice has to do.
    other = "category table" if "category table" in evaluation.lines[0].versus else "random"
    columns = ["", "n", "score", "macro", "vs best single", f"vs {other}", "category gap", "gap"]
    rows = [[*columns, evaluation.cost_unit]]
    for line in evaluation.lines:
        rows.append(
            [
                f"{line.name}" + (" *" if line.kind == "bound" else ""),
                str(line.score.n),
                with_interval(line.score),
                with_interval(line.macro or UNKNOWN),
                _difference(line.versus.get("best single")),
                _difference(line.versus.get(other)),
                _percent(line.category_gap_closed),
                _percent(line.gap_closed),
                f"{line.cost.mean:.3g}" if line.cost.n else "-",
            ]
        )
    return rows


def category_rows(evaluation: Evaluation) -> list[list[str]]:
    """Mean scores by category as a table, the head first."""
    shown = [line for line in evaluation.lines if line.kind != "model"]
    rows = [["", "n", *(line.name for line in shown)]]
    for category, estimate in evaluation.lines[0].by_category.items():
        cells = [with_interval(line.by_category[category]) for line in shown]
        rows.append([category, str(estimate.n), *cells])
    return rows


def difference_rows(evaluation: Evaluation) -> list[list[str]]:
    """Each router's score less each other's, the head first; nothing for one router."""
    routers = [line for line in evaluation.lines if line.kind == "router"]
    if len(routers) < 2:
        return []
    names = [line.name for line in routers]
    return [
        ["", *(f"less {name}" for name in names)],
        *(
            [line.name, *(_difference(line.against.get(name)) for name in names)]
            for line in routers
        ),
    ]


def share_lines(evaluation: Evaluation) -> list[str]:
    """Whom each router chooses, how often."""
    lines = []
    for line in evaluation.lines:
        if line.kind != "router":
            continue
        parts = sorted(line.shares.items(), key=lambda item: -item[1])
        lines.append(f"{line.name}: " + ", ".join(f"{m} {share:.1%}" for m, share in parts))
        lines.append(f"{line.name}: {evaluation.fallbacks[line.name]} fallbacks")
        found = evaluation.figures[line.name]
        if found.best_of_asked is not None:
            lines.append(
                f"{line.name}: {found.experts_asked:.2f} models asked per prompt; best of their "
                f"scores {with_interval(found.best_of_asked)}"
            )
    return lines


def figure_rows(evaluation: Evaluation) -> list[list[str]]:
    """Further figures as a table: a column for each router, and what the figure means."""
    figures = evaluation.figures.values()
    rows = [["", *evaluation.figures, ""]]
    for name, (field, meaning) in FIGURES.items():
        values = [getattr(found, field) for found in figures]
        cells = [
            with_interval(value) if isinstance(value, Estimate) else _number(value)
            for value in values
        ]
        # Most tables have no costs, and most pools more than two models.
        if any(cell != "-" for cell in cells):
            rows.append([name, *cells, meaning])
    return rows


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def with_interval(estimate: Estimate) -> str:
    """Mean and interval, or a dash."""
    if not estimate.n:
        return "-"
    return f"{estimate.mean:.3f} ({estimate.low:.2f}-{estimate.high:.2f})"


def _difference(estimate: Estimate | None) -> str:
    if estimate is None or not estimate.n:
        return "-"
    return f"{estimate.mean:+.3f} ({estimate.low:+.3f} {estimate.high:+.3f})"


def _percent(estimate: Estimate) -> str:
    if not estimate.n:
        return "-"
    return f"{estimate.mean:+.0%} ({estimate.low:+.0%} {estimate.high:+.0%})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *others]).rstrip())
    return lines


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON types; NaN becomes null."""
    return {
        "split": evaluation.split,
        "n_prompts": evaluation.n_prompts,
        "candidates": evaluation.candidates,
        "policy": evaluation.policy.model_dump(exclude_unset=True)
        | {"type": evaluation.policy.type},
        "cost_quality": evaluation.cost_quality,
        "cost_unit": evaluation.cost_unit,
        "table_sha256": evaluation.table_sha256,
        "decisions_sha256": evaluation.decisions,
        "fallbacks": evaluation.fallbacks,
        "lines": [_line_json(line) for line in evaluation.lines],
        "figures": {name: _figures_json(found) for name, found in evaluation.figures.items()},
        "notes": evaluation.notes,
    }


def _figures_json(found: Figures) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for entry in fields(found):
        value = getattr(found, entry.name)
        if isinstance(value, Estimate):
            values[entry.name] = _estimate_json(value)
        elif isinstance(value, float):
            values[entry.name] = _finite(value)
    values["reliability"] = [
        {"predicted": predicted, "score": got, "n": n} for predicted, got, n in found.reliability
    ]
    values["shares"] = found.shares
    values["curve"] = [
        {"cost_quality": knob, "cost": _finite(point.cost), "score": _finite(point.score)}
        for knob, point in found.curve.items()
    ]
    return values


def _line_json(line: Line) -> dict[str, Any]:
    return {
        "name": line.name,
        "kind": line.kind,
        "score": _estimate_json(line.score),
        "macro": _estimate_json(line.macro) if line.macro else None,
        "by_category": {name: _estimate_json(e) for name, e in line.by_category.items()},
        "versus": {name: _estimate_json(e) for name, e in line.versus.items()},
        "against": {name: _estimate_json(e) for name, e in line.against.items()},
        "gap_closed": _estimate_json(line.gap_closed),
        "category_gap_closed": _estimate_json(line.category_gap_closed),
        "cost": _estimate_json(line.cost),
        "shares": line.shares,
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {
        "mean": _finite(estimate.mean),
        "low": _finite(estimate.low),
        "high": _finite(estimate.high),
        "n": estimate.n,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_quality(decisions: Decisions, path: Path) -> None:
    """Write parquet ``prompt_id, model, quality``, one row per prompt and candidate."""
    n_prompts, n_candidates = decisions.quality.shape
    _write_parquet(
        {
            "prompt_id": [p for p in decisions.prompts.ids for _ in range(n_candidates)],
            "model": decisions.candidates * n_prompts,
            "quality": decisions.quality.ravel(),
        },
        path,
    )


def write_decisions(decisions: Decisions, path: Path) -> None:
    """Write parquet ``prompt_id, model``, one row per prompt."""
    _write_parquet({"prompt_id": decisions.prompts.ids, "model": decisions.models}, path)


def _write_parquet(columns: dict[str, Any], path: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise RouterError(
            "writing parquet needs pyarrow: pip install 'collegium[routers]'"
        ) from exc
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
