"""The data files that tasks are made from; `README.md` names sources and licences."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from importlib.resources import files

from evals.tasks.base import SPLITS, Sample, Split, make_samples


def read_jsonl(name: str) -> list[dict[str, str]]:
    """Return the rows of one of the data files in this package."""
    lines = files(__name__).joinpath(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def read_samples(
    task: str, make_pair: Callable[[dict[str, str], random.Random, Split], tuple[str, str]]
) -> dict[Split, list[Sample]]:
    """Return the samples of each split, a row of the task's own file each.

    Args:
        task: Its name, which is the file's too.
        make_pair: Makes a text and its answer of a row; any randomness is the split's.
    """
    rows = read_jsonl(f"{task}.jsonl")
    splits: dict[Split, list[Sample]] = {}
    for split in SPLITS:
        rng = random.Random(f"{task}/{split}")
        pairs = [make_pair(row, rng, split) for row in rows if row["split"] == split]
        splits[split] = make_samples(task, split, pairs)
    return splits
