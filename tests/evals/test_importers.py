"""Files of others become tables; what is wrong with them is said with file and line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from evals.import_cli import import_command
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable

GOOD = """prompt,model,score,category,cost_usd
"What is 1 + 1?",a,1,maths,0.002
"What is 1 + 1?",b,0,maths,
"Name a river.
Only one.",a,0.5,general,0.001
"""


def _run(folder, name, content, *arguments):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    command = [str(file), "--out", str(folder / "table"), *arguments]
    return CliRunner().invoke(import_command, command)


def _table(folder):
    return OutcomeTable.load(folder / "table")


def test_csv(tmp_path):
    result = _run(tmp_path, "good.csv", GOOD)
    assert result.exit_code == 0, result.output
    table = _table(tmp_path)
    assert table.models == ["a", "b"]
    assert table.prompts.texts == ["What is 1 + 1?", "Name a river.\nOnly one."]
    assert table.prompts.categories == ["maths", "general"]
    assert table.prompts.splits is None
    assert np.array_equal(table.scores("all"), [[1.0, 0.0], [0.5, np.nan]], equal_nan=True)
    assert np.array_equal(
        table.costs_usd("all"), [[0.002, np.nan], [0.001, np.nan]], equal_nan=True
    )


def test_jsonl_with_other_names(tmp_path):
    rows = [{"question": "hi", "won": 1.0, "id": 7}, {"question": "ho", "won": 0, "id": 8}]
    result = _run(
        tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)), "--model", "m",
        "--column", "prompt=question", "--column", "score=won", "--column", "prompt_id=id",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert _table(tmp_path).prompts.ids == ["7", "8"]
    assert _table(tmp_path).scores("all").tolist() == [[1.0], [0.0]]


def test_each_files_own_ending_says_its_format(tmp_path):
    row = {"prompt": "Name a sea.", "model": "b", "score": 1, "category": "general"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    result = _run(tmp_path, "a.csv", GOOD, str(tmp_path / "b.jsonl"))
    assert result.exit_code == 0, result.output
    assert _table(tmp_path).prompts.texts[-1] == "Name a sea."
    (tmp_path / "c.txt").write_text("")
    result = _run(tmp_path, "a.csv", GOOD, str(tmp_path / "c.txt"), "--out", str(tmp_path / "d"))
    assert f"{tmp_path / 'c.txt'}: which format is it? Give --format" in result.stderr


LM_EVAL = [
    {"doc_id": 0, "target": "2", "arguments": {"gen_args_0": {"arg_0": "1 + 1 =", "arg_1": {}}},
     "resps": [["2"]], "filtered_resps": ["2"], "exact_match": 1.0},
    {"doc_id": 1, "target": "4", "arguments": [["2 + 2 =", {}]], "exact_match": 0.0},
]  # fmt: skip


def test_lm_eval_logs(tmp_path):
    name = "org__model/samples_gsm8k_2026-01-02T03-04-05.678901.jsonl"
    result = _run(tmp_path, name, "\n".join(map(json.dumps, LM_EVAL)), "--format", "lm-eval")
    assert result.exit_code == 0, result.output
    table = _table(tmp_path)
    assert table.models == ["org__model"]
    assert table.prompts.texts == ["1 + 1 =", "2 + 2 ="]
    assert table.prompts.categories == ["gsm8k", "gsm8k"]
    assert table.scores("all").tolist() == [[1.0], [0.0]]


def test_lm_evals_metric_is_asked_for_where_there_are_several(tmp_path):
    content = json.dumps({**LM_EVAL[0], "f1": 0.5})
    result = _run(tmp_path, "samples_t.jsonl", content, "--format", "lm-eval")
    assert "its metrics are 'exact_match', 'f1'; choose one with --metric" in result.stderr
    result = _run(tmp_path, "samples_t.jsonl", content, "--format", "lm-eval", "--metric", "f1")
    assert result.exit_code == 0
    assert _table(tmp_path).scores("all").tolist() == [[0.5]]


def test_lm_evals_first_filter_counts_unless_another_is_named(tmp_path):
    rows = [{**LM_EVAL[0], "filter": "strict-match", "exact_match": 0.0},
            {**LM_EVAL[0], "filter": "flexible-extract"}]  # fmt: skip
    content = "\n".join(map(json.dumps, rows))
    for number, (metric, score) in enumerate(
        [("exact_match", 0.0), ("exact_match,flexible-extract", 1.0)]
    ):
        folder = tmp_path / str(number)
        result = _run(folder, "samples_t.jsonl", content, "--format", "lm-eval", "--metric", metric)
        assert result.exit_code == 0, result.output
        assert _table(folder).scores("all").tolist() == [[score]]
    result = _run(tmp_path, "samples_t.jsonl", content, "--format", "lm-eval", "--metric", "x,y")
    assert "no filter 'y' for --metric; it has 'flexible-extract', 'strict-match'" in result.stderr


def test_ids_and_categories_may_be_numbers_and_prompts_long(tmp_path):
    row = {"prompt": "hi", "model": "m", "score": 1, "prompt_id": 0, "category": 0}
    assert _run(tmp_path, "a.jsonl", json.dumps(row)).exit_code == 0
    assert _table(tmp_path).prompts.ids == _table(tmp_path).prompts.categories == ["0"]
    result = _run(tmp_path / "long", "a.csv", f"prompt,model,score\n{'a' * 200_000},m,1\n")
    assert result.exit_code == 0, result.output


def test_alpaca_eval_annotations(tmp_path):
    rows = [
        {"instruction": "Write.", "generator_1": "ref", "generator_2": "m", "preference": 2.0},
        {"instruction": "Sing.", "generator_1": "ref", "generator_2": "m", "preference": 1.5},
        {"instruction": "Draw.", "generator_1": "ref", "generator_2": "m", "preference": 0},
        {"instruction": "Dance.", "generator_1": "ref", "generator_2": "m", "preference": None},
    ]
    content = json.dumps(rows)
    result = _run(tmp_path, "annotations.json", content, "--format", "alpaca-eval")
    assert result.exit_code == 0, result.output
    assert _table(tmp_path).prompts.texts == ["Write.", "Sing.", "Draw."]
    assert _table(tmp_path).scores("all").tolist() == [[1.0], [0.5], [0.5]]
    result = _run(
        tmp_path, "other.json", "[1]", "--format", "alpaca-eval", "--out", str(tmp_path / "b")
    )
    assert "entry 0: must be an object, not int" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,model,score\nq,m,1", "line 1: no 'prompt'; it has 'question'"),
        ("a.csv", "prompt,score\nq,1", "no 'model'; it has 'prompt', 'score'"),
        ("a.csv", "prompt,model,score\nq,m,1\nq2,m,7", "line 3: score is 7; scale scores"),
        ("a.csv", "prompt,model,score\nq,m,good", "line 2: score is 'good'; it must be a number"),
        ("a.csv", "prompt,model,score\nq,,1", "line 2: model is ''; it must be a text"),
        ("a.csv", "prompt,model,score\nq,m", "line 2: its number of cells"),
        (
            "a.csv",
            "prompt,model,score\nq,m,1\nr,m,1\nq,m,0",
            "line 4: prompt and model are those of",
        ),
        (
            "a.csv",
            "prompt,model,score,prompt_id\nq,m,1,x\nr,n,1,x",
            "line 3: another prompt has the id 'x' in",
        ),
        (
            "a.csv",
            "prompt,model,score,prompt_id\nq,m,1,x\nr,m,1,\nq,n,1,",
            "line 4: no prompt_id, unlike the same prompt in",
        ),
        (
            "a.csv",
            "prompt,model,score,prompt_id\nq,m,1,\nq,n,1,x",
            "line 3: a prompt_id, unlike the same prompt in",
        ),
        ("a.csv", "prompt,model,score\nq,m,1\nr, m,1", "line 3: model is ' m'; take the blanks"),
        (
            "a.csv",
            "prompt,model,score,category\nq,m,1,one \nr,m,1,one",
            "line 2: category is 'one '; take the blanks",
        ),
        ("a.csv", "prompt,model,score\nq,m,1\nr,m,", "line 3: score is empty; leave the row out"),
        (
            "a.jsonl",
            '{"prompt": "q", "model": "m", "score": null}',
            "line 1: score is empty; leave the row out: a missing cell is one without a row",
        ),
        (
            "a.csv",
            "prompt,model,score,category\nq,m,1,one\nq,n,1,two",
            "line 3: category 'two', but 'one' for the same prompt",
        ),
        (
            "a.csv",
            "prompt,model,score,split\nq,m,1,dev",
            "line 2: split is 'dev'; known: train, validation, test",
        ),
        ("a.csv", "prompt,model,score,latency_s\nq,m,1,-1", "latency_s is -1; it must not be"),
        ("a.csv", "prompt,model,score\n", "there are no rows"),
        ("a.jsonl", '{"prompt": "q", "model": "m", "score": 1}\n[1]', "line 2: must be an object"),
        ("a.jsonl", "{", "line 1: no JSON"),
        (
            "a.jsonl",
            '{"prompt": "q", "model": "m", "score": 1' + "0" * 400 + "}",
            "must be a number",
        ),
        ("a.txt", "", "which format is it? Give --format"),
    ],
)
def test_mistakes_name_file_line_and_fix(tmp_path, name, content, message):
    result = _run(tmp_path, name, content)
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(tmp_path / name) in result.stderr or "no rows" in message
    assert not (tmp_path / "table").exists()


def test_files_are_not_overwritten_and_columns_must_be_known(tmp_path):
    assert _run(tmp_path, "a.csv", GOOD).exit_code == 0
    assert "is not empty" in _run(tmp_path, "a.csv", GOOD).stderr
    result = CliRunner().invoke(
        import_command,
        [str(tmp_path / "a.csv"), "--out", str(tmp_path / "b"), "--column", "points=score"],
    )
    assert "--column points=...: unknown" in result.stderr


def test_a_table_with_missing_cells_trains(tmp_path):
    rows = ["prompt,model,score,category"]
    for number in range(40):
        kind = "law" if number % 2 else "food"
        rows.append(f"{kind} question {number},a,{int(kind == 'law')},{kind}")
        if number % 4 < 2:
            rows.append(f"{kind} question {number},b,{int(kind == 'food')},{kind}")
    assert _run(tmp_path, "a.csv", "\n".join(rows)).exit_code == 0
    router = CoERouter(encoder="hashing").fit(_table(tmp_path), split="all")
    assert router.models == ["a", "b"]
