from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest

from evals.collect import Answer, CollectError, Journal, collect, text_hash, write_outcome_table
from evals.collect_options import CollectOptions
from evals.elimination import BATCH
from evals.tasks import Sample, Split
from experts.base import AnyRequest
from experts.errors import ExpertConfigError, ExpertError, ExpertUnavailableError
from experts.types import ChatRequest, Chunk, ExpertCard, Usage
from routers.outcomes import OutcomeTable

pytest.importorskip("pyarrow")


class SpellingTask:
    """Repeat a word; full marks if the answer is the word."""

    name = "spelling"
    max_tokens = 5

    def samples(self, split: Split) -> list[Sample]:
        words = {"train": ["one", "two"], "validation": ["three"], "test": ["four"]}.get(split, [])
        return [
            Sample(f"spelling-{split}-{i}", f"say {word}", word, "spelling", split)
            for i, word in enumerate(words)
        ]

    def grade(self, answer_text: str, sample: Sample) -> float:
        return float(answer_text == sample.answer)


class RepeatingExpert:
    """Repeats the last word, after raising the given errors one by one."""

    def __init__(self, name: str, suffix: str = "", errors: list[Exception] | None = None) -> None:
        self.card = ExpertCard(name=name, total_params_b=0.5, base_model="base", adapter=name)
        self.suffix, self.errors = suffix, errors or []
        self.requests: list[ChatRequest] = []

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        assert isinstance(request, ChatRequest)
        self.requests.append(request)
        if self.errors:
            raise self.errors.pop(0)
        word = request.messages[-1].text.split()[-1] + self.suffix
        yield Chunk(text=word[:1])
        yield Chunk(text=word[1:], finish_reason="stop", usage=Usage.of(7, 2))

    async def check_health(self) -> None: ...

    async def aclose(self) -> None: ...


def run(out: Path, *experts: RepeatingExpert) -> dict[str, int]:
    options = CollectOptions(concurrency=2)
    return asyncio.run(collect({e.card.name: e for e in experts}, [SpellingTask()], out, options))


def test_table_holds_every_expert_on_every_prompt(tmp_path: Path) -> None:
    assert run(tmp_path, RepeatingExpert("good"), RepeatingExpert("bad", "!")) == {}
    table = OutcomeTable.load(tmp_path)
    assert table.prompts.texts == ["say one", "say two", "say three", "say four"]
    assert table.prompts.splits == ["train", "train", "validation", "test"]
    assert table.models == ["good", "bad"]
    assert table.scores("all").tolist() == [[1, 0]] * 4
    assert (table.latency_s("all") >= 0).all()


def test_models_file_holds_the_cards_facts(tmp_path: Path) -> None:
    run(tmp_path, RepeatingExpert("good"))
    assert json.loads((tmp_path / "models.json").read_text())["good"] == {
        "total_params_b": 0.5, "input_usd_per_mtok": 0.0, "output_usd_per_mtok": 0.0,
        "base_model": "base", "adapter": "good",
    }  # fmt: skip


def test_requests_are_greedy_and_as_long_as_the_task_allows(tmp_path: Path) -> None:
    expert = RepeatingExpert("good")
    run(tmp_path, expert)
    assert {(r.temperature, r.max_tokens) for r in expert.requests} == {(0, 5)}


def test_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    breaking = RepeatingExpert("good", errors=[ExpertConfigError("the weights are gone")])
    with pytest.raises(ExpertConfigError, match="weights are gone"):
        run(tmp_path, breaking)
    answered = len(Journal(tmp_path / "answers.jsonl").answers)
    second, third = RepeatingExpert("good"), RepeatingExpert("good")
    run(tmp_path, second)
    run(tmp_path, third)
    assert 0 < answered < 4
    assert len(second.requests) == 4 - answered
    assert third.requests == []


def test_cut_off_last_line_is_asked_for_again(tmp_path: Path) -> None:
    run(tmp_path, RepeatingExpert("good"))
    journal = tmp_path / "answers.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    again = RepeatingExpert("good")
    run(tmp_path, again)
    assert len(again.requests) == 1
    assert len(Journal(journal).answers) == 4


def test_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(CollectError, match=r"line 1 of .*answers\.jsonl"):
        run(tmp_path, RepeatingExpert("good"))


def test_passing_failure_is_tried_again(tmp_path: Path) -> None:
    failing = RepeatingExpert("good", errors=[ExpertUnavailableError("good")])
    assert run(tmp_path, failing) == {}
    assert len(failing.requests) == 5


def test_lasting_failure_is_reported_and_left_out(tmp_path: Path) -> None:
    failing = RepeatingExpert("good", errors=[ExpertError("no") for _ in range(3)])
    assert run(tmp_path, failing) == {"good": 3}
    assert (OutcomeTable.load(tmp_path).scores("all") == 1).sum() == 1


