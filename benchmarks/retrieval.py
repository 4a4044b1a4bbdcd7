"""Retrieval on the small labelled set: embedders, routes between them, ways to search, the gate.

    python -m benchmarks.retrieval [--out docs/results/retrieval]

What was chosen was chosen by the questions of the split ``train``; those of ``test`` are judged on.
Run it with OPENBLAS_NUM_THREADS=1. Approximate searches are timed as well where faiss-cpu or
usearch are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.pages import command_line, write
from evals.metrics import Estimate, auroc, bootstrap_mean, paired_difference
from evals.retrieval import Question, ndcg, read_questions, retrieval_table
from experts.retrieval.index import IndexedEncoder, IndexManifest, PassageIndex, build_index
from experts.retrieval.passages import Passage, read_documents
from routers.base import Query
from routers.baselines import category_table_choice
from routers.coe import CoERouter
from routers.encoders import get_encoder
from routers.outcomes import OutcomeTable
from routers.pilots import PilotsRouter

DATA = Path("evals/data/retrieval")
EMBEDDERS = {"english": "minilm-int8", "many": "multilingual", "words": "static",
             "spelling": "characters"}  # fmt: skip
# Found by five-fold cross-validation of the training questions.
LEAST_VOTES = 3.0
FUSED = 50
SIZES = (10_000, 100_000)
WIDTH = 384

Row = dict[str, float | str]
Ranking = list[str]


def line(name: str, scores: NDArray[np.float64], best: NDArray[np.float64]) -> Row:
    """Mean nDCG@10 and what it is above the best single embedder, with intervals."""
    mean, gain = bootstrap_mean(scores), paired_difference(scores, best)
    return {"name": name, **_named(mean), "gain": gain.mean, "gain_low": gain.low,
            "gain_high": gain.high}  # fmt: skip


def _named(found: Estimate) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def routed(table: OutcomeTable) -> list[Row]:
    """Each embedder alone, routers between them, and the bounds, on the test questions."""
    train, test = table.scores("train"), table.scores("test")
    best = test[:, int(train.mean(axis=0).argmax())]
    rows = [line(f"`{name}` alone", test[:, j], best) for j, name in enumerate(table.models)]
    rows.append(line("random", test.mean(axis=1), best))
    texts = [Query(text) for text in table.with_prompts_of("test").texts]
    for router in (PilotsRouter(least_votes=LEAST_VOTES), CoERouter()):
        router.fit(table)
        choice = router.predict(texts, table.models).quality.argmax(axis=1)
        rows.append(line(f"`{router.method}`", test[np.arange(len(test)), choice], best))
    known, asked = (table.with_prompts_of(s).categories or [] for s in ("train", "test"))
    choice = category_table_choice(train, known, asked)
    rows.append(line("category table", test[np.arange(len(test)), choice], best))
    rows.append(line("oracle", test.max(axis=1), best))
    return rows


class Searches:
    """Ways to rank the documents, each by a name. The set has one passage per document."""

    def __init__(self, passages: Sequence[Passage], folder: Path) -> None:
        self._passages = passages
        self._texts = [passage.full_text for passage in passages]
        self._folder = folder
        self._vectors = {name: get_encoder(name).encode(self._texts) for name in EMBEDDERS.values()}

    def dense(self, *names: str) -> Callable[[str], Ranking]:
        """The search of an index with these encoders."""
        target = self._folder / "+".join(names)
        build_index(read_documents(DATA / "documents"), [get_encoder(n) for n in names], target)
        index = PassageIndex.load(target, get_encoder)
        return lambda text: [one.passage.path for one in index.search(text, FUSED)]

    def lexical(self, tokenizer: str) -> Callable[[str], Ranking]:
        """BM25 of SQLite's FTS5."""
        database = sqlite3.connect(":memory:")
        database.execute(f"CREATE VIRTUAL TABLE t USING fts5(x, tokenize='{tokenizer}')")
        database.executemany("INSERT INTO t VALUES (?)", [(text,) for text in self._texts])

        def search(text: str) -> Ranking:
            words = re.findall(r"\w+", text.lower())
            if tokenizer == "trigram":
                plain = " ".join(text.lower().split())
                words = sorted({plain[at : at + 3] for at in range(len(plain) - 2)})
            wanted = " OR ".join('"' + word.replace('"', '""') + '"' for word in words)
            query = "SELECT rowid FROM t WHERE t MATCH ? ORDER BY bm25(t) LIMIT ?"
            found = database.execute(query, (wanted, FUSED))
            return [self._passages[row[0] - 1].path for row in found]

        return search

    @staticmethod
    def fused(*searches: Callable[[str], Ranking]) -> Callable[[str], Ranking]:
        """Reciprocal rank fusion.

        References:
            Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
            Learning Methods" (SIGIR 2009), with its constant 60.
        """

        def search(text: str) -> Ranking:
            worth: dict[str, float] = {}
            for one in searches:
                for rank, path in enumerate(one(text), start=1):
                    worth[path] = worth.get(path, 0.0) + 1 / (60 + rank)
            return sorted(worth, key=lambda path: -worth[path])

        return search


