"""Checks every trainable router must pass, to run on your own router too.

A check takes a function that makes an unfitted router. Use it with pytest::

    @pytest.mark.parametrize("check", router_checks(), ids=lambda check: check.__name__)
    def test_router(check, tmp_path):
        check(lambda: MyRouter(), tmp_path)

``example_table`` makes the small outcome table that the checks learn from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from routers.base import Prediction, Query, RouterError, TrainableRouter
from routers.outcomes import OutcomeTable, Prompts

__all__ = ["Check", "MakeRouter", "example_table", "router_checks"]

MakeRouter = Callable[[], TrainableRouter]
Check = Callable[[MakeRouter, Path], None]

WORDS = {
    "cooking": "bake bread onion soup oven salt butter recipe garlic simmer",
    "general": "hello weather river story music city friend travel colour time",
    "law": "contract court judge tenant appeal clause liability lawyer statute trial",
}
MODELS = ("cook", "generalist", "lawyer")
SKILL = {"cooking": (0.9, 0.5, 0.1), "general": (0.3, 0.8, 0.3), "law": (0.1, 0.5, 0.9)}


def example_table(*, seed: int = 0, per_split: int = 60) -> OutcomeTable:
    """A table of three categories and three models, each the best at one of them.

    Args:
        seed: Seed of texts and scores.
        per_split: Number of prompts in each of train, validation and test.
    """
    rng = random.Random(seed)
    ids, texts, categories, splits, scores = [], [], [], [], []
    for split in ("train", "validation", "test"):
        for number in range(per_split):
            category = list(WORDS)[number % len(WORDS)]
            ids.append(f"{split}-{number}")
            texts.append(" ".join(rng.choices(WORDS[category].split(), k=6)))
            categories.append(category)
            splits.append(split)
            scores.append([float(rng.random() < skill) for skill in SKILL[category]])
    return OutcomeTable(
        Prompts(ids, texts, categories, splits),
        models=MODELS,
        numbers={"score": np.array(scores)},
        cards={"cook": {"active_params_b": 1.0}, "lawyer": {"input_usd_per_mtok": 2.0}},
    )


def _queries(n: int = 24, seed: int = 5) -> list[Query]:
    rng = random.Random(seed)
    words = " ".join(WORDS.values()).split()
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(n - 3)]
    return [Query(text) for text in [*texts, "", "naïve 日本 \ud800", "x" * 30_000]]


def _fitted(make: MakeRouter, seed: int = 0) -> TrainableRouter:
    return make().fit(example_table(seed=seed))


def _same(one: Prediction, other: Prediction) -> bool:
    return (
        one.quality.tobytes() == other.quality.tobytes() and one.explanations == other.explanations
    )


def _refused(action: Callable[[], object]) -> str:
    try:
        action()
    except RouterError as error:
        return str(error)
    raise AssertionError("no RouterError was raised")


def check_shape_and_range(make: MakeRouter, folder: Path) -> None:
    """Quality is float32 in [0, 1], one row per query and one column per candidate."""
    router, queries = _fitted(make), _queries()
    prediction = router.predict(queries, list(MODELS))
    assert prediction.quality.shape == (len(queries), len(MODELS))
    assert prediction.quality.dtype == np.float32
    assert np.isfinite(prediction.quality).all()
    assert ((prediction.quality >= 0) & (prediction.quality <= 1)).all()
    assert len(prediction.explanations) == len(queries)
    for explanation in prediction.explanations:
        assert explanation.confidence is None or 0 <= explanation.confidence <= 1
    assert router.predict([], list(MODELS)).quality.shape == (0, len(MODELS))


def check_fit_returns_self(make: MakeRouter, folder: Path) -> None:
    """``fit`` returns the router itself, which then knows the table's models."""
    router = make()
    assert router.fit(example_table()) is router
    assert sorted(router.models) == sorted(MODELS)


