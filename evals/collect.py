"""Run experts on tasks and write the outcome table that routers learn from.

Answers are journalled as they come, one JSON line each, so an interrupted run goes on where
it stopped; grades are made from the journal, so a better grader needs no new answers. Knows
experts only as the `Expert` protocol, not how they are built.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evals.collect_options import CollectOptions
from evals.elimination import BATCH, survivors
from evals.metrics import best_single_choice
from evals.tasks import TABLE_SPLITS, Sample, Split, Task
from experts.base import Expert
from experts.errors import ExpertConfigError, ExpertError
from experts.types import ChatRequest, ExpertCard, Message
from experts.types import collect as collect_chunks
from orchestrator.strategies.confidence import mean_probability
from routers.outcomes import CARD_FIELDS, OutcomeTable, Prompts

__all__ = ["Answer", "CollectError", "Journal", "collect", "write_outcome_table"]

JOURNAL_FILE = "answers.jsonl"
_ATTEMPTS = 3


class CollectError(Exception):
    """A run that cannot go on; one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one expert answered to one prompt, ungraded.

    Attributes:
        prompt_id: The sample's id.
        model: The expert's name.
        text_sha256: Start of the prompt's hash: an answer to another text is no answer.
        answer: The answer's text.
        input_tokens: Tokens of the prompt as the expert counted them.
        output_tokens: Tokens of the answer.
        latency_s: Seconds from the request to the whole answer, under the load of all requests
            then under way (``CollectOptions.concurrency``); none if it was not measured.
        confidence: Geometric mean of the tokens' probabilities; none if it was not asked for, or
            the expert does not say.
    """

    prompt_id: str
    model: str
    text_sha256: str
    answer: str
    input_tokens: int
    output_tokens: int
    latency_s: float | None
    confidence: float | None = None


class Journal:
    """Answers on disk, appended one line at a time."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line cut off by an interruption is removed."""
        self.path = path
        self.answers: dict[tuple[str, str], Answer] = {}
        for answer in _read_lines(path):
            self.answers[answer.prompt_id, answer.model] = answer

    def find(self, sample: Sample, model: str) -> Answer | None:
        """Return the answer of a model to a sample as it is worded now."""
        answer = self.answers.get((sample.prompt_id, model))
        return answer if answer and answer.text_sha256 == text_hash(sample.text) else None

    def append(self, answer: Answer) -> None:
        """Keep an answer; it is in the file when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            # Escaped, since half an emoji, as some engines give, has no UTF-8.
            file.write(json.dumps(asdict(answer)) + "\n")
        self.answers[answer.prompt_id, answer.model] = answer


def text_hash(text: str) -> str:
    """Return the start of the SHA-256 of a prompt's text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_lines(path: Path) -> Iterator[Answer]:
    if not path.exists():
        return
    content = path.read_bytes()
    whole, _, rest = content.rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield Answer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise CollectError(f"line {number} of {path} is damaged; delete that line") from error


async def collect(
    experts: Mapping[str, Expert], tasks: Sequence[Task], out: Path, options: CollectOptions
) -> dict[str, int]:
    """Run every expert on every sample greedily and write the outcome table.

    Answers that the folder's journal already has are not asked for again. An answer that
    fails three times is left out of the table, and asked for again by the next run.

    Args:
        experts: Who answers, by the name that goes into the table.
        tasks: What is asked.
        out: Folder for the table and the journal.
        options: How much is asked, and how many requests at a time.

    Returns:
        The number of answers that are missing, by expert, for experts that lack any.

    Raises:
        CollectError: If the journal is damaged, or there is nothing to ask or to compare.
        ExpertConfigError: If an expert can never answer.
    """
    questions = _questions(tasks, options)
    if not questions or not experts:
        raise CollectError("nothing to collect: no samples in these splits, or no experts")
    if options.active and len(experts) < 2:
        raise CollectError(
            "active collection compares experts, and there is one: leave out --active"
        )
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / JOURNAL_FILE)
    asker = _Asker(experts, journal, options, len(experts) * len(questions))
    with asker.bar:
        if options.active:
            found = await _collect_active(asker, questions, options.splits)
        else:
            found = []
            await asker.ask([(name, *question) for name in experts for question in questions])
    for line in found:
        tqdm.write(line, file=sys.stderr)
    cards = {name: expert.card for name, expert in experts.items()}
    write_outcome_table(out, tasks, journal, cards, options)
    return asker.missing


