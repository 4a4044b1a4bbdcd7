"""Strategies on the embedded experts, live: quality, calls, tokens and time of each.

    python -m benchmarks.strategies --out docs/results/strategies [--n 60] [--minutes 20]

Test prompts of the shipped tasks are asked of every strategy, each on a route of its own with the
embedded router, through the transformers engine. Beside them stand every expert alone (of which
random choice and the oracle are made), and the best single expert by its training scores, with one
and with as many samples as the votes have. Requests of all strategies are under way together, so
times are those under that load, alike for all. Answers are journalled: a run that was interrupted,
or whose minutes were over, goes on when it is started again, and a strategy that was added is asked
alone. The page is about the prompts that all have answered.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.pages import GAIN, command_line, with_interval, write
from deployments.cli import with_engine
from evals.collect import text_hash
from evals.metrics import best_single_choice, bootstrap_mean, paired_difference
from evals.tasks import Sample, Task, get_task, task_names
from experts.base import Expert
from experts.errors import ExpertError
from experts.registry import open_experts
from experts.types import ChatRequest, Message, collect
from orchestrator.config import CollegiumConfig, load_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import RequestContext
from orchestrator.strategies.judging import UNREADABLE
from routers.outcomes import OutcomeTable

TABLE = Path(__file__).parent.parent / "evals" / "data" / "embedded_table"
SAMPLES = 3
BEST_OF = {"type": "best_of", "judge": "general", "judge_tokens": 48}
STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"type": "single"},
    "vote, 3 experts": {"type": "vote", "experts": 3},
    "vote, 3 experts, weighted": {"type": "vote", "experts": 3, "weights": "quality"},
    "vote, 3 samples": {"type": "vote", "experts": 1, "samples": SAMPLES},
    "best of 3 experts": {**BEST_OF, "experts": 3},
    "best of 3 experts, pairs": {**BEST_OF, "experts": 3, "ranking": "pairwise"},
    "best of 3 samples": {**BEST_OF, "experts": 1, "samples": SAMPLES},
    "best of 1, retry": {**BEST_OF, "experts": 1, "bar": 0.8},
}
"""Every strategy that is measured, by the name on the page."""
REFERENCE = "single"
# The same, of the best single expert instead of the router's.
BEST_SINGLE: dict[str, dict[str, Any]] = {
    "best single": {"type": "single"},
    f"best single, {SAMPLES} samples": {"type": "vote", "experts": 1, "samples": SAMPLES},
}
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt's way through one strategy.

    Attributes:
        key: Name and settings of the strategy.
        prompt_id: The sample's id.
        text_sha256: Start of the prompt's hash.
        answer: The answer's text.
        expert: Whose it is.
        calls: Experts asked, judges included.
        unreadable: Of them, judges' verdicts that nobody can read.
        tokens: Read and written in all calls.
        latency_s: Seconds to the whole answer.
    """

    key: str
    prompt_id: str
    text_sha256: str
    answer: str
    expert: str
    calls: int
    unreadable: int
    tokens: int
    latency_s: float