def check_fit_forgets(make: MakeRouter, folder: Path) -> None:
    """Fitting again is like fitting a new router."""
    router = _fitted(make, seed=1)
    router.fit(example_table(seed=2))
    fresh = _fitted(make, seed=2)
    assert _same(router.predict(_queries(), MODELS), fresh.predict(_queries(), MODELS))


def check_not_fitted(make: MakeRouter, folder: Path) -> None:
    """Unfitted routers refuse to predict, to list models and to be saved."""
    assert "fitted" in _refused(lambda: make().predict(_queries(), MODELS))
    assert "fitted" in _refused(lambda: make().models)
    assert "fitted" in _refused(lambda: make().save(folder / "unfitted"))


def check_same_seed_same_result(make: MakeRouter, folder: Path) -> None:
    """Two fits with the same arguments predict the same."""
    first, second = _fitted(make), _fitted(make)
    assert _same(first.predict(_queries(), MODELS), second.predict(_queries(), MODELS))


def check_batch_equals_one_by_one(make: MakeRouter, folder: Path) -> None:
    """A batch, in any order, equals its queries one by one, bit for bit."""
    router, queries = _fitted(make), _queries()
    whole = router.predict(queries, MODELS)
    order = list(range(len(queries)))
    random.Random(3).shuffle(order)
    shuffled = router.predict([queries[i] for i in order], MODELS)
    for place, i in enumerate(order):
        alone = router.predict([queries[i]], MODELS)
        assert alone.quality[0].tobytes() == whole.quality[i].tobytes()
        assert alone.quality[0].tobytes() == shuffled.quality[place].tobytes()
        assert alone.explanations[0] == whole.explanations[i] == shuffled.explanations[place]


def check_candidates_may_be_any_subset(make: MakeRouter, folder: Path) -> None:
    """Permuting candidates permutes columns; leaving some out leaves their columns out."""
    router, queries = _fitted(make), _queries()
    whole = router.predict(queries, list(MODELS)).quality
    for columns in ([2, 0, 1], [1], [2, 1]):
        part = router.predict(queries, [MODELS[j] for j in columns]).quality
        assert part.tobytes() == np.ascontiguousarray(whole[:, columns]).tobytes()


def check_unknown_candidate(make: MakeRouter, folder: Path) -> None:
    """An unknown candidate is refused with the names of the known ones."""
    message = _refused(lambda: _fitted(make).predict(_queries(), ["cook", "plumber"]))
    assert "'plumber'" in message
    assert all(repr(model) in message for model in MODELS)
    assert "\n" not in message


def check_save_load_equal(make: MakeRouter, folder: Path) -> None:
    """A saved and loaded router predicts the same, and saving it again gives the same files."""
    from routers.artefact import read_manifest
    from routers.registry import ROUTERS

    router = _fitted(make)
    first, second = folder / "first", folder / "second"
    router.save(first)
    loaded = type(router).load(first)
    assert loaded.models == router.models
    assert _same(loaded.predict(_queries(), MODELS), router.predict(_queries(), MODELS))
    loaded.save(second)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["arrays.safetensors", "manifest.json"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    if router.method in ROUTERS:
        assert read_manifest(first).method == router.method


def check_unknown_split(make: MakeRouter, folder: Path) -> None:
    """A split that the table does not have is refused."""
    table = example_table()
    train = table.prompts.take(table.rows("train"))
    only_train = OutcomeTable(
        train, models=MODELS, numbers={"score": table.scores("train")}, cards={}
    )
    message = _refused(lambda: make().fit(only_train, split="test"))
    assert "'test'" in message
    assert "'train'" in message


def router_checks() -> Sequence[Check]:
    """All checks."""
    return [
        check_shape_and_range,
        check_fit_returns_self,
        check_fit_forgets,
        check_not_fitted,
        check_same_seed_same_result,
        check_batch_equals_one_by_one,
        check_candidates_may_be_any_subset,
        check_unknown_candidate,
        check_save_load_equal,
        check_unknown_split,
    ]
