"""The pairs that the semantic cache is judged on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import evals
from benchmarks.semantic_cache import EXACT, SHIPPED, WANTED, split_of
from orchestrator.memory.questions import difference
from orchestrator.memory.semantic import SemanticConfig

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
PAIRS = Path(evals.__file__).parent / "data" / "cache_pairs.jsonl"


def test_pairs_are_whole_and_split_by_their_base():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    assert len({(pair["base"], pair["other"]) for pair in pairs}) == len(pairs) >= 600
    for pair in pairs:
        assert pair["base"] != pair["other"]
        assert pair["split"] == split_of(pair["base"])
        assert pair["same"] == (pair["kind"] == "paraphrase")
    counts = Counter((pair["split"], pair["same"]) for pair in pairs)
    assert counts["test", True] == counts["test", False] > counts["tune", True]


def test_what_is_shipped_is_what_was_chosen_and_keeps_its_promise():
    found = json.loads((RESULTS / "semantic_cache.json").read_text(encoding="utf-8"))
    shipped = found["lines"][SHIPPED]
    assert shipped["threshold"] == SemanticConfig().threshold
    assert shipped["false_of_near_misses"]["mean"] <= WANTED
    assert shipped["hit"]["low"] > found["lines"][EXACT]["hit"]["high"]


def test_rules_do_on_tuning_pairs_what_the_page_says():
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    tuned = [pair for pair in pairs if pair["split"] == "tune"]
    alike = [pair for pair in tuned if difference(pair["other"], pair["base"]) is None]
    assert all(pair["same"] for pair in alike)
    assert len(alike) / sum(pair["same"] for pair in tuned) > 0.45
