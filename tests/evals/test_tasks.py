from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from evals.cli import tasks_command
from evals.tasks import SPLITS, TABLE_SPLITS, Sample, Split, Task, chore_names, get_task, task_names
from evals.tasks.base import normalise
from evals.tasks.docstrings import token_f1

NAMES = ["docstrings", "extract", "general", "intents", "maths"]
CHORES = ["dates", "html", "nato", "roman", "shell", "sql", "times", "yaml"]
PRINT_TEXTS = """
from evals.tasks import SPLITS, chore_names, get_task, task_names
import hashlib
samples = [get_task(n).samples(s) for n in task_names() + chore_names() for s in SPLITS]
print(hashlib.sha256(repr(samples).encode()).hexdigest())
"""


@pytest.fixture(params=[*NAMES, *CHORES])
def task(request: pytest.FixtureRequest) -> Task:
    return get_task(request.param)


def sample_with(answer: str) -> Sample:
    return Sample("x-test-0000", "question", answer, "x", "test")


def grade(task: str, answer_text: str, expected: str) -> float:
    return get_task(task).grade(answer_text, sample_with(expected))


def test_registry_knows_the_tasks() -> None:
    assert task_names() == NAMES
    assert chore_names() == CHORES


def test_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown task 'chess'; known: 'docstrings'"):
        get_task("chess")


def test_own_task_is_found_by_module_and_class() -> None:
    assert get_task("evals.tasks.maths:MathsTask").name == "maths"


@pytest.mark.parametrize("name", ["nowhere:Task", "evals.tasks.maths:Nothing", "json:JSONDecoder"])
def test_what_is_no_task_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        get_task(name)


def test_splits_are_large_enough_to_learn_from_and_to_judge(task: Task) -> None:
    sizes = {split: len(task.samples(split)) for split in SPLITS}
    assert sizes["train"] >= 120
    assert sizes["validation"] >= 40
    assert sizes["test"] >= 80
    assert sizes["adapter"] >= 1500 or task.name in ("general", *CHORES)
    assert sizes["adapter"] >= 600 or task.name == "general"


def test_no_text_is_in_two_splits(task: Task) -> None:
    texts = [sample.text for split in SPLITS for sample in task.samples(split)]
    assert len(texts) == len(set(texts))


def test_prompt_ids_are_unique_over_all_tasks() -> None:
    ids = [
        s.prompt_id
        for name in NAMES + CHORES
        for split in SPLITS
        for s in get_task(name).samples(split)
    ]
    assert len(ids) == len(set(ids))


def test_samples_know_their_split_and_category(task: Task) -> None:
    for split in SPLITS:
        assert {(s.split, s.category) for s in task.samples(split)} <= {(split, task.name)}


def test_callers_cannot_change_the_samples_of_others(task: Task) -> None:
    task.samples("test").clear()
    assert task.samples("test")


def test_samples_are_the_same_in_every_process() -> None:
    def texts(seed: str) -> str:
        command = [sys.executable, "-c", PRINT_TEXTS]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    assert texts("1") == texts("2") != ""


def test_expected_answers_get_full_marks(task: Task) -> None:
    for split in SPLITS:
        for sample in task.samples(split):
            assert task.grade(sample.answer.split("|")[0], sample) == 1


@pytest.mark.parametrize("text", ["", "   ", "{", "}{", "\n\n", "-", "1e999", "[1]", "{}" * 500])
def test_any_text_can_be_graded(task: Task, text: str) -> None:
    assert task.grade(text, task.samples("test")[0]) == 0


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("name", ["docstrings", "extract", "intents", "maths"])
def test_half_of_the_judged_samples_use_wordings_nobody_trained_on(name: str, split: Split) -> None:
    from importlib import import_module

    module = import_module(f"evals.tasks.{name}")
    wordings = getattr(module, {"extract": "_ASKS", "maths": "_SUMS"}.get(name, "_WORDINGS"))
    assert not set(getattr(wordings, split)) & set(wordings.shared)

    starts = [t.split("{")[0].strip() for t in getattr(wordings, split)]
    starts = [start for start in starts if len(start) > 8]
    trained = "\n".join(sample.text for sample in get_task(name).samples("adapter"))
    assert starts
    assert not any(start in trained for start in starts)


def test_intents_keep_utterances_of_the_judged_splits_out_of_training() -> None:
    from evals.tasks.data import read_jsonl

    rows = read_jsonl("intents.jsonl")
    by_split = {s: {r["text"].lower() for r in rows if r["split"] == s} for s in SPLITS}
    assert not by_split["adapter"] & (by_split["train"] | by_split["validation"] | by_split["test"])
    assert not by_split["train"] & (by_split["validation"] | by_split["test"])