def test_answer_to_another_text_is_not_used(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    sample = SpellingTask().samples("test")[0]
    journal.append(Answer(sample.prompt_id, "good", text_hash("old text"), "four", 1, 1, None))
    assert journal.find(sample, "good") is None


def test_unmeasured_latency_is_left_out_of_the_table(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    task = SpellingTask()
    for sample in task.samples("test"):
        journal.append(Answer(sample.prompt_id, "good", text_hash(sample.text), "four", 3, 1, None))
    write_outcome_table(
        tmp_path,
        [task],
        journal,
        {"good": ExpertCard(name="good")},
        CollectOptions(splits=["test"]),
    )
    import pyarrow.parquet as parquet

    names = parquet.read_schema(tmp_path / "outcomes.parquet").names
    assert names == ["prompt_id", "model", "score", "input_tokens", "output_tokens"]


def test_nothing_to_collect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CollectError, match="nothing to collect"):
        run(tmp_path)


@pytest.mark.slow
def test_killed_runs_go_on_without_a_lost_or_doubled_row(tmp_path: Path) -> None:
    from benchmarks.collect_kills import differences, killed_and_resumed

    _, clean, killed = killed_and_resumed(tmp_path, kills=3)
    assert differences(clean, killed) == []


class ManyWordsTask(SpellingTask):
    """Fifty words in one category."""

    def samples(self, split: Split) -> list[Sample]:
        return [
            Sample(f"many-{i}", f"say word{i}", f"word{i}", "many", split)
            for i in range(50 if split == "train" else 0)
        ]


def test_active_collection_drops_experts_that_cannot_be_the_best(tmp_path: Path) -> None:
    good, bad = RepeatingExpert("good"), RepeatingExpert("bad", suffix="!")
    options = CollectOptions(active=True)
    assert (
        asyncio.run(collect({"good": good, "bad": bad}, [ManyWordsTask()], tmp_path, options)) == {}
    )
    assert len(good.requests) + len(bad.requests) <= 50
    table = OutcomeTable.load(tmp_path)
    scores = table.scores("all")
    assert (scores[:, 0][scores[:, 0] >= 0] == 1).all()
    asked = len(good.requests)
    asyncio.run(collect({"good": good, "bad": bad}, [ManyWordsTask()], tmp_path, options))
    assert len(good.requests) == asked, "a run that goes on asks nothing twice"


class SplitWordsTask(SpellingTask):
    """Fifty words to learn from and twenty to judge on, in one category."""

    def samples(self, split: Split) -> list[Sample]:
        count = {"train": 50, "test": 20}.get(split, 0)
        return [
            Sample(f"words-{split}-{i}", f"say {split}{i}", f"{split}{i}", "words", split)
            for i in range(count)
        ]


class TrainedExpert(RepeatingExpert):
    """Repeats the words it was trained on, and no others."""

    async def stream(self, request: AnyRequest, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        assert isinstance(request, ChatRequest)
        self.suffix = "" if "train" in request.messages[-1].text else "!"
        async for chunk in super().stream(request, timeout_s=timeout_s):
            yield chunk


def test_active_collection_drops_by_training_scores_and_asks_all_other_prompts_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {"bad": RepeatingExpert("bad", "!"), "trained": TrainedExpert("trained")}
    missing = asyncio.run(
        collect(experts, [SplitWordsTask()], tmp_path, CollectOptions(active=True))
    )
    assert missing == {}
    table = OutcomeTable.load(tmp_path)
    assert not np.isnan(table.scores("test")).any()
    asked = (~np.isnan(table.scores("train"))).sum(axis=0)
    assert asked.tolist() == [BATCH, BATCH], "the best is known after the first look"
    told = capsys.readouterr().err
    assert f"words: the best is trained; dropped bad after {BATCH} of 50 train prompts" in told
    assert f"{2 * (BATCH + 20)}/{2 * (BATCH + 20)}" in told, "the bar counts what is asked"


def test_active_collection_of_one_split_drops_by_its_scores(tmp_path: Path) -> None:
    experts = {"good": RepeatingExpert("good"), "bad": RepeatingExpert("bad", "!")}
    options = CollectOptions(active=True, splits=["test"])
    asyncio.run(collect(experts, [SplitWordsTask()], tmp_path, options))
    assert np.isnan(OutcomeTable.load(tmp_path).scores("test")).any()


def test_active_collection_asks_all_where_experts_are_alike(tmp_path: Path) -> None:
    experts = [RepeatingExpert("one"), RepeatingExpert("two")]
    options = CollectOptions(active=True)
    asyncio.run(collect({e.card.name: e for e in experts}, [ManyWordsTask()], tmp_path, options))
    assert [len(expert.requests) for expert in experts] == [50, 50]


def test_active_collection_fails_with_the_experts_own_error(tmp_path: Path) -> None:
    broken = RepeatingExpert("broken", errors=[ExpertConfigError("no weights")])
    experts = {"broken": broken, "good": RepeatingExpert("good")}
    with pytest.raises(ExpertConfigError, match="no weights"):
        asyncio.run(collect(experts, [ManyWordsTask()], tmp_path, CollectOptions(active=True)))


def test_active_collection_needs_experts_to_compare(tmp_path: Path) -> None:
    experts = {"alone": RepeatingExpert("alone")}
    with pytest.raises(CollectError, match="leave out --active"):
        asyncio.run(collect(experts, [ManyWordsTask()], tmp_path, CollectOptions(active=True)))


def test_half_an_emoji_is_journalled(tmp_path: Path) -> None:
    answer = Answer("one", "good", "hash", "\ud83d", 1, 1, 0.5)
    Journal(tmp_path / "answers.jsonl").append(answer)
    assert Journal(tmp_path / "answers.jsonl").answers["one", "good"] == answer
