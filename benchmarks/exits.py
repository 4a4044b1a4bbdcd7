"""Where the router ``centroids`` leaves prompts to the base: known domains in new words, strangers.

    python -m benchmarks.exits --out docs/results/exits

For each encoder and threshold: how many prompts of the shipped library's domains reach their own
adapter when the router has not seen their wording, and how many prompts reach the base when it has
not seen their domain. Each wording and each domain is left out in turn; of tasks without templates
prompts of the validation split are asked. No test question is looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.library import LIBRARY, OUTSIDE, SAMPLES, samples
from benchmarks.pages import command_line, write
from evals.tasks import Split, get_task
from evals.tasks.chores import Chore
from experts.library.manifest import Library
from routers.base import Query
from routers.centroids import ENCODER, CentroidsRouter
from routers.outcomes import OutcomeTable, Prompts

ENCODERS = ("static", "minilm-l2-int8", "minilm-l4-int8", "minilm-int8", "multilingual", ENCODER)
THRESHOLDS = (0.2, 0.25, 0.275, 0.3, 0.35, 0.4)
WORDINGS = 5
BASE = "base"

Texts = dict[str, list[str]]
"""Of each domain."""


def texts(names: Sequence[str], split: Split, most: int) -> Texts:
    """Prompts of some domains."""
    return {name: [sample.text for sample in samples(name, split, most)] for name in names}


def has_wording(domain: str, text: str, number: int) -> bool:
    """Whether a prompt is made of a task's template of that number, counted around."""
    task = get_task(domain)
    if not isinstance(task, Chore):
        return False
    before, after = task.asks.shared[number % len(task.asks.shared)].split("{x}")
    return text.startswith(before) and text.endswith(after)


def fitted(known: Mapping[str, Sequence[str]], encoder: str, threshold: float) -> CentroidsRouter:
    """A router that knows these prompts; those of ``general`` are no model's."""
    rows = [(text, name) for name, found in known.items() for text in found]
    models = [BASE, *(name for name in known if name not in OUTSIDE)]
    prompts = Prompts(
        [str(n) for n in range(len(rows))], [text for text, _ in rows], [name for _, name in rows]
    )
    scores = {"score": np.full((len(rows), len(models)), 0.5)}
    table = OutcomeTable(prompts, models=models, numbers=scores)
    return CentroidsRouter(encoder=encoder, threshold=threshold).fit(table, split="all")


def reach(router: CentroidsRouter, asked: Sequence[str], model: str) -> list[bool]:
    """Whether each prompt goes to a model."""
    names = [*router.models]
    quality = router.predict([Query(text) for text in asked], names).quality
    return [names[best] == model for best in quality.argmax(axis=1)]


def judge(encoder: str, threshold: float) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of each domain's prompts that reach their adapter; of strangers, the base."""
    domains = [*Library(LIBRARY).experts]
    known = texts((*domains, "general"), "train", SAMPLES)
    drawn = texts(domains, "train", 100)
    held_out = texts((*domains, *OUTSIDE), "validation", SAMPLES)
    reached: dict[str, list[bool]] = {name: [] for name in domains}
    for number in range(WORDINGS):
        rest = {
            name: [text for text in found if not has_wording(name, text, number)]
            for name, found in known.items()
        }
        router = fitted(rest, encoder, threshold)
        for name in domains:
            asked = [text for text in drawn[name] if has_wording(name, text, number)]
            reached[name] += reach(router, asked or held_out[name], name)
    everyone = fitted(known, encoder, threshold)
    strangers = {name: reach(everyone, held_out[name], BASE) for name in OUTSIDE}
    for name in domains:
        rest = {other: found for other, found in known.items() if other != name}
        router = fitted(rest, encoder, threshold)
        strangers[name] = reach(router, [*known[name], *held_out[name]], BASE)
    return _means(reached), _means(strangers)


def _means(found: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    return {name: float(np.mean(rows)) for name, rows in found.items()}


def main() -> None:
    """Judge all encoders at all thresholds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    page = [
        "# Where `centroids` leaves prompts to the base", "", f"`{command_line()}`", "",
        f"Shares of prompts, means over domains. Own adapter: of the shipped library's domains, in "
        "a wording that the router has not seen. Base: of the same domains when the router has "
        f"seen nothing of them, and of {', '.join(OUTSIDE)}, which have no adapter.", "",
        "| encoder | threshold | own adapter | lowest | base | lowest |", "|---" * 6 + "|",
    ]  # fmt: skip
    results = []
    for encoder in ENCODERS:
        for threshold in THRESHOLDS:
            own, strangers = judge(encoder, threshold)
            cells = [f"`{encoder}`", f"{threshold}"]
            for found in (own, strangers):
                lowest = min(found, key=lambda name: found[name])
                cells += [f"{np.mean([*found.values()]):.3f}", f"{lowest} {found[lowest]:.2f}"]
            page.append(f"| {' | '.join(cells)} |")
            print(page[-1], flush=True)
            results.append(
                {"encoder": encoder, "threshold": threshold, "own": own, "strangers": strangers}
            )
    write(arguments.out, "\n".join(page) + "\n", results)


if __name__ == "__main__":
    main()
