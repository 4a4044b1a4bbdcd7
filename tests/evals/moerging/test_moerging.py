"""Methods compared on a library of two tiny adapters: what is chosen, measured, kept and shown."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("peft")

from evals.metrics import Resamples
from evals.moerging.build import build_library
from evals.moerging.cli import library_command
from evals.moerging.measure import Measured, measure, summarise, with_exit
from evals.moerging.methods import ENCODER, METHODS, methods
from evals.moerging.setting import BASE_NAME, Question, Setting, read_questions
from evals.moerging.table import library_table
from evals.moerging.taxonomy import AXES
from experts.adapter_files import fuse, read_updates, weights_hash, write_updates
from experts.errors import ExpertConfigError
from experts.finetune import AdapterTrainingConfig, TrainingManifest, train_adapter
from experts.finetune_data import TokenPair
from experts.library.examiner import Examiner
from experts.library.manifest import Library, LibraryExpert
from routers.base import Query
from routers.outcomes import OutcomeTable, Prompts
from routers.ridge import RidgeRouter

QUESTIONS = [
    Question("Name two colours.", "the quick brown fox", "one"),
    Question("hello world", "lazy dog", "one"),
    Question("Count from one to four.", "one two three four", "two"),
    Question("one hundred", "user", "two"),
    Question("the lazy dog", "hello", "elsewhere"),
]


@pytest.fixture(scope="module")
def library(home: Path) -> Library:
    library = Library.at(home / "compared")
    for name in ("one", "two"):
        file = home / f"{name}_samples.jsonl"
        rows = [q for q in QUESTIONS if q.domain == name] * 4
        lines = [{"prompt": f"{q.prompt} {n}", "answer": q.answer} for n, q in enumerate(rows)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        library.experts[name] = LibraryExpert(
            name=name, base=str(home / "base"), path=str(home / name), samples=str(file)
        )
    library.save()
    return library


@pytest.fixture(scope="module")
def setting(library: Library, home: Path) -> Setting:
    return Setting(library, str(home / "base"), QUESTIONS, {})


def _hosted(setting: Setting) -> tuple[Examiner, list[TokenPair]]:
    hosted = setting.host()
    return hosted, hosted.read([question.pair for question in setting.questions])


def _losses(setting: Setting, name: str) -> list[float]:
    return measure(setting, METHODS[name], 0).losses


def test_every_method_has_its_place_on_every_axis():
    assert len(AXES) == 9
    places = {name: method.taxonomy for name, method in METHODS.items() if method.taxonomy}
    assert METHODS.keys() - places.keys() == {"base", "oracle adapter"}
    assert places["Arrow"].depth == "module"
    assert places["LoraHub"].user_data == "few-shot"


def test_base_and_oracle_are_what_base_and_adapters_make_of_the_questions(setting):
    hosted, pairs = _hosted(setting)
    alone = hosted.losses(pairs, None)
    np.testing.assert_allclose(_losses(setting, "base"), alone, rtol=0.02)
    own = _losses(setting, "oracle adapter")
    for place, question in enumerate(QUESTIONS):
        reader = None if question.domain == "elsewhere" else question.domain
        expected = hosted.losses(pairs[place : place + 1], reader)
        assert own[place] == pytest.approx(float(expected[0]), rel=0.02)


def test_methods_are_those_that_the_setting_has_what_it_takes_for(setting):
    there = [method.name for method in methods(setting, None)]
    assert there == ["base", "oracle adapter", "uniform merge", "Arrow", "SpectR"]
    with pytest.raises(ExpertConfigError, match="'pilots' needs table"):
        methods(setting, ["pilots"])
    with pytest.raises(ExpertConfigError, match="'PHATGOOSE' needs gates/phatgoose"):
        methods(setting, ["PHATGOOSE"])
    with pytest.raises(ExpertConfigError, match="unknown method 'x'; known: 'base'"):
        methods(setting, ["x"])


def test_a_table_has_the_likelihood_of_each_sample_by_each_adapter(setting):
    samples = {"one": [q.pair for q in QUESTIONS[:2]], "general": [QUESTIONS[4].pair]}
    hosted, pairs = _hosted(setting)
    table = library_table(hosted, ["one", "two"], samples, progress=lambda _: None)
    assert table.models == [BASE_NAME, "one", "two"]
    assert table.prompts.categories == ["one", "one", "general"]
    tokens = len(pairs[4].answer_ids)
    expected = np.exp(-hosted.losses(pairs[4:], "two") / tokens)
    assert table.scores("train")[2, 2] == pytest.approx(float(expected[0]), rel=1e-3)


@pytest.fixture(scope="module")
def routed(setting: Setting) -> Setting:
    """With a table in which each adapter is best on its own domain, and the base is called so."""
    texts = {
        "one": ["Name two colours.", "Name three colours.", "Name a colour.", "hello world"],
        "two": ["Count from one to four.", "Count to six.", "Count from two on.", "one hundred"],
        "general": ["Where is Paris?", "Who wrote Hamlet?", "When was the war?"],
    }
    rows = [(text, domain) for domain, found in texts.items() for text in found]
    prompts = Prompts(
        [str(n) for n in range(len(rows))], [t for t, _ in rows], [d for _, d in rows]
    )
    models = ["smol", "one", "two"]
    scores = np.array([[0.3, 0.9 if d == "one" else 0.1, 0.9 if d == "two" else 0.1]
                       for _, d in rows])  # fmt: skip
    table = OutcomeTable(prompts, models=models, numbers={"score": scores})
    examples = {name: [q for q in QUESTIONS if q.domain == name] for name in ("one", "two")}
    return replace(setting, table=table, examples=examples)


@pytest.mark.parametrize(
    ("method", "place", "expected"),
    [
        ("LoraRetriever selection", 0, [{"one": 1.0}]),
        ("LoraRetriever selection", 2, [{"two": 1.0}]),
        ("LoraRetriever selection", 4, []),
        ("pilots", 0, [{"one": 1.0}]),
        ("ridge", 2, [{"two": 1.0}]),
        ("LoraRetriever mixture", 2, [{"two": 0.5}, {"one": 0.5}]),
        ("LoraRetriever fusion", 2, [{"one": 0.5, "two": 0.5}]),
        ("AdapterSoup", 0, [{"one": 0.5, "two": 0.5}]),
        ("TTMM", 0, [{"one": 1.0}]),
    ],
)
def test_routers_of_the_table_choose_the_adapters(routed, method, place, expected):
    """Each entry is an adapter that is used, made of those in it; its share if it is one."""
    use = METHODS[method].prepare(routed, 0).choose(place)
    found = [
        dict(adapter) if len(adapter) > 1 else {adapter[0][0]: share}
        for adapter, share in use.shares
    ]
    assert found == [pytest.approx(one, abs=0.02) for one in expected]


def test_smear_fuses_all_by_the_softmax_of_a_regression(routed):
    (adapter, share), = METHODS["SMEAR-style"].prepare(routed, 0).choose(2).shares  # fmt: skip
    weights = dict(adapter)
    quality = RidgeRouter(encoder=ENCODER).fit(routed.table).predict(
        [Query(QUESTIONS[2].prompt)], ["one", "two"]
    ).quality[0].astype(float)  # fmt: skip
    odds = quality / (1 - quality)
    assert share == 1.0
    assert weights == pytest.approx(
        dict(zip(("one", "two"), odds / odds.sum(), strict=True)), rel=1e-3
    )


def test_a_table_of_other_adapters_is_refused(routed):
    few = OutcomeTable(
        routed.table.prompts, models=["smol", "one"],
        numbers={"score": routed.table.scores("all")[:, :2]},
    )  # fmt: skip
    with pytest.raises(ExpertConfigError, match="has 'smol', 'one', which are not the base"):
        METHODS["ridge"].prepare(replace(routed, table=few), 0).choose(0)


def test_gains_are_shares_of_the_oracles():
    def made(losses: list[float], exact: list[int]) -> Measured:
        return Measured("m", 0, losses, [2, 2], exact, 0.0, 1.0, 1.0)

    base, oracle = made([4.0, 8.0], [0, 0]), made([2.0, 2.0], [1, 1])
    found = summarise(
        [made([3.0, 4.0], [0, 1]), made([3.0, 2.0], [1, 1])], base, oracle, np.arange(2),
        Resamples(2),
    )  # fmt: skip
    # Losses of 3 and 3 on average, over two tokens each, where the base has 6 and the oracle 2.
    assert found.loss.mean == pytest.approx(1.5)
    assert found.loss_less_base.mean == pytest.approx(-1.5)
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(0.75)
    # Of the first question half of the oracle's gain, of the second five sixths.
    assert (found.gain.low, found.gain.high) == pytest.approx((1 / 2, 5 / 6))
    assert found.exact.mean == pytest.approx(0.75)


def test_with_an_exit_the_base_answers_what_is_left_to_it():
    made = Measured("m", 0, [1.0, 2.0], [2, 2], [1, 0], 0.0, 1.0, 1.0)
    base = Measured("base", 0, [5.0, 6.0], [2, 2], [0, 1], 0.0, 1.0, 1.0)
    left = with_exit(made, base, [False, True])
    assert (left.losses, left.exact) == ([1.0, 6.0], [1, 1])


def test_commands_measure_once_and_show_all(library, home, tmp_path):
    def run(*command: str) -> str:
        result = CliRunner().invoke(library_command, [*command, "--library", str(library.folder)])
        assert result.exit_code == 0, result.output
        return result.output

    def write(file: Path, questions: list[Question]) -> str:
        rows = [{"prompt": q.prompt, "answer": q.answer, "domain": q.domain} for q in questions]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    general = write(tmp_path / "general.jsonl", QUESTIONS[4:])
    assert "9 prompts, 3 models" in run("table", "--general", general, "--limit", "4",
                                        "--out", str(tmp_path / "table"))  # fmt: skip
    run("merge", "--method", "ties", "--out", str(tmp_path / "ties"))
    assert read_updates(tmp_path / "ties")
    command = [
        "evaluate", "--questions", write(tmp_path / "q.jsonl", QUESTIONS),
        "--examples", write(tmp_path / "examples.jsonl", QUESTIONS),
        "--table", str(tmp_path / "table"), "--reference", f"ties={tmp_path / 'ties'}",
        "--out", str(tmp_path / "page"), "--seeds", "2",
    ]  # fmt: skip
    chosen = [
        "base", "oracle adapter", "TIES", "kNN", "LoraRetriever fusion", "TTMM", "AdapterSoup",
        "LoraHub",
    ]  # fmt: skip
    text = run(*command, *(part for name in chosen[:5] for part in ("--method", name)))
    assert "| LoraRetriever fusion |" in text
    assert re.search(r"leaves \d of 4 questions in domain to the base, and \d of 1 others", text)
    journal = tmp_path / "page_answers.jsonl"
    first = journal.read_text()
    text = run(*command, *(part for name in chosen for part in ("--method", name)))
    assert journal.read_text().startswith(first)
    assert [json.loads(line)["method"] for line in journal.read_text().splitlines()] == [
        *chosen, "LoraHub",
    ]  # fmt: skip
    lines = json.loads((tmp_path / "page.json").read_text())
    assert {line["method"] for line in lines} == set(chosen)
    oracle = next(line for line in lines if line["method"] == "oracle adapter")
    assert oracle["in_domain"]["gain"]["mean"] == pytest.approx(1)
    assert oracle["out_of_domain"]["loss_less_base"]["mean"] == pytest.approx(0)
    assert oracle["in_domain"]["with_exit"]["gain"]["mean"] <= 1
    assert (tmp_path / "page.svg").read_text().startswith("<svg")
    assert "| LoraHub | standard | private | target | task |" in text

    # What was measured of other questions, or of what was made anew, is not taken for these.
    before = len(journal.read_text().splitlines())
    few = write(tmp_path / "q.jsonl", QUESTIONS[:4])
    assert few in command
    names = ["base", "TIES"]
    run(*command, *(part for name in names for part in ("--method", name)))
    assert len(journal.read_text().splitlines()) == before + 2
    assert {line["method"] for line in json.loads((tmp_path / "page.json").read_text())} == {*names}
    run("merge", "--method", "linear", "--out", str(tmp_path / "ties"))
    run(*command, *(part for name in names for part in ("--method", name)))
    assert len(journal.read_text().splitlines()) == before + 3
    config = tmp_path / "ties" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 4'))
    run(*command, *(part for name in names for part in ("--method", name)))
    assert len(journal.read_text().splitlines()) == before + 4


def test_references_are_adapters_mixtures_and_checkpoints(library, home, tmp_path):
    def run(*command: str) -> None:
        result = CliRunner().invoke(library_command, command)
        assert result.exit_code == 0, result.output

    data = tmp_path / "all.jsonl"
    rows = [{"prompt": q.prompt, "answer": q.answer} for q in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["steps=2", "rank=2", "target_modules=[q_proj]"]
    run(
        "mixture", "--data", str(data), "--base", str(home / "base"), "--experts", "3",
        "--out", str(tmp_path / "moe"), *(part for one in settings for part in ("--set", one)),
    )  # fmt: skip
    run("upcycle", "--library", str(library.folder), "--out", str(tmp_path / "upcycled"))
    references = {
        "multitask": [home / "one", home / "two"],
        "multitask-moe": [tmp_path / "moe"],
        "upcycled": [tmp_path / "upcycled"],
    }
    setting = Setting(library, str(home / "base"), QUESTIONS, {}, references=references)
    multitask = METHODS["multitask"]
    assert multitask.seeds(setting, 3) == range(2)
    assert multitask.needs == ("references/multitask",)
    one, two = (measure(setting, multitask, seed).losses for seed in range(2))
    assert one[:2] == _losses(setting, "oracle adapter")[:2]
    assert one != two
    alone = _losses(setting, "base")
    for name in ("multitask MoE", "DUME"):
        made = _losses(setting, name)
        assert made != alone
        assert np.isfinite(made).all()


def test_questions_that_are_none_are_named(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(ExpertConfigError, match=r'line 1 of .* must be an object with "prompt"'):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(ExpertConfigError, match="holds no questions"):
        read_questions(file)


def test_merged_updates_can_be_written_and_read(home, tmp_path):
    folders = {name: home / name for name in ("one", "two")}
    fused = fuse(folders, {"one": 0.5, "two": -1.0})
    write_updates(tmp_path / "fused", fused, str(home / "base"))
    found = read_updates(tmp_path / "fused")
    assert found.keys() == fused.keys()
    for path, update in found.items():
        np.testing.assert_allclose(update.up @ update.down, fused[path].up @ fused[path].down,
                                   atol=1e-6)  # fmt: skip


TOPICS = {"colour": ["red", "blue", "green", "black"], "sum": ["1+2", "3+4", "5+6", "7+8"]}


def _corpus(file: Path, topics: Mapping[str, Sequence[str]] = TOPICS) -> list[str]:
    """Write a corpus of some topics; its lines."""
    rows = [
        json.dumps({"prompt": f"Which {topic} is {one}?", "answer": topic})
        for topic, ones in topics.items()
        for one in ones
    ]
    file.write_text("".join(f"{row}\n" for row in rows))
    return rows


def _contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_corpus_becomes_an_adapter_per_cluster(home, tmp_path):
    rows = _corpus(tmp_path / "corpus.jsonl")
    command = [
        "build", "--library", str(tmp_path / "lib"), "--data", str(tmp_path / "corpus.jsonl"),
        "--cluster", "2", "--base", str(home / "base"), "--encoder", "characters",
        "--set", "steps=2", "--set", "rank=2", "--set", "precision=float32",
    ]  # fmt: skip
    wrong = CliRunner().invoke(library_command, [*command, "--set", "steps=no"])
    assert wrong.exit_code == 2
    assert "steps" in wrong.output
    few = CliRunner().invoke(library_command, [*command[:6], "9", *command[7:]])
    assert "has 8 pairs, fewer than 9 clusters" in few.output
    assert not (tmp_path / "lib").exists()
    made = CliRunner().invoke(library_command, command)
    assert made.exit_code == 0, made.output
    library = Library(tmp_path / "lib")
    assert [*library.experts] == ["cluster-0", "cluster-1"]
    taught = []
    for name, expert in library.experts.items():
        adapter = library.path(expert.path)
        assert read_updates(adapter)
        assert expert.provenance.sha256 == weights_hash(adapter)
        data = library.folder / "data" / f"{name}.jsonl"
        taught.append(data.read_text().splitlines())
        # It was trained on its cluster's pairs, and on all of them.
        record = json.loads((adapter / "training.json").read_text())
        assert record["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
        assert record["pairs"] == len(taught[-1])
        assert expert.samples is not None
        samples = library.path(expert.samples).read_text().splitlines()
        assert sorted(samples) == sorted(taught[-1])
    assert sorted(map(sorted, taught)) == sorted([sorted(rows[:4]), sorted(rows[4:])])


def test_a_library_of_another_corpus_stays_as_it_is(home, tmp_path):
    settings = {"base": str(home / "base"), "steps": 1, "rank": 2, "precision": "float32"}

    def build(corpus: str, folder: Path, n_clusters: int = 2) -> None:
        build_library(
            folder, tmp_path / corpus, n_clusters, settings, encoder="characters",
            progress=lambda line: None,
        )  # fmt: skip

    _corpus(tmp_path / "corpus.jsonl")
    _corpus(tmp_path / "other.jsonl", {**TOPICS, "sum": ["2*2", "3*3", "4*4", "5*5"]})
    build("corpus.jsonl", tmp_path / "lib")
    before = _contents(tmp_path / "lib")
    for corpus, n_clusters in (("other.jsonl", 2), ("corpus.jsonl", 3)):
        with pytest.raises(ExpertConfigError, match="has other pairs than this cluster of"):
            build(corpus, tmp_path / "lib", n_clusters)
        assert _contents(tmp_path / "lib") == before
    taken = Library.at(tmp_path / "taken")
    taken.put(LibraryExpert(name="cluster-1", base="some/base", path="elsewhere"))
    before = _contents(tmp_path / "taken")
    with pytest.raises(ExpertConfigError, match="has an expert 'cluster-1' already"):
        build("corpus.jsonl", tmp_path / "taken")
    assert _contents(tmp_path / "taken") == before


def test_an_interrupted_build_goes_on_where_it_was(home, tmp_path, monkeypatch):
    _corpus(tmp_path / "corpus.jsonl")
    settings = {
        "base": str(home / "base"), "steps": 3, "rank": 2, "precision": "float32",
        "checkpoint_every": 1,
    }  # fmt: skip
    trained: list[tuple[str, int]] = []
    stop_at: tuple[str, int] | None = None

    def train(config: AdapterTrainingConfig, out: Path) -> TrainingManifest:
        def note(step: int, loss: float) -> None:
            trained.append((out.name, step))
            if trained[-1] == stop_at:
                raise KeyboardInterrupt

        return train_adapter(config, out, on_step=note)

    def build(folder: Path) -> list[tuple[str, int]]:
        trained.clear()
        build_library(
            folder, tmp_path / "corpus.jsonl", 2, settings, encoder="characters",
            progress=lambda line: None,
        )  # fmt: skip
        return trained

    monkeypatch.setattr("evals.moerging.build.train_adapter", train)
    every = [(name, step) for name in ("cluster-0", "cluster-1") for step in (1, 2, 3)]
    assert build(tmp_path / "whole") == every
    stop_at = ("cluster-1", 2)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts")
    assert [*Library(tmp_path / "parts").experts] == ["cluster-0"]
    stop_at = None
    assert build(tmp_path / "parts") == [("cluster-1", 3)]
    assert build(tmp_path / "parts") == []
    whole, parts = (
        {name: one.provenance.sha256 for name, one in Library(tmp_path / made).experts.items()}
        for made in ("whole", "parts")
    )
    assert parts == whole
    # What is listed stays listed as it came, or 'library check' would compare with what lies there.
    (tmp_path / "parts/adapters/cluster-0/adapter_config.json").write_text("{}")
    assert build(tmp_path / "parts") == []
    kept = Library(tmp_path / "parts").experts["cluster-0"].provenance.sha256
    assert kept == whole["cluster-0"]
