"""How often the test of experiments errs though one keeps looking, and how soon it finds out.

    python -m benchmarks.sequential [--out OUT]

Ratings are drawn; needs no data. Each run looks after every ten ratings and stops at the first
verdict. A test at every look that is good for one look is given beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.pages import command_line, write
from orchestrator.learning.sequential import Arm, verdict_on

LOOK_EVERY = 10
# Graded ratings are beta distributed with so many pseudo-counts.
GRADED = 8
# Name, mean of each arm, share of b, whether ratings are graded, ratings at most.
CASES = (
    ("equal, right or wrong", 0.5, 0.5, 0.5, False, 500),
    ("equal, mostly right, a tenth for b", 0.9, 0.9, 0.1, False, 500),
    ("equal, graded", 0.5, 0.5, 0.5, True, 500),
    ("0.2 apart, right or wrong", 0.5, 0.7, 0.5, False, 2000),
    ("0.1 apart, right or wrong", 0.5, 0.6, 0.5, False, 4000),
    ("0.1 apart, graded", 0.5, 0.6, 0.5, True, 2000),
)


def run(
    rng: np.random.Generator,
    means: tuple[float, float],
    share_b: float,
    graded: bool,
    most: int,
) -> tuple[str, int, bool]:
    """The verdict, after how many ratings, and whether a naive test ever gave one."""
    arms, naive = (Arm(), Arm()), False
    limit = NormalDist().inv_cdf(0.975)
    for number in range(1, most + 1):
        place = int(rng.random() < share_b)
        mean = means[place]
        rating = rng.beta(GRADED * mean, GRADED * (1 - mean)) if graded else rng.random() < mean
        arms[place].add(float(rating))
        if number % LOOK_EVERY or not (arms[0].n and arms[1].n):
            continue
        naive = naive or naive_z(*arms) > limit
        verdict = verdict_on(*arms)
        if verdict != "undecided":
            return verdict, number, naive
    return "undecided", most, naive


def naive_z(a: Arm, b: Arm) -> float:
    """Standard errors between two means, as if one looked once."""
    variance = a.squares / a.n**2 + b.squares / b.n**2
    return float(abs(b.total / b.n - a.total / a.n) / max(variance, 1e-12) ** 0.5)


def main() -> None:
    """Print the page, and write it where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the ratings")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    bar = tqdm(total=len(CASES) * arguments.runs, unit="run", delay=2)
    for place, (name, a, b, share_b, graded, most) in enumerate(CASES):
        found = []
        for number in range(arguments.runs):
            rng = np.random.default_rng([arguments.seed, place, number])
            found.append(run(rng, (a, b), share_b, graded, most))
            bar.update()
        named = [after for verdict, after, _ in found if verdict != "undecided"]
        results[name] = {
            "most": most,
            "named": len(named) / len(found),
            "wrong": sum(verdict == "a" for verdict, _, _ in found) if b > a else len(named),
            "median": float(np.median(named)) if named else None,
            "naive": sum(naive for _, _, naive in found) / len(found),
        }
    bar.close()
    lines = [
        "# How experiments are decided",
        "",
        f"`{command_line()}`: {arguments.runs} runs of each case, looked at after every "
        f"{LOOK_EVERY} ratings until the first verdict at an error of 5 %. Naive: share of runs in "
        "which a test for one look would have given a verdict at some look, up to that moment.",
        "",
        "| arms | ratings at most | verdicts | wrong | after (median) | naive |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, line in results.items():
        after = "" if line["median"] is None else f"{line['median']:.0f}"
        lines.append(
            f"| {name} | {line['most']} | {line['named']:.0%} | {line['wrong']} | {after} "
            f"| {line['naive']:.0%} |"
        )
    page = "\n".join(lines) + "\n"
    print(page)
    write(arguments.out, page, results)


if __name__ == "__main__":
    main()
