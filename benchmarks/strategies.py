"""Strategies on the embedded experts, live: quality, calls, tokens and time of each.

    python -m benchmarks.strategies --out docs/results/strategies [--n 30] [--n-readers 4]

Test prompts of the shipped tasks are asked of every strategy, each on a route of its own with the
embedded router, through the transformers engine; fewer of those whose experts read answers of
others, up to ten times as many tokens. Beside them stand the best single expert by its training
scores with as many samples as the votes have, and from the shipped outcome table, which was made by
the same engine: every expert alone, random choice, and the oracle. Requests of all strategies are
under way together, so times are those under that load, alike for all. Answers are journalled: a run
that was interrupted, or whose minutes were over, goes on when it is started again, and a strategy
that was added is asked alone. A line is about the prompts that it and ``single`` have answered.
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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.pages import GAIN, command_line, with_interval, write
from deployments.cli import with_engine
from evals.collect import text_hash
from evals.metrics import (
    best_single_choice,
    bootstrap_mean,
    oracle_scores,
    paired_difference,
    random_scores,
)
from evals.tasks import Sample, Task, get_task, task_names
from experts.base import Expert
from experts.errors import ExpertError
from experts.paths import resolve_path
from experts.registry import open_experts
from experts.types import ChatRequest, Message, collect
from orchestrator.config import CollegiumConfig, load_config, parse_config
from orchestrator.core import Orchestrator, load_routers
from orchestrator.decision import RequestContext
from orchestrator.strategies.judging import UNREADABLE
from routers.artefact import read_manifest
from routers.outcomes import OutcomeTable

TABLE = Path(__file__).parent.parent / "evals" / "data" / "embedded_table"
SAMPLES = 3
BEST_OF = {"type": "best_of", "judge": "general", "judge_tokens": 128}
CASCADES = {
    "cascade routing": Path(__file__).with_name("cascade_routing.yaml"),
    "cascade, plain": Path(__file__).with_name("cascade_plain.yaml"),
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "single": {"type": "single"},
    "vote, 3 experts": {"type": "vote", "experts": 3},
    "vote, 3 experts, weighted": {"type": "vote", "experts": 3, "weights": "quality"},
    "vote, 3 samples": {"type": "vote", "experts": 1, "samples": SAMPLES},
    "best of 3 experts": {**BEST_OF, "experts": 3},
    "best of 3 experts, pairs": {**BEST_OF, "experts": 3, "ranking": "pairwise"},
    "best of 3 samples": {**BEST_OF, "experts": 1, "samples": SAMPLES},
    "best of 1, retry": {**BEST_OF, "experts": 1, "bar": 0.8},
    "fusion of 3 experts": {"type": "fusion", "experts": 3},
    "fusion of 3 experts, with notes": {"type": "fusion", "experts": 3, "method": "multi_expert"},
    "chain of 2": {"type": "chain", "depth": 2},
}
"""Every strategy that is measured, by the name on the page, but for the calibrated cascades."""
REFERENCE = "single"
# The same number of samples, of the best single expert instead of the router's.
BEST_SINGLE: dict[str, dict[str, Any]] = {
    f"best single, {SAMPLES} samples": {"type": "vote", "experts": 1, "samples": SAMPLES},
}
# So long that no deadline decides, however busy the machine is.
TIMEOUT_S = 3600.0


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
    """One strategy as it is asked.

    Attributes:
        name: Its name on the page.
        route: Its route.
        key: Name and settings, under which its answers are journalled.
        reads: Whether its experts read answers of others.
    """

    name: str
    route: str
    key: str
    reads: bool


def plan(names: Iterable[str], best: str) -> tuple[CollegiumConfig, list[Entry]]:
    """The embedded config with a route per strategy, and what is asked.

    Args:
        names: Of the strategies.
        best: The best single expert.
    """
    routes: dict[str, dict[str, Any]] = {
        name: yaml.safe_load(CASCADES[name].read_text(encoding="utf-8"))
        if name in CASCADES
        else {"strategy": STRATEGIES[name]}
        for name in names
    }
    for name, strategy in BEST_SINGLE.items():
        routes[name] = {"strategy": strategy, "experts": [best]}
    content = with_engine(load_config(), "transformers").model_dump(mode="json", by_alias=True)
    content["routes"] = {}
    # Answers of other experts or another router are not taken up again.
    router = read_manifest(resolve_path(content["routers"]["blend"]["path"])).arrays_sha256
    made_by = json.dumps([router, content["experts"]], sort_keys=True)
    entries = []
    for number, (name, route) in enumerate(routes.items()):
        # Names on the page are no names of routes.
        content["routes"][f"route-{number}"] = {"router": "blend", **route}
        settings = made_by + json.dumps(route, sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
        reads = "judge" in route["strategy"] or route["strategy"]["type"] in ("fusion", "chain")
        entries.append(Entry(name, f"route-{number}", f"{name} {digest}", reads))
    return parse_config(content), entries


async def ask(orchestrator: Orchestrator, entry: Entry, sample: Sample, task: Task) -> Run:
    """Have one prompt answered, as a request over HTTP would be."""
    request = ChatRequest(
        model=entry.route,
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


Question = tuple[Sample, Task]
Job = tuple[Entry, Sample, Task]
Line = dict[str, Any]


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


def questions(tasks: Sequence[Task], n: int) -> list[tuple[Sample, Task]]:
    """The first test samples of each task in turn, so that any number of them is balanced."""
    rounds = zip_longest(*([(one, task) for one in task.samples("test")[:n]] for task in tasks))
    return [question for one_of_each in rounds for question in one_of_each if question]


def figures(entries: Sequence[Entry], asked: Sequence[Question], journal: Journal) -> list[Line]:
    """What each line of the page says: quality with its interval, differences, calls, times."""
    key = next(entry.key for entry in entries if entry.name == REFERENCE)
    reference = {
        sample.prompt_id: task.grade(run.answer, sample)
        for sample, task in asked
        if (run := journal.find(key, sample))
    }
    asked = [question for question in asked if question[0].prompt_id in reference]
    lines = []
    for entry in entries:
        found = [(sample, task, journal.find(entry.key, sample)) for sample, task in asked]
        answered = [(sample, task, run) for sample, task, run in found if run]
        if answered:
            own = np.array([task.grade(run.answer, sample) for sample, task, run in answered])
            line = _line(own, reference, [sample for sample, _, _ in answered])
            costs = _costs([run for _, _, run in answered])
            lines.append({"name": entry.name, **line, **costs})
    return lines + known_figures([sample for sample, _ in asked], reference)


def known_figures(asked: Sequence[Sample], reference: Mapping[str, float]) -> list[Line]:
    """The experts alone, random choice and the oracle, from the shipped table."""
    table = OutcomeTable.load(TABLE)
    rows = {name: row for row, name in enumerate(table.with_prompts_of("test").ids)}
    samples = [sample for sample in asked if sample.prompt_id in rows]
    if not samples:
        return []
    scores = table.scores("test")[[rows[sample.prompt_id] for sample in samples]]
    columns = {f"`{model}` alone": scores[:, j] for j, model in enumerate(table.models)}
    columns |= {"random": random_scores(scores), "oracle": oracle_scores(scores)}
    return [{"name": name, **_line(own, reference, samples)} for name, own in columns.items()]


def _line(
    own: NDArray[np.float64], reference: Mapping[str, float], samples: Sequence[Sample]
) -> Line:
    other = np.array([reference[sample.prompt_id] for sample in samples])
    gain = dict(zip(GAIN, paired_difference(own, other)[:3], strict=True))
    labels = np.array([sample.category for sample in samples])
    by_category = {str(c): float(own[labels == c].mean()) for c in np.unique(labels)}
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
    categories = sorted({name for line in result["lines"] for name in line["categories"]})
    page = [
        "# Strategies on the embedded experts",
        "",
        f"`{result['command']}`, {result['machine']}: n test prompts, evenly of "
        f"{', '.join(categories)}, {result['concurrency']} requests under way at a time. Mean "
        "score with 95 % bootstrap intervals; the difference to `single`, the router's first "
        "expert, is paired by prompt. Calls, tokens (read and written) and verdicts that nobody "
        "can read are per prompt; seconds are those to the whole answer under the load of all "
        f"strategies. The best single expert by training scores is `{result['best_single']}`; the "
        "judge is `general`, of 135 million parameters.",
        "",
        "| | n | score | less `single` | calls | tokens | unreadable | s, median | s, 95 % |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in result["lines"]:
        cells = [str(line["n"]), with_interval(line), with_interval(line, "+.3f", keys=GAIN)]
        cells += [
            f"{line[key]:{form}}" if key in line else ""
            for key, form in (
                ("calls", ".1f"), ("tokens", ".0f"), ("unreadable", ".1f"),
                ("seconds_p50", ".1f"), ("seconds_p95", ".1f"),
            )
        ]  # fmt: skip
        page.append(f"| {line['name']} | " + " | ".join(cells) + " |")
    page += ["", "By category:", "", "| | " + " | ".join(categories) + " |"]
    page.append("|---|" + "--:|" * len(categories))
    for line in result["lines"]:
        means = line["categories"]
        cells = [f"{means[name]:.3f}" if name in means else "" for name in categories]
        page.append(f"| {line['name']} | " + " | ".join(cells) + " |")
    return "\n".join(page) + "\n"


def main() -> None:
    """Run the benchmark and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--n", type=int, default=30, help="prompts per task")
    parser.add_argument(
        "--n-readers", type=int, default=4, help="of them for those who read answers"
    )
    parser.add_argument("--tasks", nargs="+", choices=task_names(), default=task_names())
    names = [*STRATEGIES, *CASCADES]
    parser.add_argument("--strategies", nargs="+", choices=names, default=names)
    parser.add_argument("--concurrency", type=int, default=4, help="requests under way at a time")
    parser.add_argument("--minutes", type=float, default=20.0, help="ask no more after these")
    parser.add_argument(
        "--journal", type=Path, default=Path("out/strategies.jsonl"), help="where answers are kept"
    )
    arguments = parser.parse_args()
    table = OutcomeTable.load(TABLE)
    best = table.models[best_single_choice(table.scores("train"))]
    config, entries = plan(dict.fromkeys([REFERENCE, *arguments.strategies]), best)
    tasks = [get_task(name) for name in arguments.tasks]
    asked = questions(tasks, arguments.n)
    read = questions(tasks, min(arguments.n, arguments.n_readers))
    jobs = [(e, *q) for q in asked for e in entries if not e.reads or q in read]
    arguments.journal.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.journal)
    asyncio.run(ask_all(config, jobs, journal, arguments.concurrency, arguments.minutes))
    result = {
        "command": command_line(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "concurrency": arguments.concurrency,
        "best_single": best,
        "lines": figures(entries, asked, journal),
    }
    page = report(result)
    write(arguments.out, page, result)
    print(page)
    if missing := sum(not journal.find(entry.key, sample) for entry, sample, _ in jobs):
        print(f"{missing} of {len(jobs)} answers are missing; run it again to go on",
              file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
