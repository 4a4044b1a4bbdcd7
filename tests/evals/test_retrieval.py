from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from evals.retrieval import ndcg, read_follow_ups, read_questions, retrieval_table
from experts.paths import resolve_path
from experts.retrieval.index import build_index
from experts.retrieval.passages import read_documents
from orchestrator.cli import main
from routers.encoders import get_encoder
from routers.outcomes import OutcomeTable, TableError

DATA = resolve_path("package:evals/data/retrieval")


def test_ndcg_falls_with_the_rank_and_ends_at_the_cutoff():
    ranking = [f"d{n}" for n in range(12)]
    found = [ndcg(ranking, name) for name in ("d0", "d2", "d9", "d10")]
    assert found == pytest.approx([1.0, 0.5, 1 / np.log2(11), 0.0])


def test_shipped_questions_are_about_shipped_documents():
    paths = {path for path, _ in read_documents(DATA / "documents")}
    questions = read_questions(DATA / "questions.jsonl")
    assert {question.document for question in questions} == paths
    assert len(paths) == 64
    assert len({question.text for question in questions}) == len(questions) == 177
    assert {question.split for question in questions} == {"train", "test"}


def test_shipped_follow_ups_follow_shipped_questions():
    asked = {(q.text, q.document) for q in read_questions(DATA / "questions.jsonl")}
    follow_ups = read_follow_ups(DATA / "follow_ups.jsonl")
    assert {(f.earlier, f.document) for f in follow_ups} <= asked
    assert len({f.document for f in follow_ups}) == len(follow_ups) == 64


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"earlier": "a", "document": "x.md"}',
     '{"earlier": "a", "follow_up": " ", "document": "x.md"}'],
)  # fmt: skip
def test_wrong_follow_ups_say_where(tmp_path, line):
    file = tmp_path / "follow_ups.jsonl"
    file.write_text('{"earlier": "a", "follow_up": "b", "document": "x.md"}\n\n' + line)
    message = "line 3 of .* a JSON object with the texts 'earlier', 'follow_up' and 'document'"
    with pytest.raises(TableError, match=message):
        read_follow_ups(file)


def test_a_document_counts_by_its_best_passage(tmp_path):
    documents = [
        ("long.md", "# A\n\nnothing of it\n\n# B\n\ndogs bark"),
        ("tea.md", "dogs drink tea"),
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "b dogs bark", "document": "long.md"}\n')
    encoders = {"spelling": get_encoder("characters"), "words": get_encoder("hashing")}
    table = retrieval_table(documents, read_questions(file), encoders)
    assert table.scores("all").tolist() == [[1.0, 1.0]]
    assert (table.prompts.categories, table.prompts.splits) == (None, None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}"], "line 1 of .* a JSON object with the texts 'question' and 'document'"),
        (['{"question": 1, "document": "x.md"}'], "line 1 of "),
        (['{"question": "a", "document": "x.md"}', "[]"], "line 2 of "),
        (['{"question": "a", "document": "x.md", "split": "dev"}'], "'split' must be one of"),
        (
            ['{"question": "a", "document": "x.md", "category": "c"}',
             '{"question": "b", "document": "x.md"}'],
            "give 'category' in every line or in none",
        ),
        (['{"question": "a", "document": "y.md"}'], "no document 'y.md'"),
    ],
)  # fmt: skip
def test_wrong_questions_say_where(tmp_path, lines, message):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(TableError, match=message):
        retrieval_table([("x.md", "text")], read_questions(file), {"a": get_encoder("hashing")})


def test_command_writes_a_table_that_routers_learn_from(tmp_path):
    config = {
        "experts": [{"name": "a", "engine": "scripted"}],
        "embedders": {"one": {"encoder": "characters"}, "two": {"encoder": "hashing"}},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "table"
    command = ["collect-embedders", str(DATA / "documents"), str(DATA / "questions.jsonl"),
               "--config", str(tmp_path / "c.yaml"), "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert OutcomeTable.load(out).models == ["one", "two"]
    train = ["train", "pilots", "--table", str(out), "--out", str(tmp_path / "a"),
             "--set", "encoder=characters"]  # fmt: skip
    assert CliRunner().invoke(main, train).exit_code == 0
    assert "is not empty" in CliRunner().invoke(main, command).output


def test_collect_asks_a_retriever_together_with_its_reader(tmp_path):
    build_index([("a.md", "# Sums\n\nAdd them up.")], [get_encoder("hashing")], tmp_path / "i")
    rules = [{"match": "<passages>", "answer": "with"}, {"answer": "without"}]
    docs = {"name": "docs", "engine": "retriever", "index": "i", "reader": "plain"}
    config = {"experts": [docs, {"name": "plain", "engine": "scripted", "rules": rules}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["collect", "--config", str(tmp_path / "c.yaml"), "--tasks", "maths", "--limit", "2",
               "--split", "test", "--expert", "docs", "--out", str(tmp_path / "t")]  # fmt: skip
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "t" / "answers.jsonl").read_text().splitlines()
    assert {(a["model"], a["answer"]) for a in map(json.loads, lines)} == {("docs", "with")}