Job = tuple[str, Sample, Task]


class _Asker:
    """Asks experts, as many at a time as allowed, and journals what they answer."""

    def __init__(
        self,
        experts: Mapping[str, Expert],
        journal: Journal,
        options: CollectOptions,
        total: int,
    ) -> None:
        self.experts = experts
        self.journal = journal
        self.missing: dict[str, int] = {}
        self.bar = tqdm(total=total, unit="answer")
        self._options = options
        self._places = asyncio.Semaphore(options.concurrency)

    def expect_less(self, count: int) -> None:
        """Take answers that will never be asked for out of the bar's total."""
        self.bar.total = (self.bar.total or 0) - count
        self.bar.refresh()

    async def ask(self, jobs: Sequence[Job]) -> None:
        """Ask what the journal does not know yet."""
        open_jobs = [job for job in jobs if not self.journal.find(job[1], job[0])]
        self.bar.update(len(jobs) - len(open_jobs))
        # One iterator feeds all workers: nothing is awaited between taking a job and the next.
        waiting = iter(open_jobs)

        async def work() -> None:
            for name, sample, task in waiting:
                async with self._places:
                    expert = self.experts[name]
                    answer = await _ask(expert, name, sample, task.max_tokens, self._options)
                if answer:
                    self.journal.append(answer)
                else:
                    self.missing[name] = self.missing.get(name, 0) + 1
                self.bar.update()

        await _together(work() for _ in range(min(self._options.concurrency, len(open_jobs))))


async def _collect_active(
    asker: _Asker, questions: Sequence[tuple[Sample, Task]], splits: Sequence[Split]
) -> list[str]:
    """Ask each category's experts in batches, dropping those that cannot be its best any more.

    The scores of one split decide: of those wanted, the first in the order train, validation, test.
    Prompts of the others are asked of all experts. Otherwise the prompts that are judged on would
    say which cells are learnt from, and lack those of bad experts themselves.

    Returns:
        For each category one line that says who is its best and who was dropped.
    """
    import numpy as np

    deciding = next(split for split in TABLE_SPLITS if split in splits)
    categories: dict[str, list[tuple[Sample, Task]]] = {}
    # Any fixed order that says nothing of the prompts: a run that goes on takes the same one.
    for sample, task in sorted(questions, key=lambda question: text_hash(question[0].text)):
        if sample.split == deciding:
            categories.setdefault(sample.category, []).append((sample, task))
    others = [question for question in questions if question[0].split != deciding]
    lines: list[str] = []

    async def settle(category: str, prompts: list[tuple[Sample, Task]]) -> None:
        alive, dropped = list(asker.experts), dict[str, int]()
        for end in range(BATCH, len(prompts) + BATCH, BATCH):
            asked, rest = prompts[:end], len(prompts[end:])
            batch = asked[end - BATCH :]
            await asker.ask([(name, *question) for name in alive for question in batch])
            scores = np.full((len(asked), len(alive)), np.nan)
            for row, (sample, task) in enumerate(asked):
                for column, name in enumerate(alive):
                    if answer := asker.journal.find(sample, name):
                        scores[row, column] = task.grade(answer.answer, sample)
            best = "unknown" if np.isnan(scores).all() else alive[best_single_choice(scores)]
            keep = survivors(scores, len(prompts))
            gone = [name for name, kept in zip(alive, keep, strict=True) if not kept and rest]
            dropped |= dict.fromkeys(gone, len(asked))
            alive = [name for name in alive if name not in gone]
            asker.expect_less(rest * (len(gone) + (len(alive) == 1)))
            if len(alive) == 1:
                break
        gone_after = ", ".join(f"{name} after {count}" for name, count in dropped.items())
        lines.append(
            f"{category}: the best is {best}; dropped {gone_after or 'nobody'} "
            f"of {len(prompts)} {deciding} prompts"
        )

    settling = [settle(category, prompts) for category, prompts in categories.items()]
    await _together([*settling, asker.ask([(n, *q) for n in asker.experts for q in others])])
    return sorted(lines)


