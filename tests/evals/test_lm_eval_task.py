from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from evals.tasks import TABLE_SPLITS, Split, Task, TaskError, get_task, get_tasks
from routers.outcomes import OutcomeTable

pytest.importorskip("lm_eval")

NUMBER = {"function": "regex", "regex_pattern": r"(-?\d+)"}
TAKE_FIRST = {"function": "take_first"}
FILTERS = [
    {"name": "first", "filter": [NUMBER, TAKE_FIRST]},
    {"name": "last", "filter": [{**NUMBER, "group_select": -1}, TAKE_FIRST]},
]
FUNCTIONS = """
def grades(doc, results):
    right = results[0] == doc["answer"]
    return {"half": right / 2, "percent": 100.0 * right, "pair": (doc["answer"], results[0])}

def fails(doc, results):
    raise RuntimeError("no judge")

def halved(references, predictions, **kwargs):
    return 0.5 * (references[0] == predictions[0])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path


def write(folder: Path, *splits: str, rows: int = 10, name: str = "sums", **settings: Any) -> str:
    """Write a task file of lm-eval's and its data; returns the task's name for `--tasks`."""
    files = {}
    for split in splits or ("train", "validation", "test"):
        files[split] = str(folder / f"{name}-{split}.jsonl")
        lines = [
            json.dumps({"question": f"{split}: {n} + {n}?", "answer": str(2 * n)}) + "\n"
            for n in range(rows)
        ]
        Path(files[split]).write_text("".join(lines))
    keys = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **{keys[split]: split for split in files},
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n", "Q:"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **settings,
    }
    text = yaml.safe_dump({key: value for key, value in task.items() if value is not None})
    file = folder / f"{name}.yaml"
    file.write_text(text.replace("FUNCTION ", "!function functions."))
    return f"lm-eval:{file}"


def answers(task: Task, split: Split = "test") -> dict[str, float]:
    """The scores of ways to answer the sample about 3 + 3."""
    sample = task.samples(split)[3]
    texts = ("6", " 6", "6.", "6\n\nQ: 9 + 9?", "3 + 3 = 6", "6 or 7", "7", "")
    return {text: task.grade(text, sample) for text in texts}


def test_a_tasks_splits_are_ours(folder: Path) -> None:
    task = get_task(write(folder))
    assert isinstance(task, Task)
    assert (task.name, task.max_tokens) == ("sums", 12)
    assert task.samples("adapter") == []
    for split in TABLE_SPLITS:
        samples = task.samples(split)
        assert [s.prompt_id for s in samples] == [f"sums-{split}-{n:04d}" for n in range(10)]
        assert {(s.category, s.split) for s in samples} == {("sums", split)}
        assert (samples[3].text, samples[3].answer) == (f"Q: {split}: 3 + 3?\nA:", "6")
    assert get_task(f"lm-eval:{folder}/sums.yaml").samples("train") == task.samples("train")


def test_the_only_split_is_divided_and_stays_so(folder: Path) -> None:
    task, again = (get_task(write(folder, "test", rows=200)) for _ in range(2))
    parts = {split: task.samples(split) for split in TABLE_SPLITS}
    assert {split: again.samples(split) for split in reversed(TABLE_SPLITS)} == parts
    assert len({sample.text for part in parts.values() for sample in part}) == 200
    sizes = [len(part) for part in parts.values()]
    assert sizes == pytest.approx([120, 40, 40], abs=15)
    sample = parts["validation"][0]
    assert sample.prompt_id.startswith("sums-validation-")
    assert get_task(f"lm-eval:{folder}/sums.yaml").grade(sample.answer, sample) == 1


def test_a_split_named_twice_is_asked_once(folder: Path) -> None:
    task = get_task(write(folder, "train", "test", validation_split="test"))
    assert [len(task.samples(split)) for split in TABLE_SPLITS] == [10, 0, 10]


def test_answers_are_cut_and_matched(folder: Path) -> None:
    right = {text for text, score in answers(get_task(write(folder))).items() if score == 1}
    assert right == {"6", "6\n\nQ: 9 + 9?"}


@pytest.mark.parametrize(
    ("chosen", "right"),
    [
        ("", {"6", " 6", "6.", "6\n\nQ: 9 + 9?", "6 or 7"}),
        ("#exact_match,first", {"6", " 6", "6.", "6\n\nQ: 9 + 9?", "6 or 7"}),
        ("#exact_match,last", {"6", " 6", "6.", "6\n\nQ: 9 + 9?", "3 + 3 = 6"}),
    ],
)
def test_filters_are_lm_evals(folder: Path, chosen: str, right: set[str]) -> None:
    task = get_task(write(folder, filter_list=FILTERS) + chosen)
    assert {text for text, score in answers(task).items() if score == 1} == right


def test_metrics_may_be_functions_beside_the_task_file(folder: Path) -> None:
    metric = {"metric": "FUNCTION halved", "aggregation": "mean", "higher_is_better": True}
    assert answers(get_task(write(folder, metric_list=[metric])))["6"] == 0.5
    metrics = [{"metric": name, "aggregation": "mean"} for name in ("percent", "half", "pair")]
    spec = write(
        folder,
        process_results="FUNCTION grades",
        metric_list=[{**metric, "higher_is_better": True} for metric in metrics],
    )
    assert answers(get_task(spec + "#half"))["6"] == 0.5
    for name in ("percent", "pair", "nothing"):
        with pytest.raises(TaskError, match=rf"metric '{name}' of lm-eval task 'sums' .* 'half'"):
            get_task(f"{spec}#{name}")


def test_prompts_and_scores_are_those_of_lm_evals_own_run(folder: Path) -> None:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    texts = ["0 or 8", "6.", "none", ""]

    class Answers(LM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [texts[n % 4] for n, _ in enumerate(requests)]

        loglikelihood = loglikelihood_rolling = generate_until

    spec = write(
        folder, num_fewshot=2, filter_list=FILTERS, description="Add up.\n\n",
        gen_prefix="The sum is",
    )  # fmt: skip
    manager = TaskManager(include_path=folder, include_defaults=False)
    run = lm_eval.simple_evaluate(
        Answers(), tasks=["sums"], task_manager=manager, bootstrap_iters=0, torch_random_seed=None
    )
    for name in ("first", "last"):
        task = get_task(f"{spec}#exact_match,{name}")
        theirs = [row for row in run["samples"]["sums"] if row["filter"] == name]
        ours = task.samples("test")
        assert [sample.text for sample in ours] == [row["arguments"][0][0] for row in theirs]
        scores = [task.grade(texts[n % 4], sample) for n, sample in enumerate(ours)]
        assert scores == [row["exact_match"] for row in theirs]
        assert sum(scores) / len(scores) == run["results"]["sums"][f"exact_match,{name}"]
        assert 0 < sum(scores) < len(scores)


@pytest.mark.parametrize("splits", [("train", "test"), ("test",), ("validation",)])
def test_no_prompt_holds_its_own_answer_as_an_example(folder: Path, splits: Any) -> None:
    task = get_task(write(folder, *splits, num_fewshot=4))
    samples = [sample for split in TABLE_SPLITS for sample in task.samples(split)]
    for sample in samples:
        *examples, question = sample.text.split("\n\n")
        assert len(examples) == 4
        assert not any(example.startswith(question) for example in examples)


def test_the_documents_example_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    (folder / "capitals.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    row = {"question": "Capital of Kenya?", "options": ["Nairobi", "Mombasa"], "answer": "A"}
    for split in ("train", "test"):
        (folder / f"capitals-{split}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(folder)
    (task,) = get_tasks("lm-eval:capitals.yaml")
    (sample,) = task.samples("test")
    assert sample.text.splitlines()[1:3] == ["A. Nairobi", "B. Mombasa"]
    scores = [task.grade(text, sample) for text in ("A", "Not B but **A**.", "B", "Nairobi")]
    assert scores == [1, 1, 0, 0]


def test_a_group_gives_all_its_tasks(folder: Path) -> None:
    write(folder, name="one")
    write(folder, name="two", metric_list=[{"metric": "exact_match"}])
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    spec = f"lm-eval:{folder}/both.yaml"
    tasks = get_tasks(spec)
    assert [task.name for task in tasks] == ["one", "two"]
    assert {sample.category for sample in tasks[1].samples("test")} == {"two"}
    with pytest.raises(TaskError, match="group of tasks, name one of them: 'one', 'two'"):
        get_task(spec)
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "three"]}))
    with pytest.raises(TaskError, match="group 'both' has 'three', which is no task"):
        get_tasks(spec)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"output_type": "multiple_choice"}, "'sums' is multiple_choice: .* generate_until"),
    ({"output_type": "loglikelihood"}, "'sums' is loglikelihood: .* only generate_until"),
    ({"output_type": "loglikelihood_rolling"}, "'sums' is loglikelihood_rolling"),
    ({"unsafe_code": True}, "runs the code that models write"),
    ({"doc_to_image": ["question"]}, "images or sound"),
    ({"dataset_path": "openai/gsm8k", "dataset_kwargs": None}, "'.*sums.yaml' is not on this mach"),
    ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl.*local data_files"),
    ({"dataset_kwargs": {"data_files": "https://host.invalid/a.jsonl"}}, "nothing is downloaded"),
    ({"metric_list": [{"metric": "rouge", "hf_evaluate": True}]}, "'rouge' .* not lm-eval's own"),
    ({"metric_list": [{"metric": "exact"}]}, "'exact' of lm-eval task 'sums' is not lm-eval's own"),
    ({"metric_list": [{"metric": "bleu"}]}, "'bleu' of lm-eval task 'sums' is no score"),
    (
        {"metric_list": [{"metric": "exact_match", "higher_is_better": False}]},
        "'exact_match' .* lower is better",
    ),
    ({"process_results": "FUNCTION fails"}, "cannot score the answer '0': RuntimeError: no judge"),
    ({"process_results": "FUNCTION missing"}, "has no function 'missing'"),
    ({"test_split": "exam"}, "cannot load task .*: KeyError: 'exam'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_collected_is_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        get_task(write(folder, **settings))


def test_names_after_the_sign_must_be_known(folder: Path) -> None:
    spec = write(folder, filter_list=FILTERS)
    with pytest.raises(TaskError, match=r"metric 'f1' .* choose one by #METRIC: 'exact_match'"):
        get_task(spec + "#f1")
    with pytest.raises(TaskError, match="no filter 'loose'; known: 'first', 'last'"):
        get_task(spec + "#exact_match,loose")


def test_files_that_are_no_tasks_are_refused(folder: Path) -> None:
    with pytest.raises(TaskError, match=r"no lm-eval task file '.*none\.yaml'"):
        get_task(f"lm-eval:{folder}/none.yaml")
    (folder / "list.yaml").write_text("- 1\n")
    with pytest.raises(TaskError, match=r"list\.yaml is no lm-eval task file"):
        get_task(f"lm-eval:{folder}/list.yaml")


def test_prompts_that_cannot_be_made_are_an_error(folder: Path) -> None:
    task = get_task(write(folder, rows=2, num_fewshot=5))
    with pytest.raises(TaskError, match="cannot make the prompts of task 'sums'"):
        task.samples("test")


GSM8K = """---
configs:
- config_name: main
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
---
"""


@pytest.mark.slow  # lm-eval reads some fourteen thousand files to know its tasks
def test_lm_evals_own_tasks_are_found_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TaskError, match=r"knows no task 'gsm9k'; did you mean 'gsm8k'"):
        get_task("lm-eval:gsm9k")
    with pytest.raises(TaskError, match="data of lm-eval task 'gsm8k' is not on this machine"):
        get_task("lm-eval:gsm8k")
    with pytest.raises(TaskError, match="'mmlu_abstract_algebra' is multiple_choice"):
        get_tasks("lm-eval:mmlu")
    with pytest.raises(TaskError, match="'arc_challenge' is multiple_choice"):
        get_tasks("lm-eval:ai2_arc")
    data = folder / "openai" / "gsm8k"
    data.mkdir(parents=True)
    (data / "README.md").write_text(GSM8K)
    for split in ("train", "test"):
        rows = [{"question": f"{split} {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(8)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)  # where lm-eval's "openai/gsm8k" is a folder
    strict, loose = (get_task(f"lm-eval:gsm8k#exact_match,{name}") for name in
                     ("strict-match", "flexible-extract"))  # fmt: skip
    sample = loose.samples("test")[3]
    assert sample.text.count("Question: train") == 5
    assert sample.text.endswith("Question: test 3?\nAnswer:")
    answers = ("So #### 3", "So 3.", "So 3.\n\nQuestion: 4")
    assert [strict.grade(answer, sample) for answer in answers] == [1, 0, 0]
    assert [loose.grade(answer, sample) for answer in answers] == [1, 1, 1]


def test_libraries_may_download_again_after_loading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(TaskError, match="OfflineModeIsEnabled"):
        get_task(write(folder, dataset_path="openai/gsm8k", dataset_kwargs=None))
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(TaskError, match=r"collegium\[eval\]"):
        get_task("lm-eval:gsm8k")


def collect(folder: Path, *arguments: str) -> Result:
    from orchestrator.cli import main

    rules = {"good": [{"match": r"3 \+ 3", "answer": "It is 6.\n\nQ: 1?"}], "bad": []}
    experts = [
        {"name": name, "engine": "scripted", "rules": [*own, {"answer": "0"}]}
        for name, own in rules.items()
    ]
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"experts": experts}))
    return CliRunner().invoke(
        main, ["collect", "--config", str(config), "--out", str(folder / "out"), *arguments]
    )


@pytest.mark.parametrize("active", [(), ("--active",)])
def test_collect_writes_the_table(folder: Path, active: tuple[str, ...]) -> None:
    spec = write(folder, filter_list=FILTERS)
    result = collect(folder, "--tasks", f"{spec}#exact_match", "maths", "--limit", "5", *active)
    assert result.exit_code == 0, result.output
    table = OutcomeTable.load(folder / "out")
    ids = [f"sums-{split}-{n:04d}" for split in TABLE_SPLITS for n in range(5)]
    rows = [table.prompts.ids.index(prompt_id) for prompt_id in ids]
    assert table.models == ["good", "bad"]
    # Each split asks for 0 + 0 first, which both know.
    expected = np.array([[1, 1], [0, 0], [0, 0], [1, 0], [0, 0]] * 3)
    scores = table.scores("all")[rows]
    asked = ~np.isnan(scores)
    assert (scores[asked] == expected[asked]).all()
    assert asked.all() or (active and asked.any())


def test_collect_says_what_is_wrong(folder: Path) -> None:
    result = collect(folder, "--tasks", write(folder, output_type="loglikelihood"))
    assert (result.exit_code, "only generate_until tasks" in result.output) == (2, True)
    spec = write(folder)
    result = collect(folder, "--tasks", spec, f"{spec}#exact_match")
    assert (result.exit_code, "2 tasks are called 'sums'" in result.output) == (2, True)
    result = collect(folder, "--tasks", write(folder, rows=2, num_fewshot=5))
    assert (result.exit_code, "cannot make the prompts" in result.output) == (1, True)
    assert "Traceback" not in result.output
