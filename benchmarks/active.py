"""What ``collect --active`` spends and finds, replayed on full outcome tables in seeded orders.

    python -m benchmarks.active TABLE ... [--trials 200] [--split train]

For each category the experts are asked in batches, as ``collect --active`` does, with answers from
the table. Agreement: the expert named is the best of the category's full rows (or as good).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evals.elimination import BATCH, survivors
from routers.outcomes import OutcomeTable


def replay(scores: NDArray[np.float64], order: NDArray[np.intp]) -> tuple[int, int]:
    """Calls spent on one category, and the expert named in the end."""
    alive = np.arange(scores.shape[1])
    calls = 0
    for end in range(BATCH, len(order) + BATCH, BATCH):
        calls += len(order[end - BATCH : end]) * len(alive)
        asked = scores[order[:end]][:, alive]
        alive = alive[survivors(asked, len(order))]
        if len(alive) == 1:
            break
    means = np.nanmean(scores[order[:end]][:, alive], axis=0)
    return calls, int(alive[means.argmax()])


def main() -> None:
    """Print share of calls and agreement for each table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--split", default="train")
    arguments = parser.parse_args()
    for path in arguments.tables:
        table = OutcomeTable.load(path)
        prompts, scores = table.with_prompts_of(arguments.split), table.scores(arguments.split)
        if prompts.categories is None:
            sys.exit(f"{path} has no categories")
        labels = np.array(prompts.categories)
        calls, full, agreed, named = 0, 0, 0, 0
        for trial in range(arguments.trials):
            rng = np.random.default_rng(trial)
            for category in np.unique(labels):
                rows = scores[labels == category]
                spent, found = replay(rows, rng.permutation(len(rows)))
                means = np.nanmean(rows, axis=0)
                calls, full = calls + spent, full + rows.size
                agreed, named = agreed + int(means[found] >= means.max() - 1e-12), named + 1
        print(
            f"{path.name}: {len(np.unique(labels))} categories, {scores.shape[1]} experts: "
            f"{calls / full:.1%} of the calls, the same expert in {agreed / named:.2%} of "
            f"{named} cases"
        )


if __name__ == "__main__":
    main()
