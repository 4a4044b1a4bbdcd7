"""Evaluations as text, JSON and files. Computes nothing; ``evals.html_report`` draws."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from evals.decisions import Decisions
from evals.evaluate import Evaluation, Line
from evals.figures import Figures
from evals.metrics import Estimate
from routers.base import RouterError

__all__ = [
    "FIGURES",
    "as_json",
    "as_text",
    "category_rows",
    "figure_rows",
    "head",
    "row_of",
    "with_interval",
    "write_decisions",
    "write_quality",
]

MACRO = "mean of the category means"
GAP = "share of the way from best single to oracle"
BOUND = "no deployed router can reach it"


FIGURES = {
    "regret": "score lost against the oracle",
    "recall@1": "the model predicted best is right, of prompts that some model gets right",
    "recall@3": "one of the three predicted best is right",
    "rare@1": "recall@1 where at most three models are right",
    "ECE": "expected calibration error of the predicted quality",
    "AIQ": "mean height of the cost-quality curve's convex hull, up to the dearest of all points",
    "PerfGain": "best score on the curve, relative to the best single model's",
    "CostSave": "cost saved where the curve is as good as the best single model",
    "ParetoDist": "mean distance of the curve to the Pareto frontier of all",
    "APGR": "of two models: mean share of the strong one's gain over all shares of strong calls",
    "CPT(80%)": "of two models: least share of strong calls that brings 80 % of the gain",
    "us": "microseconds of a decision, encoding included, median",
}


def as_text(evaluation: Evaluation) -> str:
    """A table for the terminal."""
    rows = [head(evaluation), *(row_of(line) for line in evaluation.lines)]
    lines = [
        f"{evaluation.n_prompts} prompts of split {evaluation.split!r}, "
        f"{len(evaluation.candidates)} models, policy {evaluation.policy.type!r} at cost-quality "
        f"{evaluation.cost_quality:g}",
        "",
        *_aligned(rows),
        "",
        f"macro: {MACRO}; gap: {GAP}; *: {BOUND}",
    ]
    categories = list(evaluation.lines[0].by_category)
    if categories:
        lines += ["", "Mean score by category", "", *_aligned(category_rows(evaluation))]
    shares = [line for line in evaluation.lines if line.kind == "router"]
    lines += ["", "Share of prompts by chosen model"]
    for line in shares:
        parts = sorted(line.shares.items(), key=lambda item: -item[1])
        lines.append(f"  {line.name}: " + ", ".join(f"{m} {share:.1%}" for m, share in parts))
        lines.append(f"  {line.name}: {evaluation.fallbacks[line.name]} fallbacks")
        found = evaluation.figures[line.name]
        if found.best_of_asked is not None:
            lines.append(
                f"  {line.name}: {found.experts_asked:.2f} models asked per prompt; best of their "
                f"scores {with_interval(found.best_of_asked)}"
            )
    lines += ["", "Further figures of the routers", "", *_aligned(figure_rows(evaluation))]
    lines += ["", *(f"{name}: {meaning}" for name, meaning in FIGURES.items())]
    lines += ["", f"table sha256      {evaluation.table_sha256}"]
    for name, digest in evaluation.decisions.items():
        lines.append(f"decisions sha256  {digest}  {name}")
    lines += [f"note: {note}" for note in evaluation.notes]
    return "\n".join(lines) + "\n"


def head(evaluation: Evaluation) -> list[str]:
    """Names of the columns of ``row_of``."""
    columns = ["", "n", "score", "95% interval", "macro", "vs best single", "vs random", "gap"]
    return [*columns, evaluation.cost_unit]


def row_of(line: Line) -> list[str]:
    """A line as cells."""
    return [
        f"{line.name}" + (" *" if line.kind == "bound" else ""),
        str(line.score.n),
        _number(line.score.mean),
        f"{_number(line.score.low)}-{_number(line.score.high)}",
        _number(line.macro.mean) if line.macro else "-",
        _difference(line.versus.get("best single")),
        _difference(line.versus.get("random")),
        f"{line.gap_closed:+.0%}" if math.isfinite(line.gap_closed) else "-",
        f"{line.cost:.3g}" if math.isfinite(line.cost) else "-",
    ]


def category_rows(evaluation: Evaluation) -> list[list[str]]:
    """Mean scores by category as a table, the head first."""
    shown = [line for line in evaluation.lines if line.kind != "model"]
    rows = [["", "n", *(line.name for line in shown)]]
    for category, estimate in evaluation.lines[0].by_category.items():
        cells = [with_interval(line.by_category[category]) for line in shown]
        rows.append([category, str(estimate.n), *cells])
    return rows


def figure_rows(evaluation: Evaluation) -> list[list[str]]:
    """Further figures of the routers as a table, the head first."""
    rows = [["", *FIGURES]]
    for name, found in evaluation.figures.items():
        estimates = (found.regret, found.recall, found.recall_3, found.rare_recall)
        plain = (found.calibration_error, found.aiq, found.perf_gain, found.cost_save,
                 found.pareto_distance, found.apgr, found.cpt_80)  # fmt: skip
        rows.append([name, *map(with_interval, estimates), *map(_number, plain),
                     f"{found.microseconds:.0f}"])  # fmt: skip
    return rows


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def with_interval(estimate: Estimate) -> str:
    """Mean and interval, or a dash."""
    if not estimate.n:
        return "-"
    return f"{estimate.mean:.3f} ({estimate.low:.2f}-{estimate.high:.2f})"


def _difference(estimate: Estimate | None) -> str:
    if estimate is None or not estimate.n:
        return "-"
    return f"{estimate.mean:+.3f} ({estimate.low:+.3f} {estimate.high:+.3f})"


def _aligned(rows: list[list[str]]) -> list[str]:
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
    # A time is no property of the decisions: left out, so that a report can be made again.
    del values["microseconds"]
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
        "gap_closed": _finite(line.gap_closed),
        "cost": _finite(line.cost),
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
