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
# Of a name beside a dot: about how wide a character is, and how far lines are apart.
CHARACTER, LINE = 6.5, 13


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
        self._named: list[tuple[float, float, str]] = []
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
        self._named.append((self._x(x), self._y(y), name))

    def _drawn(self) -> str:
        """Everything, with the names of dots beside them where no other name or dot is."""
        taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in self._named]
        names = []
        for x, y, name in sorted(self._named, key=lambda one: one[1]):
            spots = [
                (left, y + shift * LINE / 2)
                for shift in sorted(range(-16, 17), key=abs)
                for left in (x + 8, x - 8 - CHARACTER * len(name))
            ]
            boxes = [(left, at - 6, left + CHARACTER * len(name), at + 6) for left, at in spots]
            free = [
                box
                for box in boxes
                if box[0] > LEFT
                and box[2] < WIDTH
                and TOP < box[1]
                and box[3] < HEIGHT - BOTTOM
                and not any(_overlap(box, other) for other in taken)
            ]
            box = (free or boxes)[0]
            taken.append(box)
            right = box[0] > x
            edge, middle = box[0] if right else box[2], (box[1] + box[3]) / 2
            if abs(middle - y) > LINE / 2:
                names.append(_rule(x, y, edge, middle, opacity=0.5))
            names.append(_text(edge, middle + 4, name, "start" if right else "end"))
        return "".join([*self._parts, *names])

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
            f'aria-label="{html.escape(self._title)}" font-size="12">{self._drawn()}</svg>'
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
            f"{title}{self._drawn()}{''.join(rows)}</svg>\n"
        )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that span the values."""
    span = (high - low) or abs(high) or 1.0
    raw = span / TICKS
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes do; left, top, right, bottom."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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
