"""Training and judging at 100,000 prompts x 32 models: seconds and memory, each in a process.

    python -m benchmarks.scale [--prompts 100000] [--models 32] [--encoder static]

Texts are words of the shipped tasks in random order; vectors are made first and not counted, as
they are kept on disk between runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from routers.outcomes import OutcomeTable, Prompts

METHODS = ("kmeans", "ridge", "coe", "uniroute", "mf")


def make_table(folder: Path, n_prompts: int, n_models: int) -> None:
    """Write a table with ten categories whose prompts and scores differ."""
    from evals.tasks import get_task, task_names

    words = sorted(
        {w for name in task_names() for s in get_task(name).samples("test") for w in s.text.split()}
    )
    rng, order = np.random.default_rng(0), random.Random(0)
    kinds = [order.sample(words, 300) for _ in range(10)]
    labels = rng.integers(0, 10, n_prompts)
    texts = [" ".join(order.choices(kinds[label], k=12)) for label in labels]
    skill = rng.random((10, n_models))
    scores = (rng.random((n_prompts, n_models)) < skill[labels]).astype(float)
    splits = ["test" if row % 10 == 0 else "train" for row in range(n_prompts)]
    prompts = Prompts(
        [f"p{row}" for row in range(n_prompts)], texts, [f"kind {n}" for n in labels], splits
    )
    models = [f"model {number}" for number in range(n_models)]
    OutcomeTable(prompts, models=models, numbers={"score": scores}).write(folder)


def measure(folder: Path, method: str, encoder: str) -> tuple[float, float, float]:
    """Seconds to train and to judge, and the most memory used, in GiB."""
    from evals.decisions import decide
    from evals.evaluate import judge
    from routers.combined import make_member
    from routers.encoders import get_encoder

    table = OutcomeTable.load(folder)
    vectors = get_encoder(encoder).encode(table.prompts.texts)
    known = dict(zip(table.prompts.texts, vectors, strict=True))
    # From memory, as the disk cache would give them; of the few texts made for timing, any will do.
    get_encoder(encoder).encode = lambda texts: np.array(  # type: ignore[method-assign]
        [known.get(text, vectors[0]) for text in texts]
    ).reshape(len(texts), vectors.shape[1])
    started = time.perf_counter()
    router = make_member(f"{method} encoder={encoder}").fit(table)
    trained = time.perf_counter()
    made = decide(method, router, table, split="all", candidates=table.models)
    judge([made], table, split="all")
    judged = time.perf_counter()
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return trained - started, judged - trained, peak_gib


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--models", type=int, default=32)
    parser.add_argument("--encoder", default="static")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_table(folder, arguments.prompts, arguments.models)
        for method in arguments.methods:
            with context.Pool(1) as pool:
                found = pool.apply(measure, (folder, method, arguments.encoder))
            train_s, judge_s, peak_gib = found
            print(
                f"{method:10} trains in {train_s:6.1f} s, is judged on all prompts in "
                f"{judge_s:6.1f} s, {peak_gib:.1f} GiB at most",
                flush=True,
            )


if __name__ == "__main__":
    main()