def searched(questions: Sequence[Question], folder: Path) -> list[Row]:
    """Ways to search, by both halves of the questions."""
    documents = list(read_documents(DATA / "documents"))
    passages = [Passage(path, 0, *_parts(text)) for path, text in documents]
    ways = Searches(passages, folder)
    english, many = ways.dense("minilm-int8"), ways.dense("multilingual")
    words, letters = ways.lexical("porter unicode61 remove_diacritics 2"), ways.lexical("trigram")
    named = {
        "`minilm-int8`": english,
        "`multilingual`": many,
        "BM25, words": words,
        "BM25, trigrams": letters,
        "`minilm-int8` and BM25 trigrams, rank fusion": ways.fused(english, letters),
        "`multilingual` and BM25 trigrams, rank fusion": ways.fused(many, letters),
        "both encoders, rank fusion": ways.fused(english, many),
        "both encoders and BM25 trigrams, rank fusion": ways.fused(english, many, letters),
        "**both encoders, best standardised cosine**": ways.dense("minilm-int8", "multilingual"),
    }
    rows: list[Row] = []
    best = {split: _scores(questions, split, many) for split in ("train", "test")}
    for name, search in named.items():
        row: Row = {"name": name}
        for split, other in best.items():
            found = line(name, _scores(questions, split, search), other)
            row |= {f"{split}_{key}": value for key, value in found.items() if key != "name"}
        rows.append(row)
    return rows


def _parts(text: str) -> tuple[str, str]:
    title, _, rest = text.partition("\n\n")
    return title.removeprefix("# "), rest.strip()


def _scores(
    questions: Sequence[Question], split: str, search: Callable[[str], Ranking]
) -> NDArray[np.float64]:
    return np.array([ndcg(search(q.text), q.document) for q in questions if q.split == split])


def gate(questions: Sequence[Question], folder: Path) -> list[Row]:
    """How well the best passage's score tells questions about the documents from others."""
    table = OutcomeTable.load("evals/data/embedded_table").with_prompts_of("validation")
    others = [t for t, c in zip(table.texts, table.categories or [], strict=True) if c == "general"]
    rows: list[Row] = []
    for names in (["minilm-int8"], ["multilingual"], ["minilm-int8", "multilingual"]):
        target = folder / "+".join(names)
        build_index(read_documents(DATA / "documents"), [get_encoder(n) for n in names], target)
        index = PassageIndex.load(target, get_encoder)

        def best(text: str, index: PassageIndex = index) -> float:
            return max(one.score for one in index.search(text, 4))

        inside = np.array([best(question.text) for question in questions])
        outside = np.array([best(text) for text in others])
        scores = np.concatenate([inside, outside])
        about = np.concatenate([np.ones(len(inside), bool), np.zeros(len(outside), bool)])
        threshold = float(np.quantile(inside, 0.05))
        rows.append(
            {
                "name": " and ".join(f"`{name}`" for name in names),
                "inside": len(inside),
                "outside": len(outside),
                "auroc": float(auroc(scores, about)),
                "threshold": threshold,
                "let_through": float((outside >= threshold).mean()),
            }
        )
    return rows


class _Given:
    """An encoder that gives the vector it was given, so that the search alone is timed."""

    name, revision, width = "given", "1", WIDTH
    vector: NDArray[np.float32]

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vector, for one text."""
        return self.vector[None]


def timed(size: int) -> list[Row]:
    """Milliseconds of a search among so many vectors in groups, as texts' are: ours and others'."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((500, WIDTH))
    vectors = _unit(centres[rng.integers(0, 500, size)] + 0.7 * rng.standard_normal((size, WIDTH)))
    queries = _unit(vectors[rng.integers(0, size, 100)] + 0.03 * rng.standard_normal((100, WIDTH)))
    given = _Given()
    manifest = IndexManifest(
        characters=1,
        encoders=[IndexedEncoder(name=given.name, revision=given.revision, width=WIDTH)],
        documents=[],
        passages_sha256="",
        vectors_sha256="",
    )
    passages = [Passage("a.md", number, "", "") for number in range(size)]
    index = PassageIndex(manifest, passages, {given.name: vectors}, [given])

    def exact(query: NDArray[np.float32]) -> list[int]:
        given.vector = query
        return [one.passage.number for one in index.search("", FUSED)]

    truth = [exact(query) for query in queries]
    rows = [_timed_row("exact, as here", size, exact, queries, truth, 0.0)]
    for name, make in LIBRARIES.items():
        with contextlib.suppress(ImportError):
            started = time.perf_counter()
            search = make(vectors)
            built = time.perf_counter() - started
            rows.append(_timed_row(name, size, search, queries, truth, built))
    return rows


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray((vectors / lengths).astype(np.float32))