def test_docstrings_of_a_module_are_in_one_split() -> None:
    from evals.tasks.data import read_jsonl

    splits_of: dict[str, set[str]] = {}
    for row in read_jsonl("docstrings.jsonl"):
        splits_of.setdefault(row["module"].split(".")[0], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of.values())


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("423", 1), ("345 + 78 = 423.", 1), ("It is 1,423", 0), ("The sum is 423, not 500", 0),
        ("423.0", 1), ("-423", 0), ("four hundred", 0),
    ],
)  # fmt: skip
def test_maths_takes_the_last_number(answer: str, score: float) -> None:
    assert grade("maths", answer, "423") == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Credit_Limit change.", 1), ("credit limit", 0), ("the intent is credit limit change", 0)],
)
def test_intents_want_the_label_alone(answer: str, score: float) -> None:
    assert grade("intents", answer, "credit limit change") == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"name": "Ann", "quantity": 3}', 1),
        ('```json\n{"name": "ann", "quantity": "3"}\n```', 1),
        ('{"name": "Ann", "quantity": 4}', 0.5),
        ('{"name": "Ann"}', 0.5),
        ("name: Ann, quantity: 3", 0),
        ('["Ann", 3]', 0),
    ],
)
def test_extract_counts_right_fields(answer: str, score: float) -> None:
    assert grade("extract", answer, '{"name": "Ann", "quantity": 3}') == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("The city is New Delhi.", 1), ("DELHI", 1), ("Delhiwala", 0), ("Mumbai", 0)],
)
def test_general_finds_an_expected_answer_as_whole_words(answer: str, score: float) -> None:
    assert grade("general", answer, "New Delhi|Delhi") == score


def test_docstrings_score_word_overlap_of_the_first_line() -> None:
    assert grade("docstrings", "```\nReturn the name.\nMore.", "Return the user name.") == (
        pytest.approx(6 / 7)
    )
    assert token_f1("a a b", "a b b") == pytest.approx(2 / 3)
    assert token_f1("", "a") == 0


def test_normalise_keeps_letters_of_all_languages() -> None:
    assert normalise("Bogotá,  is_it?") == "bogotá is it"


def test_importing_tasks_is_light() -> None:
    heavy = "torch ray pyarrow pandas transformers numpy".split()
    code = f"import evals.tasks, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_export_prints_the_training_pairs() -> None:
    result = CliRunner().invoke(tasks_command, ["export", "maths", "--split", "adapter"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    samples = get_task("maths").samples("adapter")
    assert [(r["prompt"], r["answer"]) for r in rows] == [(s.text, s.answer) for s in samples]


@pytest.mark.parametrize("arguments", [["export", "chess"], ["export", "general"]])
def test_export_of_nothing_is_wrong_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(tasks_command, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_list_names_every_task_and_split() -> None:
    sizes = json.loads(CliRunner().invoke(tasks_command, ["list", "--json"]).stdout)
    assert list(sizes) == NAMES + CHORES
    assert all(set(TABLE_SPLITS) < set(counts) for counts in sizes.values())


@pytest.mark.parametrize(
    ("task", "answer", "right"),
    [
        ("dates", "2021-03-04", " 2021-03-04.\n"),
        ("times", "train 16:30", "Train 16:30"),
        ("sql", "SELECT * FROM a WHERE b = 'c'", '`select *  from a where b = "c";`'),
        ("html", '<a href="/x">X</a>', "<a href='/x'>X</a>"),
        ("yaml", "name: Ben\nage: 3", "name: Ben\nage: 3\n"),
    ],
)
def test_chores_have_one_right_answer_whatever_its_spaces_case_and_quotes(task, answer, right):
    assert grade(task, right, answer) == 1
    assert grade(task, f"{right} or so", answer) == 0


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("roman", "944", "CMXLIV"),
        ("roman", "388", "CCCLXXXVIII"),
        ("nato", "GUO", "Golf Uniform Oscar"),
        ("times", "half past four in the afternoon", "16:30"),
        ("times", "a quarter to twelve at night", "23:45"),
    ],
)
def test_answers_of_chores_follow_from_their_questions(task: str, text: str, answer: str) -> None:
    found = [s for split in SPLITS for s in get_task(task).samples(split) if text in s.text.split()
             or f"at {text}" in s.text]  # fmt: skip
    assert found
    assert all(sample.answer.endswith(answer) for sample in found)
