"""Retrieval on the small labelled set: embedders, routes, ways to search, follow-ups, the gate.

    python -m benchmarks.retrieval [--out docs/results/retrieval]

What was chosen was chosen by the questions of the split ``train``; those of ``test`` are judged on;
but looking up follow-ups in two wordings was chosen on the cases it is shown on.
Approximate searches are timed as well where faiss-cpu or usearch are installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.pages import GAIN, command_line, write
from evals.metrics import Estimate, auroc, bootstrap_mean, paired_difference
from evals.retrieval import (
    CUTOFF,
    FollowUp,
    Question,
    ndcg,
    read_follow_ups,
    read_questions,
    retrieval_table,
)
from experts.config import RetrieverExpertConfig
from experts.retrieval.expert import RetrieverExpert
from experts.retrieval.index import IndexedEncoder, IndexManifest, PassageIndex, build_index
from experts.retrieval.passages import Passage, read_documents
from experts.types import ChatRequest, collect
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
SHOWN = 4
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


def indexed(names: Sequence[str], folder: Path) -> PassageIndex:
    """An index of the documents with these encoders."""
    target = folder / "+".join(names)
    build_index(read_documents(DATA / "documents"), [get_encoder(n) for n in names], target)
    return PassageIndex.load(target, get_encoder)


class Searches:
    """Ways to rank the documents, each by a name. The set has one passage per document."""

    def __init__(self, passages: Sequence[Passage], folder: Path) -> None:
        self._passages = passages
        self._texts = [passage.full_text for passage in passages]
        self._folder = folder

    def dense(self, *names: str) -> Callable[[str], Ranking]:
        """The search of an index with these encoders."""
        index = indexed(names, self._folder)
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


def switches(questions: Sequence[Question]) -> list[FollowUp]:
    """Each test question after one of the same category about another document."""
    rng = random.Random(0)
    pairs = []
    for asked in questions:
        if asked.split == "test":
            others = [
                other.text
                for other in questions
                if other.category == asked.category and other.document != asked.document
            ]
            pairs.append(FollowUp(rng.choice(others), asked.text, asked.document))
    return pairs


def followed(cases: Mapping[str, Sequence[FollowUp]], folder: Path) -> list[Row]:
    """What a retriever finds for the second of two questions, by what it looks up."""
    rows: list[Row] = []
    for names in (["minilm-int8"], ["multilingual"], ["minilm-int8", "multilingual"]):
        index = indexed(names, folder)
        last, both = (_retriever(index, turns) for turns in (1, 2))
        for case, pairs in cases.items():
            ways = {
                "last turn": [_found(last, pair.text) for pair in pairs],
                # The newest first, as the expert joins them.
                "turns joined": [_found(last, f"{p.text}\n{p.earlier}") for p in pairs],
                "**both**": [_found(both, pair.earlier, pair.text) for pair in pairs],
            }
            scores = {way: _judged(found, pairs) for way, found in ways.items()}
            for way, (hit, worth) in scores.items():
                row: Row = {"name": _joined(names), "case": case, "way": way}
                for kind, values, best in zip(
                    ("hit", "ndcg"), (hit, worth), scores["**both**"], strict=True
                ):
                    gain = paired_difference(best, values)
                    row |= {f"{kind}_{k}": v for k, v in _named(bootstrap_mean(values)).items()}
                    row |= {f"{kind}_{k}": v for k, v in zip(GAIN, gain[:3], strict=True)}
                rows.append(row)
    return rows


def _retriever(index: PassageIndex, turns: int) -> RetrieverExpert:
    config = RetrieverExpertConfig(
        name="docs", engine="retriever", index="given", turns=turns, top_k=CUTOFF,
        max_context_tokens=100_000,
    )  # fmt: skip
    return RetrieverExpert(config, index, None)


def _found(retriever: RetrieverExpert, *turns: str) -> Ranking:
    messages = [{"role": "user", "content": text} for text in turns]
    request = ChatRequest.model_validate({"messages": messages})
    answer = asyncio.run(collect(retriever.stream(request, timeout_s=60)))
    return [source["path"] for source in answer.choices[0].sources or []]


def _judged(
    found: Sequence[Ranking], pairs: Sequence[FollowUp]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hit@4 and nDCG@10 of each."""
    both = list(zip(found, pairs, strict=True))
    hit = [float(pair.document in ranking[:SHOWN]) for ranking, pair in both]
    return np.array(hit), np.array([ndcg(ranking, pair.document) for ranking, pair in both])


