"""One plot as SVG: two axes, dots, lines, levels. Follows the page's colours; needs no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = ["Plot"]

WIDTH, HEIGHT = 520, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 44
TICKS = 5
# Space for the title of a plot that is a file of its own.
TITLE = 24


class Plot:
    """A plot in the making.

    Args:
        title: What it shows.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        xs: Values that must fit in horizontally.
        ys: Values that must fit in vertically.
    """

    def __init__(
        self, title: str, x_label: str, y_label: str, xs: Sequence[float], ys: Sequence[float]
    ) -> None:
        self._title = title
        self._x_ticks, self._y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
        self._parts: list[str] = []
        self._levels = 0
        self._axes(x_label, y_label)

    def _x(self, value: float) -> float:
        low, high = self._x_ticks[0], self._x_ticks[-1]
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        low, high = self._y_ticks[0], self._y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def _axes(self, x_label: str, y_label: str) -> None:
        floor = HEIGHT - BOTTOM
        for tick in self._x_ticks:
            x = self._x(tick)
            self._parts.append(_rule(x, TOP, x, floor))
            self._parts.append(_text(x, floor + 16, f"{tick:.4g}", "middle"))
        for tick in self._y_ticks:
            y = self._y(tick)
            self._parts.append(_rule(LEFT, y, WIDTH - RIGHT, y))
            self._parts.append(_text(LEFT - 6, y + 4, f"{tick:.4g}", "end"))
        self._parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle"))
        middle = (TOP + floor) / 2
        label = _text(0, 0, y_label, "middle")
        self._parts.append(f'<g transform="translate(14 {middle:.1f}) rotate(-90)">{label}</g>')

    def level(self, y: float, name: str) -> None:
        """A horizontal dashed line with its name."""
        if math.isfinite(y):
            self._parts.append(_rule(LEFT, self._y(y), WIDTH - RIGHT, self._y(y), "4 3", 0.8))
            # Levels may lie close together: their names go left and right in turn.
            self._levels += 1
            x, anchor = (LEFT + 6, "start") if self._levels % 2 else (WIDTH - RIGHT - 6, "end")
            self._parts.append(_text(x, self._y(y) - 4, name, anchor))

    def dot(self, x: float, y: float, colour: str, name: str) -> None:
        """A named dot."""
        self._parts.append(_dot(self._x(x), self._y(y), colour, name, 5))
        side, anchor = (8, "start") if self._x(x) < WIDTH / 2 else (-8, "end")
        self._parts.append(_text(self._x(x) + side, self._y(y) + 4, name, anchor))

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, names: Sequence[str]
    ) -> None:
        """A line through points, each a dot that says its name when pointed at."""
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        for (x, y), name in zip(points, names, strict=False):
            said = f"{name}: {x:.4g}, {y:.3f}"
            self._parts.append(_dot(self._x(x), self._y(y), colour, said, 3))

    def figure(self, legend: Sequence[tuple[str, str]]) -> str:
        """The plot with its title and a legend of names and colours."""
        keys = " ".join(
            f'<span style="color: {colour}">&#9632;</span> {html.escape(name)}'
            for name, colour in legend
        )
        return (
            f"<figure><h2>{html.escape(self._title)}</h2>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
            f'aria-label="{html.escape(self._title)}" font-size="12">{"".join(self._parts)}</svg>'
            f'<figcaption class="small">{keys}</figcaption></figure>'
        )

    def document(self, legend: Sequence[tuple[str, str]]) -> str:
        """The plot on white with its title and legend, as a file of its own."""
        rows = [
            f'<g fill="{colour}">{_text(LEFT, HEIGHT + 16 * number, f"■ {name}", "start")}</g>'
            for number, (name, colour) in enumerate(legend, start=1)
        ]
        height = HEIGHT + TITLE + 16 * len(legend) + 8
        title = _text(WIDTH / 2, -8, self._title, "middle")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-TITLE} {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-size="12" font-family="sans-serif">'
            f'<rect y="{-TITLE}" width="{WIDTH}" height="{height}" fill="white"/>'
            f"{title}{''.join(self._parts)}{''.join(rows)}</svg>\n"
        )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that span the values."""
    span = (high - low) or abs(high) or 1.0
    raw = span / TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _rule(
    x1: float, y1: float, x2: float, y2: float, dash: str = "none", opacity: float = 0.15
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        f'stroke-opacity="{opacity}" stroke-dasharray="{dash}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _dot(x: float, y: float, colour: str, name: str, radius: int) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}">'
        f"<title>{html.escape(name)}</title></circle>"
    )
