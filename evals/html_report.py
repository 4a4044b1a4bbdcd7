"""An evaluation as one self-contained HTML page. Draws; computes nothing."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from evals.evaluate import Evaluation, Line
from evals.figures import Figures, Loss
from evals.report import (
    LEGEND,
    category_rows,
    difference_rows,
    facts_of,
    figure_rows,
    line_rows,
    title_of,
    with_interval,
)
from evals.svg import Plot

__all__ = ["as_html"]

# Hand-checked in light and dark: bars by kind of line.
COLOURS = {"router": "#2a6f97", "baseline": "#8a8f98", "bound": "#c9a227", "model": "#a5b8c4"}
# Okabe and Ito's, which colour-blind readers can tell apart; for routers, in their order.
ROUTER_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SHOWN_CHARACTERS = 400


def as_html(evaluation: Evaluation) -> str:
    """One self-contained page: pictures, tables, the worst decisions, the hashes."""
    parts = [
        _PAGE_HEAD,
        f"<h1>Collegium: {html.escape(title_of(evaluation))}</h1>",
        _bars(evaluation.lines),
        _note(f"Whiskers: 95% intervals; {LEGEND}."),
        _html_table(line_rows(evaluation)),
        '<div class="pair">',
        _curves(evaluation),
        _reliability(evaluation.figures),
        "</div>",
    ]
    if evaluation.lines[0].by_category:
        parts += ["<h2>By category</h2>", _html_table(category_rows(evaluation))]
        parts += [_map(name, evaluation) for name in evaluation.figures]
    if differences := difference_rows(evaluation):
        parts += ["<h2>Routers against each other</h2>", _html_table(differences)]
    parts += ["<h2>Further figures of the routers</h2>", _html_table(figure_rows(evaluation))]
    parts += [_losses(name, found.losses) for name, found in evaluation.figures.items()]
    parts += [_note(fact) for fact in facts_of(evaluation)]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _note(text: str) -> str:
    return f'<p class="small">{html.escape(text)}</p>'


def _colour(number: int) -> str:
    return ROUTER_COLOURS[number % len(ROUTER_COLOURS)]


def _curves(evaluation: Evaluation) -> str:
    """Mean cost against mean score: routers along the knob, single models, bounds."""
    models = [
        line for line in evaluation.lines if line.kind == "model" and line.cost.n and line.score.n
    ]
    known = [(line.cost.mean, line.score.mean) for line in models]
    points = [*known, *((p.cost, p.score) for f in evaluation.figures.values()
                        for p in f.curve.values())]  # fmt: skip
    if not points or not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        return ""
    levels = [
        line
        for line in evaluation.lines
        if line.kind in ("baseline", "bound")
        and line.name in ("category table", "category oracle", "random")
    ]
    plot = Plot(
        "Cost and quality",
        f"mean cost of a prompt, {evaluation.cost_unit}",
        "mean score",
        [x for x, _ in points],
        [*(y for _, y in points), *(line.score.mean for line in levels)],
    )
    for line in levels:
        plot.level(line.score.mean, line.name)
    for line in models:
        plot.dot(line.cost.mean, line.score.mean, COLOURS["baseline"], line.name)
    for number, (name, found) in enumerate(evaluation.figures.items()):
        plot.line(
            [(point.cost, point.score) for point in found.curve.values()],
            _colour(number),
            [f"{name}, cost-quality {knob:g}" for knob in found.curve],
        )
    return plot.figure([(name, _colour(n)) for n, name in enumerate(evaluation.figures)])


def _reliability(figures: dict[str, Figures]) -> str:
    """Predicted quality against score; on the diagonal predictions mean what they say."""
    plot = Plot("Calibration", "predicted quality", "mean score", [0.0, 1.0], [0.0, 1.0])
    plot.line([(0.0, 0.0), (1.0, 1.0)], COLOURS["baseline"], [])
    for number, (name, found) in enumerate(figures.items()):
        plot.line(
            [(predicted, got) for predicted, got, _ in found.reliability],
            _colour(number),
            [f"{name}, {n} predictions" for _, _, n in found.reliability],
        )
    return plot.figure([(name, _colour(n)) for n, name in enumerate(figures)])


def _map(name: str, evaluation: Evaluation) -> str:
    """Who gets which category, and how good each model is there."""
    scores = {line.name: line.by_category for line in evaluation.lines if line.kind == "model"}
    shares = evaluation.figures[name].shares
    rows = ["<tr><th>category</th>"]
    rows += [f"<th>{html.escape(model)}</th>" for model in evaluation.candidates]
    rows.append("</tr>")
    for category, by_model in shares.items():
        rows.append(f"<tr><td>{html.escape(category)}</td>")
        for model in evaluation.candidates:
            share, score = by_model[model], scores[model][category].mean
            text = f"{share:.0%}" if share >= 0.005 else ""
            shown = f"{score:.2f}" if math.isfinite(score) else "-"
            rows.append(
                f'<td style="background: rgb(0 114 178 / {share * 0.6:.2f})">{text} '
                f'<span class="small">{shown}</span></td>'
            )
        rows.append("</tr>")
    return f"<h3>Whom {html.escape(name)} asks</h3><table>{''.join(rows)}</table>" + _note(
        "Share of the category's prompts, and the model's own mean score there."
    )


def _losses(name: str, losses: Sequence[Loss]) -> str:
    if not losses:
        return ""
    rows = ["<tr><th>prompt</th><th>category</th><th>chosen</th><th>better</th></tr>"]
    for loss in losses:
        text = loss.text
        if len(text) > SHOWN_CHARACTERS:
            text = text[:SHOWN_CHARACTERS] + " …"
        rows.append(
            f'<tr><td class="text">{html.escape(text)}<br><span class="small">'
            f"{html.escape(loss.prompt_id)}</span></td><td>{html.escape(loss.category or '-')}</td>"
            f"<td>{html.escape(loss.chosen)}<br>{loss.score:.2f}, predicted {loss.predicted:.2f}"
            f"</td><td>{html.escape(loss.best)}<br>{loss.best_score:.2f}, predicted "
            f"{loss.best_predicted:.2f}</td></tr>"
        )
    return f"<h2>Worst decisions of {html.escape(name)}</h2><table>{''.join(rows)}</table>"


_PAGE_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Collegium evaluation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1d2329; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } svg text { fill: currentColor }
td.text { text-align: left; white-space: normal; min-width: 20rem }
figure { margin: 0 } .pair { display: flex; flex-wrap: wrap; gap: 1rem 3rem }
.small { color: #59636e; font-size: 13px; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) {
  body { color: #e3e6ea; background: #15181c } td, th { border-color: #333 }
  .small { color: #9aa4af }
}
</style></head><body>"""


