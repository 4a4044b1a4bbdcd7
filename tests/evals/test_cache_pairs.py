"""The pairs that the semantic cache is judged on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import evals
from benchmarks.semantic_cache import split_of

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
