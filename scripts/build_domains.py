#!/usr/bin/env python3
"""Writes evals/data/domains, which the domain classifier learns from, out of three data sets.

    scripts/build_domains.py DATA     DATA holds the folders mmlu_pro, nine_mixed and clinc150

Each folder has a parquet file of prompts with the columns ``split``, ``text`` and ``category`` (or
``intent``). Splits are kept: nothing of a test split is learnt. The result is an outcome table
whose models are the domains; a domain's score is 1 on its own prompts and 0 on others.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from routers.outcomes import OutcomeTable, Prompts

OUT = Path(__file__).parents[1] / "evals" / "data" / "domains"

# Prompts of each domain by split, dealt out evenly among its sources as far as those go.
AT_MOST = {"train": 300, "validation": 60, "test": 100}

# Left out: categories of a few rows (law, history, philosophy, other); ``gpqa``, whose authors ask
# not to show its questions; ``mmlu``, mostly passages of RACE, which is not free; ``commongen``,
# bare lists of words.
MMLU_PRO = {
    "math": "mathematics",
    "computer science": "code",
    "physics": "physics",
    "chemistry": "chemistry",
    "biology": "biology",
    "health": "biology",
    "engineering": "engineering",
    "business": "business",
    "economics": "business",
    "psychology": "psychology",
}
NINE_MIXED = {
    "math": "mathematics",
    "gsm8k": "mathematics",
    "agentverse-mgsm": "mathematics",
    "human_eval": "code",
    "mbpp": "code",
    "arc_challenge": "science",
    "openbook_qa": "science",
    "agentverse-logicgrid": "logic",
    "commonsense_qa": "commonsense",
    "natural_qa": "facts",
    "trivia_qa": "facts",
}
# All other intents are requests to an assistant; those out of scope ("oos") are left out.
CLINC150 = {
    "calculator": "mathematics",
    "translate": "language",
    "definition": "language",
    "spelling": "language",
}

# Where the answers to choose from begin.
FIRST_OPTION = "\n(A) "


def rows(data: Path) -> Iterator[tuple[str, str, str, str]]:
    """Domain, source, split and text of every usable row."""
    for row in pq.read_table(data / "mmlu_pro" / "prompts.parquet").to_pylist():
        if domain := MMLU_PRO.get(row["category"]):
            # Half without options, so that these are no sign of a domain.
            question = row["text"].split(FIRST_OPTION)[0]
            kept = row["text"] if _draw(row["text"]) % 2 else question
            yield domain, "mmlu_pro", row["split"], kept
    for row in pq.read_table(data / "nine_mixed" / "prompts.parquet").to_pylist():
        if domain := NINE_MIXED.get(row["category"]):
            yield domain, row["category"], row["split"], row["text"]
    for row in pq.read_table(data / "clinc150" / "intents.parquet").to_pylist():
        if row["intent"] != "oos":
            yield CLINC150.get(row["intent"], "assistant"), "clinc150", row["split"], row["text"]


def _draw(text: str) -> int:
    """A number that looks random and is the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def chosen(data: Path) -> Iterator[tuple[str, str, str, str]]:
    """The rows of the table: no question twice, and so many of each domain and split."""
    seen: set[str] = set()
    groups: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # The test split first: a question that is in two splits is kept there, and learnt from nowhere.
    for domain, source, split, text in sorted(rows(data), key=lambda row: (row[2], _draw(row[3]))):
        key = " ".join(text.split(FIRST_OPTION)[0].lower().split())
        if key not in seen:
            seen.add(key)
            groups[domain, split][source].append(text)
    for split in AT_MOST:
        for domain in sorted({name for name, _ in groups}):
            sources = groups[domain, split]
            left = AT_MOST[split]
            for number, source in enumerate(sorted(sources, key=lambda s: (len(sources[s]), s))):
                share = left // (len(sources) - number)
                taken = sources[source][:share]
                left -= len(taken)
                for text in taken:
                    yield domain, source, split, text


def main() -> None:
    """Write the table and say what is in it."""
    found = list(chosen(Path(sys.argv[1])))
    domains = sorted({domain for domain, *_ in found})
    scores = np.array([[float(domain == name) for name in domains] for domain, *_ in found])
    counts: dict[tuple[str, str], int] = defaultdict(int)
    ids = []
    for _, source, split, _ in found:
        ids.append(f"{source}-{split}-{counts[source, split]}")
        counts[source, split] += 1
    prompts = Prompts(
        ids,
        [text for *_, text in found],
        [domain for domain, *_ in found],
        [split for _, _, split, _ in found],
    )
    OutcomeTable(prompts, models=domains, numbers={"score": scores}).write(OUT)
    for domain in domains:
        sizes = [sum(d == domain and s == split for d, _, s, _ in found) for split in AT_MOST]
        sources = sorted({source for d, source, *_ in found if d == domain})
        print(f"{domain:12}", *(f"{size:5}" for size in sizes), " ", ", ".join(sources))


if __name__ == "__main__":
    main()