def _joined(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def gate(questions: Sequence[Question], folder: Path) -> list[Row]:
    """How well the best passage's score tells questions about the documents from others."""
    table = OutcomeTable.load("evals/data/embedded_table").with_prompts_of("validation")
    others = [t for t, c in zip(table.texts, table.categories or [], strict=True) if c == "general"]
    rows: list[Row] = []
    for names in (["minilm-int8"], ["multilingual"], ["minilm-int8", "multilingual"]):
        index = indexed(names, folder)

        def best(text: str, *before: str, index: PassageIndex = index) -> float:
            also = ["\n".join([text, *before])] if before else []
            return max(one.score for one in index.search(text, SHOWN, also=also))

        inside = np.array([best(question.text) for question in questions])
        outside = np.array([best(text) for text in others])
        after = np.array([best(t, q.text) for t, q in zip(others, cycle(questions), strict=False)])
        scores = np.concatenate([inside, outside])
        about = np.concatenate([np.ones(len(inside), bool), np.zeros(len(outside), bool)])
        threshold = float(np.quantile(inside, 0.05))
        rows.append(
            {
                "name": _joined(names),
                "inside": len(inside),
                "outside": len(outside),
                "auroc": float(auroc(scores, about)),
                "threshold": threshold,
                "let_through": float((outside >= threshold).mean()),
                "let_through_after": float((after >= threshold).mean()),
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
    follow_ups = read_follow_ups(DATA / "follow_ups.jsonl")
    encoders = {name: get_encoder(encoder) for name, encoder in EMBEDDERS.items()}
    documents = list(read_documents(DATA / "documents"))
    table = retrieval_table(documents, questions, encoders)
    counts: Row = {"documents": len(documents), "questions": len(questions)}
    counts |= {split: sum(q.split == split for q in questions) for split in ("train", "test")}
    cases = {"follow-ups": follow_ups, "switches": switches(questions)}
    counts |= {case: len(pairs) for case, pairs in cases.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "counts": [counts],
            "routed": routed(table),
            "searched": searched(questions, Path(folder)),
            "followed": followed(cases, Path(folder)),
            "gate": gate(questions, Path(folder)),
        }
    with threadpool_limits(1):
        found["timed"] = [row for size in SIZES for row in timed(size)]
    print(page(found))
    write(out, page(found), found)


def page(found: dict[str, list[Row]]) -> str:
    """The page in Markdown."""
    counts = found["counts"][0]
    return "\n".join([_intro(counts), *_routed(found["routed"]), *_searched(found["searched"]),
                      *_followed(found["followed"], counts), *_gate(found["gate"]),
                      *_timed(found["timed"])]) + "\n"  # fmt: skip


def _intro(counts: Row) -> str:
    return (
        f"# Retrieval\n\n`{command_line().strip()}`; {counts['documents']} documents, "
        f"{counts['questions']} questions ([the set](../../evals/data/retrieval/README.md)), "
        f"{counts['train']} of them `train`, {counts['test']} `test`; nDCG@10 with 95% intervals "
        "of the bootstrap. Both halves ask about the same documents.\n"
    )


def _interval(row: Row, prefix: str = "", keys: Sequence[str] = ("mean", "low", "high")) -> str:
    mean, low, high = (float(row[prefix + key]) for key in keys)
    sign = "+" if keys[0] == "gain" else ""
    return f"{mean:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


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


def _followed(rows: list[Row], counts: Row) -> list[str]:
    lines = [
        "## Follow-up questions\n",
        "What a retriever finds for the second of two questions of a user: by the last turn alone, "
        "by the two joined, and by both, as shipped with `turns: 2`, where each passage counts by "
        f"the better. {counts['follow-ups']} follow-ups are hardly understood alone, and the "
        "document of the question before answers them too; in "
        f"{counts['switches']} switches a test question comes after one of the same category about "
        "another document. Looking up both was chosen on these same cases.\n",
    ]
    for case in ("follow-ups", "switches"):
        lines += [
            f"| {case}: index | looked up | hit@{SHOWN} | both less this | nDCG@{CUTOFF} "
            "| both less this |",
            "|---|---|--:|--:|--:|--:|",
            *(
                f"| {row['name']} | {row['way']} | {_interval(row, 'hit_')} "
                f"| {_interval(row, 'hit_', GAIN)} | {_interval(row, 'ndcg_')} "
                f"| {_interval(row, 'ndcg_', GAIN)} |"
                for row in rows
                if row["case"] == case
            ),
            "",
        ]
    return lines


def _gate(rows: list[Row]) -> list[str]:
    return [
        "## The gate `min_score`\n",
        "Score of the best passage for all questions of the set, and for validation prompts of "
        "the category `general` of the embedded table. The threshold is the 5 % quantile of the "
        "former, so that it lets 95 % of them through. After a question: the others behind one "
        "about the documents, looked up as `turns: 2` does.\n",
        "| index | about the documents | others | AUROC | threshold | others let through | after a "
        "question |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {row['name']} | {row['inside']} | {row['outside']} | {row['auroc']:.3f} "
            f"| {row['threshold']:.2f} | {float(row['let_through']):.0%} "
            f"| {float(row['let_through_after']):.0%} |"
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
