"""Metrics of a router's operating points: mean cost against mean score."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = [
    "Point",
    "aiq",
    "convex_hull",
    "cost_save",
    "pareto_distance",
    "pareto_frontier",
    "perf_gain",
]


class Point(NamedTuple):
    """One operating point: mean cost and mean score of a prompt."""

    cost: float
    score: float


def pareto_frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in cost and score, by rising cost."""
    frontier: list[Point] = []
    for point in sorted(set(points), key=lambda point: (point.cost, -point.score)):
        if not frontier or point.score > frontier[-1].score:
            frontier.append(point)
    return frontier


def perf_gain(points: Sequence[Point], best_single: Point) -> float:
    """Greatest score of all points, relative to the best single model's; NaN if that is 0.

    References:
        LLMRouterBench (arXiv:2601.07206).

    Examples:
        >>> perf_gain([Point(1.0, 0.5), Point(2.0, 0.66)], Point(2.0, 0.6))
        0.1
    """
    if best_single.score <= 0:
        return float("nan")
    best = max(point.score for point in points)
    return round((best - best_single.score) / best_single.score, 12)


def cost_save(points: Sequence[Point], best_single: Point) -> float:
    """Cost saved by the cheapest point that is as good as the best single model.

    NaN if no point is as good. Negative if such points cost more.

    References:
        LLMRouterBench (arXiv:2601.07206).

    Examples:
        >>> cost_save([Point(1.0, 0.5), Point(1.5, 0.6)], Point(2.0, 0.6))
        0.25
    """
    enough = [point.cost for point in points if point.score >= best_single.score - 1e-12]
    if not enough or best_single.cost <= 0:
        return float("nan")
    return 1 - min(enough) / best_single.cost


def convex_hull(points: Sequence[Point]) -> list[Point]:
    """What mixing points at random can reach: corners of the rising concave curve above them all.

    Examples:
        >>> hull = convex_hull([Point(0.0, 0.0), Point(1.0, 0.2), Point(2.0, 1.0), Point(3.0, 0.5)])
        >>> [tuple(corner) for corner in hull]
        [(0.0, 0.0), (2.0, 1.0)]
    """
    hull: list[Point] = []
    for point in pareto_frontier(points):
        while len(hull) >= 2 and _slope(hull[-1], point) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def aiq(points: Sequence[Point]) -> float:
    """Average improvement in quality: mean height of the non-decreasing convex hull over its costs.

    NaN if all points cost the same.

    References:
        RouterBench (arXiv:2403.12031).

    Examples:
        >>> aiq([Point(0.0, 0.0), Point(1.0, 1.0), Point(2.0, 0.0)])
        0.75
    """
    hull = convex_hull(points)
    first, last = min(p.cost for p in points), max(p.cost for p in points)
    if last <= first:
        return float("nan")
    # Whoever has the best score at less cost can always pay more for nothing.
    hull.append(Point(last, hull[-1].score))
    steps = pairwise(hull)
    area = sum((b.cost - a.cost) * (a.score + b.score) / 2 for a, b in steps)
    return area / (last - first)


def _slope(a: Point, b: Point) -> float:
    return (b.score - a.score) / (b.cost - a.cost)


def pareto_distance(points: Sequence[Point], all_points: Sequence[Point]) -> float:
    """Mean distance of a router's points to the Pareto frontier of everybody's.

    Both axes are scaled to [0, 1] over all points; 0 means every point lies on the frontier.

    References:
        LLMRouterBench's ParetoDist (arXiv:2601.07206); the scaling of axes is ours.
    """
    costs = [point.cost for point in all_points]
    scores = [point.score for point in all_points]

    def scaled(point: Point) -> Point:
        return Point(
            (point.cost - min(costs)) / ((max(costs) - min(costs)) or 1.0),
            (point.score - min(scores)) / ((max(scores) - min(scores)) or 1.0),
        )

    frontier = [scaled(point) for point in pareto_frontier(all_points)]
    distances = [_to_frontier(scaled(point), frontier) for point in points]
    return sum(distances) / len(distances)


def _to_frontier(point: Point, frontier: Sequence[Point]) -> float:
    """Distance to the nearest point of the frontier's segments."""
    best = min(_distance(point, corner) for corner in frontier)
    for a, b in pairwise(frontier):
        along = Point(b.cost - a.cost, b.score - a.score)
        length = along.cost**2 + along.score**2
        part = (point.cost - a.cost) * along.cost + (point.score - a.score) * along.score
        part = min(1.0, max(0.0, part / length))
        foot = Point(a.cost + part * along.cost, a.score + part * along.score)
        best = min(best, _distance(point, foot))
    return best


def _distance(a: Point, b: Point) -> float:
    return float(((a.cost - b.cost) ** 2 + (a.score - b.score) ** 2) ** 0.5)
