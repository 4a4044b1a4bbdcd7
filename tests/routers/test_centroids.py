"""Models known by the mean vector of their own texts: the rule by hand; models come and go."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.strategies.several import shares_by_quality
from routers.base import Query, RouterError
from routers.centroids import CentroidsRouter
from routers.encoders import get_encoder
from routers.outcomes import OutcomeTable, Prompts
from routers.registry import load_router

TEXTS = {
    "cook": ["bake bread", "onion soup", "salt and butter"],
    "lawyer": ["court and judge", "tenant appeal"],
    "general": ["hello weather"],
}
QUERIES = [Query("bake an onion"), Query("appeal to the court"), Query("river city music")]


class Compass:
    """Texts are angles in degrees, so cosines are known."""

    name, revision, width = "compass", "1", 2

    def encode(self, texts) -> np.ndarray:
        """Return shape (n_texts, 2)."""
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _table(*domains: str, texts: dict[str, list[str]] = TEXTS) -> OutcomeTable:
    """The texts of some domains, each scored by a base and by the domains' models."""
    rows = [(text, domain) for domain in domains for text in texts[domain]]
    models = ["base", *(domain for domain in domains if domain != "general")]
    prompts = Prompts(
        [str(n) for n in range(len(rows))], [text for text, _ in rows], [own for _, own in rows]
    )
    return OutcomeTable(
        prompts, models=models, numbers={"score": np.full((len(rows), len(models)), 0.5)}
    )


def _fitted(*domains: str, **options) -> CentroidsRouter:
    return CentroidsRouter(encoder="hashing", **options).fit(_table(*domains), split="all")


def test_log_odds_are_ttmms_exponents_and_a_base_is_the_threshold():
    router = _fitted("cook", "lawyer", "general", beta=0.5, threshold=0.4)
    encode = get_encoder("hashing").encode
    quality = router.predict(QUERIES[:1], ["base", "cook", "lawyer"]).quality[0].astype(float)
    means = {name: encode(texts).astype(float).mean(0) for name, texts in TEXTS.items()}
    centre = np.mean(list(means.values()), axis=0)
    query = encode([QUERIES[0].text])[0] - centre
    cosines = [
        float((mean - centre) @ query / np.linalg.norm(mean - centre) / np.linalg.norm(query))
        for name, mean in means.items() if name != "general"
    ]  # fmt: skip
    odds = quality / (1 - quality)
    assert quality[0] == pytest.approx(0.5)
    assert odds[1:] / odds[1:].sum() == pytest.approx(
        [math.exp(-(1 - cos) / 0.25) for cos in cosines]
        / np.sum([math.exp(-(1 - cos) / 0.25) for cos in cosines]),
        rel=1e-4,
    )
    assert (quality[1:] > 0.5).tolist() == [cos > 0.4 for cos in cosines]


def _compass(threshold: float, **angles: list[int]) -> CentroidsRouter:
    """Of domains whose means have the same length and lie evenly around, so their mean is 0."""
    texts = {name: [str(angle) for angle in found] for name, found in angles.items()}
    router = CentroidsRouter(encoder=Compass(), threshold=threshold)
    return router.fit(_table(*texts, texts=texts), split="all")


def _chosen(router: CentroidsRouter, angle: int, *names: str) -> str:
    return names[int(router.predict([Query(str(angle))], list(names)).quality[0].argmax())]


def test_shares_of_near_models_are_ttmms_as_well():
    """Where both are so near that their qualities alone would round to 1."""
    router = _compass(-1.0, east=[20], west=[-20], general=[180])
    names = ["base", "east", "west"]
    quality = router.predict([Query("5")], names).quality[0]
    centre = Compass().encode(["20", "-20", "180"]).mean(axis=0)
    query = Compass().encode(["5"])[0] - centre
    cosines = [
        float(query @ (text - centre) / np.linalg.norm(query) / np.linalg.norm(text - centre))
        for text in Compass().encode(["20", "-20"])
    ]
    weights = [math.exp(-(1 - cos) / 0.04) for cos in cosines]
    found = shares_by_quality([float(one) for one in quality[1:]])
    assert found == pytest.approx([one / sum(weights) for one in weights], rel=1e-3)


def test_what_is_nearer_to_texts_that_are_no_models_goes_to_the_base():
    router = _compass(0.1, east=[0], west=[120], general=[240])
    assert _chosen(router, 305, "base", "east", "west") == "east"
    assert _chosen(router, 295, "base", "east", "west") == "base"


def test_a_model_that_joins_or_leaves_gives_what_a_rebuild_does():
    whole = _fitted("cook", "lawyer", "general")
    grown = _fitted("cook", "general")
    grown.add_model("lawyer", TEXTS["lawyer"], [0.9, 0.7])
    names = ["base", "cook", "lawyer"]
    expected = whole.predict(QUERIES, names).quality
    assert np.array_equal(grown.predict(QUERIES, names).quality, expected)
    whole.remove_model("lawyer")
    expected = _fitted("cook", "general").predict(QUERIES, names[:2]).quality
    assert np.array_equal(whole.predict(QUERIES, names[:2]).quality, expected)


def test_an_artefact_predicts_the_same(tmp_path):
    router = _fitted("cook", "lawyer")
    router.save(tmp_path / "centroids")
    loaded = load_router(tmp_path / "centroids")
    names = ["cook", "base", "lawyer"]
    found = loaded.predict(QUERIES, names).quality
    assert np.array_equal(found, router.predict(QUERIES, names).quality)


def test_without_categories_nothing_says_what_models_are_for():
    table = _table("cook", "lawyer")
    bare = OutcomeTable(
        Prompts(table.prompts.ids, table.prompts.texts),
        models=table.models, numbers={"score": table.scores("all")},
    )  # fmt: skip
    with pytest.raises(RouterError, match="needs a table with the column 'category'"):
        CentroidsRouter(encoder="hashing").fit(bare, split="all")
