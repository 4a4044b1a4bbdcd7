"""Methods side by side: what they bring in domain and out of it, their cost, their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evals.metrics import Resamples
from evals.moerging.measure import Measured, Summary, summarise, with_exit
from evals.moerging.methods import METHODS
from evals.moerging.setting import Question
from evals.moerging.taxonomy import AXES
from evals.svg import Plot

__all__ = ["as_json", "as_markdown", "picture"]

ALONE, ORACLE = "base", "oracle adapter"
# Okabe and Ito's, told apart by most colour-blind people.
COLOURS = {"none": "#7f7f7f", "task": "#e69f00", "example": "#0072b2", "step": "#d55e00"}


def as_json(
    made: Mapping[str, Sequence[Measured]],
    questions: Sequence[Question],
    domains: Sequence[str],
    leaves: Sequence[bool] | None = None,
) -> list[dict[str, Any]]:
    """A line per method, in the order of the registry.

    Args:
        made: Measurements of each method, ``base`` among them.
        questions: Those that were asked.
        domains: The domains that have an adapter.
        leaves: Which questions are the base's where methods have an exit, shape (n_questions,);
            none if nobody says.
    """
    inside = np.array([question.domain in domains for question in questions])
    alone = made[ALONE][0]
    oracle = made[ORACLE][0] if ORACLE in made else None
    parts = {"in_domain": np.flatnonzero(inside), "out_of_domain": np.flatnonzero(~inside)}
    # The same for all methods, so that their intervals are of one draw.
    drawn = {where: Resamples(len(places)) for where, places in parts.items() if len(places)}
    lines = []
    for name, method in METHODS.items():
        if name not in made:
            continue
        rows = made[name]
        line: dict[str, Any] = {
            "method": name,
            "taxonomy": None
            if method.taxonomy is None
            else {axis: getattr(method.taxonomy, axis) for axis in AXES},
            "seeds": len(rows),
            "choosing_ms": float(np.mean([row.choosing_ms for row in rows])),
            "reading_ms": float(np.mean([row.reading_ms for row in rows])),
            "relative_time": float(np.mean([row.relative_time for row in rows])),
        }
        for where, resamples in drawn.items():
            there = oracle if where == "in_domain" else None
            line[where] = _plain(summarise(rows, alone, there, parts[where], resamples))
            if leaves is not None:
                left = [with_exit(row, alone, leaves) for row in rows]
                found = summarise(left, alone, there, parts[where], resamples)
                line[where]["with_exit"] = _plain(found)
        lines.append(line)
    return lines


def _plain(summary: Summary) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: getattr(summary, name)._asdict()
        for name in ("loss", "loss_less_base", "exact", "exact_less_base")
    }
    return found | {"gain": None if summary.gain is None else summary.gain._asdict()}


def as_markdown(lines: Sequence[Mapping[str, Any]], title: str, about: str) -> str:
    """Results and the taxonomy as two tables."""
    exits = any("with_exit" in line.get("out_of_domain", {}) for line in lines)
    columns = [
        f"{what}, {where}"
        for where in ("in domain", "out of domain")
        for what in ("loss", "less the base's", "right")
    ]
    columns += ["of the oracle's gain"]
    if exits:
        columns += ["of the oracle's gain, with exit", "out of domain less the base's, with exit"]
    text = [f"# {title}", "", about, "", "## Results", ""]
    text += _head(["method", *columns, "ms to choose", "time to read, of the base's"])
    for line in lines:
        cells = [line["method"]]
        for where in ("in_domain", "out_of_domain"):
            found = line.get(where)
            if found is None:
                cells += ["", "", ""]
            else:
                cells += [
                    f"{found['loss']['mean']:.3f}",
                    _with_interval(found["loss_less_base"]),
                    f"{found['exact']['mean']:.3f}",
                ]
        inside, outside = (line.get(where, {}) for where in ("in_domain", "out_of_domain"))
        cells.append(_share(inside))
        if exits:
            cells.append(_share(inside.get("with_exit", {})))
            left = outside.get("with_exit")
            cells.append("" if left is None else _with_interval(left["loss_less_base"]))
        cells += [
            f"{line['choosing_ms']:.1f}", f"{line['relative_time']:.2f} x",
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "## Taxonomy", "", *_head(["method", *AXES])]
    for line in lines:
        if line["taxonomy"] is not None:
            places = " | ".join(line["taxonomy"][axis] for axis in AXES)
            text.append(f"| {line['method']} | {places} |")
    return "\n".join(text) + "\n"


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _share(found: Mapping[str, Any]) -> str:
    gain = found.get("gain")
    if gain is None:
        return ""
    return f"{gain['mean']:.1%} ({gain['low']:.1%} to {gain['high']:.1%})"


def _with_interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def picture(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss less the base's, in domain and out of it, as SVG; the lower left is best.

    None if all questions are of one kind.
    """
    both = [line for line in lines if "in_domain" in line and "out_of_domain" in line]
    if not both:
        return None
    xs, ys = (
        [line[where]["loss_less_base"]["mean"] for line in both]
        for where in ("in_domain", "out_of_domain")
    )
    plot = Plot("Loss per answer token, less the base's", "in domain", "out of domain", xs, ys)
    for line, x, y in zip(both, xs, ys, strict=True):
        granularity = (line["taxonomy"] or {}).get("granularity", "none")
        plot.dot(x, y, COLOURS[granularity], line["method"])
    kinds = {"none": "references", "task": "one choice for a task", "example": "per query",
             "step": "per token and layer"}  # fmt: skip
    return plot.document([(kinds[kind], colour) for kind, colour in COLOURS.items()])