def _html_table(rows: list[list[str]]) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

    return "<table>" + cells(rows[0], "th") + "".join(cells(r, "td") for r in rows[1:]) + "</table>"


def _bars(lines: list[Line]) -> str:
    """Horizontal bars of mean scores from 0 to 1, with intervals."""
    label, width, step = 260, 560, 24
    height = step * len(lines) + 30
    parts = [
        f'<svg viewBox="0 0 {label + width + 70} {height}" width="{label + width + 70}" '
        'role="img" aria-label="Mean scores with 95% intervals" font-size="13">'
    ]
    for tick in range(0, 11, 2):
        x = label + width * tick / 10
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="0" y2="{height - 22}" stroke="#8886"/>'
            f'<text x="{x}" y="{height - 6}" text-anchor="middle">{tick / 10:.1f}</text>'
        )
    for number, line in enumerate(lines):
        parts.append(_bar(line, label, width, step * number + 4))
    return "".join([*parts, "</svg>"])


def _bar(line: Line, left: int, width: int, top: int) -> str:
    name = line.name if len(line.name) <= 34 else line.name[:33] + "…"
    star = " *" if line.kind == "bound" else ""
    text = f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{html.escape(name)}{star}</text>'
    if not line.score.n:
        return text
    mean, low, high = (left + width * value for value in line.score[:3])
    middle = top + 9
    return (
        f'{text}<rect x="{left}" y="{top + 2}" width="{mean - left:.1f}" height="14" '
        f'fill="{COLOURS[line.kind]}"><title>{html.escape(line.name)}: '
        f"{with_interval(line.score)}</title></rect>"
        f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} '
        f'{middle - 4}v8" stroke="currentColor" stroke-opacity=".7" fill="none"/>'
        f'<text x="{max(mean, high) + 6:.1f}" y="{top + 13}">{line.score.mean:.3f}</text>'
    )