class Journal:
    """Runs on disk, appended one line at a time; a last line that was cut off does not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[tuple[str, str, str], Run] = {}
        whole, _, rest = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        if rest:
            os.truncate(path, len(whole) + bool(whole))
        for line in whole.splitlines():
            self._note(Run(**json.loads(line)))

    def find(self, key: str, sample: Sample) -> Run | None:
        """What a strategy answered to a sample as it is worded now."""
        return self._runs.get((key, sample.prompt_id, text_hash(sample.text)))

    def append(self, run: Run) -> None:
        """Keep a run; it is in the file when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        self._note(run)

    def _note(self, run: Run) -> None:
        self._runs[run.key, run.prompt_id, run.text_sha256] = run


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the page.

    Attributes:
        name: Its name.
        model: What requests name: a route, or an expert.
        key: Name and settings, under which its answers are journalled.
    """

    name: str
    model: str
    key: str


def best_single() -> str:
    """The expert with the highest mean score on the training prompts."""
    table = OutcomeTable.load(TABLE)
    return table.models[best_single_choice(table.scores("train"))]


def plan(names: Iterable[str]) -> tuple[CollegiumConfig, list[Entry]]:
    """The embedded config with a route per strategy, and what is asked."""
    config = with_engine(load_config(), "transformers")
    best = best_single()
    routes: dict[str, dict[str, Any]] = {
        name: {"router": "blend", "strategy": STRATEGIES[name]} for name in names
    } | {
        name: {"router": "blend", "strategy": strategy, "experts": [best]}
        for name, strategy in BEST_SINGLE.items()
    }
    entries = [Entry(name, name, f"expert {name}") for name in config.cards()]
    content = config.model_dump(mode="json", by_alias=True)
    content["routes"] = {}
    for number, (name, route) in enumerate(routes.items()):
        # Names on the page are no names of routes.
        content["routes"][f"route-{number}"] = route
        digest = hashlib.sha256(json.dumps(route, sort_keys=True).encode()).hexdigest()[:12]
        entries.append(Entry(name, f"route-{number}", f"{name} {digest}"))
    return CollegiumConfig.model_validate(content), entries


async def ask(orchestrator: Orchestrator, entry: Entry, sample: Sample, task: Task) -> Run:
    """Have one prompt answered, as a request over HTTP would be."""
    request = ChatRequest(
        model=entry.model,
        messages=[Message(role="user", content=sample.text)],
        max_tokens=task.max_tokens,
        temperature=0,
        seed=int(text_hash(sample.text), 16) >> 1,
    )
    context = RequestContext(deadline=time.monotonic() + TIMEOUT_S)
    decision = await orchestrator.decide(request, context=context)
    async with aclosing(orchestrator.run(request, decision, context)) as chunks:
        completion = await collect(chunks)
    return Run(
        key=entry.key,
        prompt_id=sample.prompt_id,
        text_sha256=text_hash(sample.text),
        answer=completion.text,
        expert=context.expert or "",
        calls=len(context.calls),
        unreadable=sum(call.error == UNREADABLE for call in context.calls),
        tokens=context.usage.total_tokens,
        latency_s=round(time.monotonic() - context.received, 3),
    )


Job = tuple[Entry, Sample, Task]


async def ask_all(
    config: CollegiumConfig, jobs: Sequence[Job], journal: Journal, concurrency: int, minutes: float
) -> None:
    """Ask what the journal does not know, until the minutes are over."""
    waiting = [job for job in jobs if not journal.find(job[0].key, job[1])]
    if not waiting:
        return
    experts: dict[str, Expert] = {}
    for entry in config.experts:
        experts |= open_experts(entry)
    orchestrator = Orchestrator(config, experts, load_routers(config))
    end = time.monotonic() + 60 * minutes
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="answer", delay=2)
    left = iter(waiting)

    async def work() -> None:
        for entry, sample, task in left:
            if time.monotonic() > end:
                return
            try:
                journal.append(await ask(orchestrator, entry, sample, task))
            except ExpertError as error:
                tqdm.write(f"{entry.name}, {sample.prompt_id}: {error}", file=sys.stderr)
            bar.update()

    try:
        with bar:
            await asyncio.gather(*(work() for _ in range(concurrency)))
    finally:
        await orchestrator.aclose()


def interleaved(tasks: Sequence[Task], n: int) -> Iterator[tuple[Sample, Task]]:
    """The first test samples of each task in turn, so that any number of them is balanced."""
    samples = [task.samples("test")[:n] for task in tasks]
    for number in range(n):
        for task, own in zip(tasks, samples, strict=True):
            if number < len(own):
                yield own[number], task


def figures(
    entries: Sequence[Entry], questions: Sequence[tuple[Sample, Task]], journal: Journal
) -> dict[str, Any]:
    """Quality with its interval, differences, calls, tokens and times, by line of the page."""
    asked = [q for q in questions if all(journal.find(e.key, q[0]) for e in entries)]
    runs = {e.name: [_found(journal, e, sample) for sample, _ in asked] for e in entries}
    scores = {
        name: np.array(
            [task.grade(run.answer, sample) for run, (sample, task) in zip(own, asked, strict=True)]
        )
        for name, own in runs.items()
    }
    categories = np.array([sample.category for sample, _ in asked])
    alone = np.stack([scores[e.name] for e in entries if e.key.startswith("expert ")], axis=1)
    lines = {
        name: _line(scores[name], scores, categories) | _costs(own) for name, own in runs.items()
    }
    lines["random"] = _line(alone.mean(axis=1), scores, categories)
    lines["oracle"] = _line(alone.max(axis=1), scores, categories)
    return {"n": len(asked), "of": len(questions), "lines": lines}


def _found(journal: Journal, entry: Entry, sample: Sample) -> Run:
    found = journal.find(entry.key, sample)
    assert found is not None  # only such prompts are judged
    return found


def _line(
    own: NDArray[np.float64],
    scores: Mapping[str, NDArray[np.float64]],
    categories: NDArray[np.str_],
) -> dict[str, Any]:
    gain = dict(zip(GAIN, paired_difference(own, scores[REFERENCE]), strict=False))
    by_category = {str(c): float(own[categories == c].mean()) for c in np.unique(categories)}
    return {**bootstrap_mean(own)._asdict(), **gain, "categories": by_category}


def _costs(runs: Sequence[Run]) -> dict[str, float]:
    seconds = [run.latency_s for run in runs]
    return {
        "calls": float(np.mean([run.calls for run in runs])),
        "tokens": float(np.mean([run.tokens for run in runs])),
        "unreadable": float(np.mean([run.unreadable for run in runs])),
        "seconds_p50": float(np.percentile(seconds, 50)),
        "seconds_p95": float(np.percentile(seconds, 95)),
    }


def report(result: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = result["lines"]
    categories = list(lines[REFERENCE]["categories"])
    page = [
        "# Strategies on the embedded experts",
        "",
        f"`{result['command']}`, {result['machine']}: {result['n']} test prompts of "
        f"{', '.join(categories)}, {result['concurrency']} requests under way at a time. Mean "
        "score with 95 % bootstrap intervals, differences paired by prompt; calls, tokens (read "
        "and written) and unreadable verdicts per prompt; seconds to the whole answer under the "
        "load of all strategies. The experts alone, random choice and the oracle know no router; "
        f"`best single` is `{result['best_single']}`, by training scores. The judge is the pool's "
        "`general`, of 135 million parameters.",
        "",
        "| | score | less `single` | calls | tokens | unreadable | s, median | s, 95 % |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, line in lines.items():
        cells = [with_interval(line), with_interval(line, "+.3f", keys=GAIN)]
        if "calls" in line:
            cells += [f"{line['calls']:.1f}", f"{line['tokens']:.0f}", f"{line['unreadable']:.1f}"]
            cells += [f"{line['seconds_p50']:.1f}", f"{line['seconds_p95']:.1f}"]
        else:
            cells += [""] * 5
        page.append(f"| {name} | " + " | ".join(cells) + " |")
    page += ["", "By category:", "", "| | " + " | ".join(categories) + " |"]
    page.append("|---|" + "--:|" * len(categories))
    for name, line in lines.items():
        cells = [f"{line['categories'][category]:.3f}" for category in categories]
        page.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(page) + "\n"


def main() -> None:
    """Run the benchmark and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--n", type=int, default=60, help="prompts per task")
    parser.add_argument("--tasks", nargs="+", choices=task_names(), default=task_names())
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=None)
    parser.add_argument("--concurrency", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--minutes", type=float, default=20.0, help="stop asking after these")
    parser.add_argument(
        "--journal", type=Path, default=Path("out/strategies.jsonl"), help="where answers are kept"
    )
    arguments = parser.parse_args()
    names = dict.fromkeys([REFERENCE, *(arguments.strategies or STRATEGIES)])
    config, entries = plan(names)
    questions = list(interleaved([get_task(name) for name in arguments.tasks], arguments.n))
    arguments.journal.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.journal)
    jobs = [(entry, sample, task) for sample, task in questions for entry in entries]
    asyncio.run(ask_all(config, jobs, journal, arguments.concurrency, arguments.minutes))
    result = figures(entries, questions, journal)
    if not result["n"]:
        sys.exit("no prompt has been answered by all strategies yet; run it again to go on")
    result |= {
        "command": command_line(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "concurrency": arguments.concurrency,
        "best_single": best_single(),
    }
    page = report(result)
    write(arguments.out, page, result)
    print(page)
    if result["n"] < result["of"]:
        print(f"{result['n']} of {result['of']} prompts; run it again to go on", file=sys.stderr)


if __name__ == "__main__":
    main()
