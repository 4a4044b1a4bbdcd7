from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from routers.encoders import HashingEncoder, MiniLMEncoder, SentenceTransformerEncoder
from routers.encoders.base import BULK_TEXTS
from routers.encoders.vector_cache import STEP, VectorCache

TEXTS = [f"what is {i} times seven" for i in range(STEP + 20)]


class Counting:
    """Counts what it encodes."""

    def __init__(self, fail_at=None):
        self.texts = []
        self.fail_at = fail_at

    def __call__(self, text):
        if len(self.texts) == self.fail_at:
            raise KeyboardInterrupt
        self.texts.append(text)
        return np.random.default_rng(len(text)).normal(size=5).astype(np.float32)


def test_each_text_is_encoded_once_and_comes_back_bit_for_bit(tmp_path):
    first, second = Counting(), Counting()
    texts = [*TEXTS, TEXTS[0], "\ud800", "\ud801"]
    vectors = VectorCache("e", "1", tmp_path).encode(texts, 5, first)
    again = VectorCache("e", "1", tmp_path).encode([*texts[::-1], "new"], 5, second)
    assert len(first.texts) == len(set(texts))
    assert second.texts == ["new"]
    assert again[:-1].tobytes() == vectors[::-1].tobytes()
    assert vectors.shape == (len(texts), 5)


@pytest.mark.parametrize(("name", "revision"), [("e", "2"), ("other", "1"), ("/a/../e", "1")])
def test_other_encoders_have_their_own_vectors(tmp_path, name, revision):
    VectorCache("e", "1", tmp_path).encode(TEXTS[:3], 5, Counting())
    counting = Counting()
    VectorCache(name, revision, tmp_path).encode(TEXTS[:3], 5, counting)
    assert counting.texts == TEXTS[:3]
    assert {path.parent for path in tmp_path.rglob("*.sqlite")} == {tmp_path}


def test_an_interruption_loses_one_step_at_most(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        VectorCache("e", "1", tmp_path).encode(TEXTS, 5, Counting(fail_at=STEP + 5))
    counting = Counting()
    VectorCache("e", "1", tmp_path).encode(TEXTS, 5, counting)
    assert counting.texts == TEXTS[STEP:]


def test_no_text_is_written(tmp_path):
    cache = VectorCache("e", "1", tmp_path)
    cache.encode(["my secret question"], 5, Counting())
    assert b"secret" not in cache.path.read_bytes()


def test_a_damaged_file_or_folder_only_costs_time(tmp_path, caplog):
    damaged = VectorCache("e", "1", tmp_path)
    damaged.path.write_bytes(b"not a database at all" * 100)
    (tmp_path / "file").write_text("")
    nowhere = VectorCache("e", "1", tmp_path / "file" / "folder")
    for cache in (damaged, nowhere):
        with caplog.at_level(logging.WARNING, "collegium.routers"):
            assert cache.encode(TEXTS[:3], 5, Counting()).shape == (3, 5)
        assert str(cache.path) in caplog.text


def test_damage_within_the_file_only_costs_time(tmp_path, caplog):
    cache = VectorCache("e", "1", tmp_path)
    vectors = cache.encode(TEXTS, 5, Counting())
    content = cache.path.read_bytes()
    cache.path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with caplog.at_level(logging.WARNING, "collegium.routers"):
        assert cache.encode(TEXTS, 5, Counting()).tobytes() == vectors.tobytes()
    assert f"cannot read {cache.path}" in caplog.text


def test_processes_share_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from routers.encoders.vector_cache import VectorCache;"
        "encode = lambda text: np.full(5, len(text), np.float32);"
        "texts = [f'text {i}' * (i % 9 + 1) for i in range(3000)];"
        "made = VectorCache('e', '1', Path(sys.argv[1])).encode(texts, 5, encode);"
        "assert (made[:, 0] == [len(t) for t in texts]).all()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=".") for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]


def test_encoders_use_it_for_many_texts_only(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    encoder = MiniLMEncoder(layers=2, on_disk=True)
    monkeypatch.setattr(MiniLMEncoder, "revision", "r")
    monkeypatch.setattr(MiniLMEncoder, "_encode_one", lambda self, text: np.ones(384, np.float32))
    encoder.encode(TEXTS[: BULK_TEXTS - 1])
    assert not list(tmp_path.rglob("*.sqlite"))
    encoder.encode(TEXTS[:BULK_TEXTS])
    assert len(list(tmp_path.rglob("*.sqlite"))) == 1


def test_encoders_that_may_change_or_cost_nothing_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    hub = SentenceTransformerEncoder("some/model", on_disk=True)
    monkeypatch.setattr(SentenceTransformerEncoder, "width", 5)
    monkeypatch.setattr(SentenceTransformerEncoder, "_encode_one", lambda self, text: np.ones(5))
    for encoder in (hub, HashingEncoder()):
        encoder.encode(TEXTS[:BULK_TEXTS])
    assert not list(tmp_path.iterdir())