def _timed_row(
    name: str,
    size: int,
    search: Callable[[NDArray[np.float32]], list[int]],
    queries: NDArray[np.float32],
    truth: Sequence[list[int]],
    built: float,
) -> Row:
    taken, hits = [], 0
    for query, wanted in zip(queries, truth, strict=True):
        started = time.perf_counter()
        found = search(query)
        taken.append(1000 * (time.perf_counter() - started))
        hits += len(set(found) & set(wanted))
    return {
        "name": name,
        "passages": size,
        "median_ms": float(np.median(taken)),
        "p95_ms": float(np.quantile(taken, 0.95)),
        "recall": hits / (len(queries) * FUSED),
        "build_s": built,
    }


def _faiss(vectors: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], list[int]]:
    faiss: Any = import_module("faiss")
    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(WIDTH, 16, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    index.hnsw.efSearch = 64
    return lambda query: list(index.search(query[None], FUSED)[1][0].tolist())


def _usearch(vectors: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], list[int]]:
    index: Any = import_module("usearch.index").Index(ndim=WIDTH, metric="ip")
    index.add(np.arange(len(vectors)), vectors, threads=1)
    return lambda query: list(index.search(query, FUSED).keys.tolist())


LIBRARIES = {"HNSW of faiss-cpu": _faiss, "HNSW of usearch": _usearch}


def main() -> None:
    """Measure everything and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    out = parser.parse_args().out
    questions = read_questions(DATA / "questions.jsonl")
    encoders = {name: get_encoder(encoder) for name, encoder in EMBEDDERS.items()}
    table = retrieval_table(read_documents(DATA / "documents"), questions, encoders)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "routed": routed(table),
            "searched": searched(questions, Path(folder)),
            "gate": gate(questions, Path(folder)),
            "timed": [row for size in SIZES for row in timed(size)],
        }
    print(page(found))
    write(out, page(found), found)


def page(found: dict[str, list[Row]]) -> str:
    """The page in Markdown."""
    return "\n".join([_intro(), *_routed(found["routed"]), *_searched(found["searched"]),
                      *_gate(found["gate"]), *_timed(found["timed"])]) + "\n"  # fmt: skip


def _intro() -> str:
    return (
        f"# Retrieval\n\n`{command_line().strip()}`; 64 documents, 177 questions "
        "([the set](../../evals/data/retrieval/README.md)), 85 of them `train`, 92 `test`; nDCG@10 "
        "with 95% intervals of the bootstrap. Both halves ask about the same documents.\n"
    )


def _interval(row: Row, prefix: str = "", keys: Sequence[str] = ("mean", "low", "high")) -> str:
    mean, low, high = (float(row[prefix + key]) for key in keys)
    sign = "+" if keys[0] == "gain" else ""
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


GAIN = ("gain", "gain_low", "gain_high")


def _routed(rows: list[Row]) -> list[str]:
    return [
        "## Embedders and routes between them\n",
        "Test questions. The best single embedder is the best one of the training questions.\n",
        "| | nDCG@10 | less best single |",
        "|---|--:|--:|",
        *(f"| {row['name']} | {_interval(row)} | {_interval(row, keys=GAIN)} |" for row in rows),
        "",
    ]


def _searched(rows: list[Row]) -> list[str]:
    return [
        "## Ways to search\n",
        "Rank fusion is reciprocal, with the constant 60.\n",
        "| | train | test | test, less `multilingual` |",
        "|---|--:|--:|--:|",
        *(
            f"| {row['name']} | {_interval(row, 'train_')} | {_interval(row, 'test_')} "
            f"| {_interval(row, 'test_', GAIN)} |"
            for row in rows
        ),
        "",
    ]


def _gate(rows: list[Row]) -> list[str]:
    return [
        "## The gate `min_score`\n",
        "Score of the best passage for all questions of the set, and for validation prompts of "
        "the category `general` of the embedded table. The threshold lets 95 % of the former "
        "through.\n",
        "| index | about the documents | others | AUROC | threshold | others let through |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row['name']} | {row['inside']} | {row['outside']} | {row['auroc']:.3f} "
            f"| {row['threshold']:.2f} | {float(row['let_through']):.0%} |"
            for row in rows
        ),
        "",
    ]


def _timed(rows: list[Row]) -> list[str]:
    return [
        "## Time of a search\n",
        "One thread, without encoding the question; the best 50 of so many vectors of 384 numbers, "
        "drawn at random around 500 centres. Recall is that of the exact search's 50.\n",
        "| | passages | median | 95 % | recall | built in |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row['name']} | {row['passages']:,} | {row['median_ms']:.1f} ms "
            f"| {row['p95_ms']:.1f} ms | {row['recall']:.3f} | {row['build_s']:.1f} s |"
            for row in rows
        ),
    ]


if __name__ == "__main__":
    main()