def _questions(tasks: Iterable[Task], options: CollectOptions) -> list[tuple[Sample, Task]]:
    return [
        (sample, task)
        for task in tasks
        for split in options.splits
        for sample in task.samples(split)[: options.limit]
    ]


async def _together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for part in work:
                group.create_task(part)
    except ExceptionGroup as errors:
        # Whoever called asked for one thing; the first failure is why it was not done.
        raise errors.exceptions[0] from None


async def _ask(
    expert: Expert, name: str, sample: Sample, max_tokens: int, options: CollectOptions
) -> Answer | None:
    request = ChatRequest(
        model=name,
        messages=[Message(role="user", content=sample.text)],
        max_tokens=max_tokens,
        temperature=0,
    )
    # Nothing is sent where nothing is wanted: some APIs refuse fields they do not know.
    if options.confidence and "logprobs" in expert.card.capabilities:
        request = request.model_copy(update={"logprobs": True})
    for attempt in range(_ATTEMPTS):
        started = time.monotonic()
        try:
            chunks = expert.stream(request, timeout_s=options.timeout_s)
            completion = await collect_chunks(chunks)
        except ExpertConfigError:
            raise
        except ExpertError as error:
            if not error.retryable or attempt == _ATTEMPTS - 1:
                tqdm.write(f"{sample.prompt_id}: {error}", file=sys.stderr)
                return None
            await asyncio.sleep(2**attempt)
        else:
            return Answer(
                prompt_id=sample.prompt_id,
                model=name,
                text_sha256=text_hash(sample.text),
                answer=completion.text,
                input_tokens=completion.usage.prompt_tokens,
                output_tokens=completion.usage.completion_tokens,
                latency_s=round(time.monotonic() - started, 3),
                confidence=mean_probability(completion.choices[0].logprobs),
            )
    return None


def write_outcome_table(
    out: Path,
    tasks: Iterable[Task],
    journal: Journal,
    cards: Mapping[str, ExpertCard],
    options: CollectOptions,
) -> None:
    """Grade the journal's answers and write them as an outcome table.

    Args:
        out: Folder for the table.
        tasks: What was asked; their samples are the table's prompts.
        journal: The answers; cells without one are left out.
        cards: The models of the table with what is known of them.
        options: Which samples become rows.
    """
    import numpy as np

    questions = _questions(tasks, options)
    columns = ("score", "input_tokens", "output_tokens", "latency_s", "confidence")
    numbers = {column: np.full((len(questions), len(cards)), np.nan) for column in columns}
    for row, (sample, task) in enumerate(questions):
        for column, model in enumerate(cards):
            answer = journal.find(sample, model)
            if answer:
                numbers["score"][row, column] = task.grade(answer.answer, sample)
                numbers["input_tokens"][row, column] = answer.input_tokens
                numbers["output_tokens"][row, column] = answer.output_tokens
                if answer.latency_s is not None:
                    numbers["latency_s"][row, column] = answer.latency_s
                if answer.confidence is not None:
                    numbers["confidence"][row, column] = min(1.0, answer.confidence)
    for name in ("latency_s", "confidence"):
        if np.isnan(numbers[name]).all():
            del numbers[name]
    samples = [sample for sample, _ in questions]
    prompts = Prompts(
        [sample.prompt_id for sample in samples],
        [sample.text for sample in samples],
        [sample.category for sample in samples],
        [sample.split for sample in samples],
    )
    facts = {
        name: card.model_dump(mode="json", include=CARD_FIELDS, exclude_none=True)
        for name, card in cards.items()
    }
    for known in facts.values():
        # Of retrievers only: what most experts add to a prompt is nothing.
        if not known["added_prompt_tokens"]:
            del known["added_prompt_tokens"]
    OutcomeTable(prompts, models=list(cards), numbers=numbers, cards=facts).write(out)
