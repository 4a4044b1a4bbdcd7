"""The shipped library of adapters, and every method that uses it.

    python -m benchmarks.library --work DIR --out docs/results/moerging

Ten domains have an adapter, ``general``, ``roman`` and ``yaml`` have none. Questions are of the
tasks' test splits; routers, gates and examples learn from the train and validation splits. As
baselines that papers omit, an adapter and a mixture of experts are trained on all domains together,
with as many pairs as the ten were; TIES and DARE merge the ten, DUME makes them experts of one
checkpoint. How large a merge is to be is chosen on validation questions of the ten. What was made
lies in ``--work`` and is not made again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from evals.moerging.cli import library_command
from evals.tasks import Sample, Split, get_task
from experts.finetune import AdapterTrainingConfig, train_adapter
from experts.library.gates import METHODS
from experts.library.manifest import Library
from experts.library.multitask import train_mixture

LIBRARY = Path(__file__).parent.parent / "experts" / "embedded" / "library"
OUTSIDE = ("general", "roman", "yaml")
QUESTIONS, EXAMPLES, SAMPLES = 40, 5, 40
MERGES = {"ties": "ties", "dare": "dare_ties"}
# Pairs that the ten adapters were trained on, batches of repeats included.
PAIRS = 600 * 8 + (150 * 8 + 80 * 6 + 110 * 8 + 220 * 8)


def samples(domain: str, split: Split, most: int) -> list[Sample]:
    """Some samples of a domain."""
    return get_task(domain).samples(split)[:most]


def write(file: Path, found: Iterable[Sample], *, named: bool = True) -> str:
    """Questions as JSON lines, with their domains or without."""
    lines = []
    for sample in found:
        # Graders take several answers, of which the first is the one to write.
        row = {"prompt": sample.text, "answer": sample.answer.partition("|")[0]}
        lines.append(row | {"domain": sample.category} if named else row)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def train_together(domains: Sequence[str], base: str, work: Path, seed: int) -> None:
    """An adapter and a mixture of all domains, trained on as many pairs as the ten together."""
    rng = random.Random(seed)
    parts = [rng.sample(get_task(name).samples("adapter"), 600) for name in domains]
    mixed = [sample for part in parts for sample in part]
    rng.shuffle(mixed)
    data = Path(write(work / f"multitask-{seed}.jsonl", mixed, named=False))
    lessons = AdapterTrainingConfig(
        data=data, base=base, steps=PAIRS // 16, batch_size=16, rank=8, alpha=16,
        learning_rate=1e-3, seed=seed,
    )  # fmt: skip
    train_adapter(lessons, work / f"multitask-{seed}")
    # As many parameters as the ten together, and as many go into each token as one of them has.
    small = lessons.model_copy(update={"rank": 4, "alpha": 4.0})
    train_mixture(small, len(domains), 2, work / f"multitask-moe-{seed}")


def run(*command: str) -> None:
    """A command of ``collegium library``."""
    library_command.main([*command, "--library", str(LIBRARY)], standalone_mode=False)


def main() -> None:
    """Make what is missing, then measure what is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where what is made is kept")
    parser.add_argument("--out", type=Path, required=True, help="write OUT.md, OUT.json, OUT.svg")
    parser.add_argument("--method", nargs="+", default=[], help="only these")
    parser.add_argument("--seeds", type=int, default=3, help="of what is drawn or trained")
    parser.add_argument("--prepare", action="store_true", help="only make what is missing")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    library = Library(LIBRARY)
    domains = [*library.experts]
    (base,) = library.bases()

    asked = [s for name in (*domains, *OUTSIDE) for s in samples(name, "test", QUESTIONS)]
    shown = [s for name in (*domains, *OUTSIDE) for s in samples(name, "validation", EXAMPLES)]
    command = [
        "evaluate", "--questions", write(work / "questions.jsonl", asked),
        "--examples", write(work / "examples.jsonl", shown), "--out", str(arguments.out),
        "--seeds", str(arguments.seeds),
    ]  # fmt: skip
    if not (work / "table").exists():
        general = write(
            work / "general.jsonl", samples("general", "train", SAMPLES), named=False
        )  # fmt: skip
        run("table", "--limit", str(SAMPLES), "--general", general, "--out", str(work / "table"))
    command += ["--table", str(work / "table")]
    known = [s for name in domains for s in samples(name, "validation", EXAMPLES)]
    few = write(work / "known.jsonl", known, named=False)
    for name, merging in MERGES.items():
        # What DARE drops is drawn.
        for seed in range(arguments.seeds if name == "dare" else 1):
            out = work / f"{name}-{seed}"
            if not out.exists():
                run("merge", "--method", merging, "--seed", str(seed), "--examples", few,
                    "--out", str(out))  # fmt: skip
            command += ["--reference", f"{name}={out}"]
    if not (work / "upcycled").exists():
        run("upcycle", "--out", str(work / "upcycled"))
    command += ["--reference", f"upcycled={work / 'upcycled'}"]
    for method in METHODS:
        for seed in range(arguments.seeds if method == "phatgoose" else 1):
            out = work / "gates" / f"{method}-{seed}"
            run("gates", "--method", method, "--seed", str(seed), "--out", str(out))
            command += ["--gates", f"{method}={out}"]
    for seed in range(arguments.seeds):
        train_together(domains, base, work, seed)
        for name in ("multitask", "multitask-moe"):
            command += ["--reference", f"{name}={work / f'{name}-{seed}'}"]
    if not arguments.prepare:
        run(*command, *(part for name in arguments.method for part in ("--method", name)))
        page = arguments.out.with_suffix(".md")
        title, _, rest = page.read_text(encoding="utf-8").partition("\n\n")
        how = f"`python -m benchmarks.library --work DIR --out {arguments.out}`; test questions."
        page.write_text(f"{title}\n\n{how}\n\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
