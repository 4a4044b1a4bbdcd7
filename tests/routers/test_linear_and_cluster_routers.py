"""What the battery does not see: incremental updates, ties, missing cells."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from routers.base import Query, RouterError
from routers.clusters import cluster
from routers.kmeans import KMeansRouter
from routers.knn import KNNRouter
from routers.nexus import NexusRouter
from routers.outcomes import OutcomeTable, Prompts
from routers.pilots import PilotsRouter, _votes
from routers.registry import load_router
from routers.ridge import RidgeRouter
from routers.testing import MODELS, example_table
from routers.tree import TreeRouter
from routers.uniroute import UniRouteRouter

QUERIES = [Query("bake bread onion soup"), Query("tenant court appeal"), Query("river city music")]


def _quality(router, models=MODELS):
    return router.predict(QUERIES, list(models)).quality


def _part(table, rows, *, models=MODELS):
    columns = [table.models.index(name) for name in models]
    return OutcomeTable(
        table.prompts.take(rows),
        models=models,
        numbers={"score": table.scores("all")[rows][:, columns]},
    )


def test_ridge_equals_scikit_learns():
    from sklearn.linear_model import Ridge

    table = example_table()
    router = RidgeRouter(encoder="hashing", penalty=3.0).fit(table)
    encoder = router._encoder()
    model = Ridge(alpha=3.0).fit(
        encoder.encode(table.with_prompts_of("train").texts).astype(float), table.scores("train")
    )
    wanted = model.predict(encoder.encode([query.text for query in QUERIES]).astype(float))
    assert _quality(router) == pytest.approx(wanted.clip(0, 1), abs=1e-5)


def test_ridge_adds_and_takes_away_rows_exactly():
    table = example_table()
    train, rest = table.rows("train"), table.rows("validation")
    whole = RidgeRouter(encoder="hashing").fit(_part(table, [*train, *rest]), split="all")
    router = RidgeRouter(encoder="hashing").fit(_part(table, train), split="all")
    first = _quality(router)
    more = table.prompts.take(rest).texts, table.scores("validation")
    router.partial_fit(*more)
    assert _quality(router) == pytest.approx(_quality(whole), abs=1e-5)
    router.partial_fit(*more, sign=-1)
    assert _quality(router) == pytest.approx(first, abs=1e-5)


def test_ridge_adds_and_removes_models_exactly():
    table = example_table()
    texts = table.with_prompts_of("train").texts
    router = RidgeRouter(encoder="hashing").fit(table.restricted_to(["cook", "generalist"]))
    router.add_model("lawyer", texts, table.scores("train")[:, 2])
    whole = RidgeRouter(encoder="hashing").fit(table)
    assert _quality(router) == pytest.approx(_quality(whole), abs=1e-6)
    router.remove_model("cook")
    assert router.models == ["generalist", "lawyer"]
    both = ["generalist", "lawyer"]
    assert _quality(router, both) == pytest.approx(_quality(whole, both), abs=1e-6)


def test_ridge_is_less_certain_of_what_it_has_not_seen():
    router = RidgeRouter(encoder="hashing").fit(example_table())
    seen, unseen = router.predict([QUERIES[0], Query("zebra quantum flux")], MODELS).explanations
    assert seen.detail["uncertainty"] < unseen.detail["uncertainty"]


def test_ridge_is_as_certain_as_the_rows_of_the_model_it_prefers():
    table = example_table(per_split=240)
    scores = table.scores("all")
    # The lawyer was only run on law, without success; the cook, on all prompts.
    law = np.array([category == "law" for category in table.prompts.categories or ()])
    scores[:, 2] = np.where(law, 0.0, np.nan)
    part = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    both, cook = (
        RidgeRouter(encoder="hashing").fit(t) for t in (part, part.restricted_to(["cook"]))
    )
    baking = Query("bake bread onion soup salt")
    [one] = both.predict([baking], MODELS).explanations
    [other] = cook.predict([baking], ["cook"]).explanations
    assert _quality(both)[0].argmax() == 0
    assert one.detail == other.detail


def test_ridge_refuses_what_does_not_fit():
    router = RidgeRouter(encoder="hashing").fit(example_table())
    with pytest.raises(RouterError, match="shape"):
        router.partial_fit(["one"], np.zeros((2, 3)))
    with pytest.raises(RouterError, match="already"):
        router.add_model("cook", ["one"], [1.0])
    with pytest.raises(RouterError, match="lie in"):
        router.add_model("new", ["one"], [np.nan])
    with pytest.raises(RouterError, match="cannot remove"):
        router.remove_model("nobody")


def test_centres_have_the_same_bits_on_any_number_of_cores():
    vectors = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = set()
    for cores in (1, 2, 4):
        with threadpool_limits(cores):
            found.add(cluster(vectors, 16, 0)[0].tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("make", [RidgeRouter, KNNRouter, KMeansRouter, UniRouteRouter])
def test_missing_cells_are_left_out_not_taken_for_failures(make):
    table = example_table(per_split=240)
    scores = table.scores("all")
    # The lawyer was only run where it is good.
    law = np.array([category == "law" for category in table.prompts.categories or ()])
    scores[~law, 2] = np.nan
    part = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    quality = _quality(make(encoder="hashing").fit(part))
    assert (quality[:, 2] > 0.6).all()


def test_the_earlier_of_equally_near_neighbours_count():
    prompts = Prompts([str(i) for i in range(40)], ["the same words"] * 40)
    scores = np.linspace(0, 1, 40)[:, None] * [1.0, -1.0] + [0.0, 1.0]
    table = OutcomeTable(prompts, models=["rising", "falling"], numbers={"score": scores})
    router = KNNRouter(encoder="hashing", k=10, shrinkage=0).fit(table, split="all")
    quality = router.predict([Query("the same words")], router.models).quality
    assert quality[0] == pytest.approx(scores[:10].mean(axis=0))


@pytest.mark.parametrize("make", [KMeansRouter, NexusRouter, UniRouteRouter])
def test_a_new_model_needs_no_retraining(make):
    table = example_table(per_split=240)
    texts = table.with_prompts_of("validation").texts
    router = make(encoder="hashing", n_clusters=6).fit(table.restricted_to(["cook", "generalist"]))
    before = _quality(router, ["cook", "generalist"])
    router.add_model("lawyer", texts, table.scores("validation")[:, 2])
    assert _quality(router, ["cook", "generalist"]).tobytes() == before.tobytes()
    assert _quality(router).argmax(axis=1)[1] == 2
    with pytest.raises(RouterError, match="already"):
        router.add_model("lawyer", texts, table.scores("validation")[:, 2])


@pytest.mark.parametrize("make", [KMeansRouter, UniRouteRouter])
def test_a_new_model_is_expected_to_be_like_those_it_resembles(make):
    table = example_table(per_split=240)
    prompts, scores = table.with_prompts_of("validation"), table.scores("validation")
    some = [row for row, name in enumerate(prompts.categories or ()) if name != "law"]
    router = make(encoder="hashing", n_clusters=12).fit(table)
    router.add_model("cook's twin", prompts.take(some).texts, scores[some, 0])
    quality = _quality(router, ["cook", "lawyer", "cook's twin"])
    # It was never asked about law, where the cook, whom it resembles elsewhere, fails.
    assert quality[1, 2] < scores[some, 0].mean() - 0.1


@pytest.mark.parametrize("make", [KMeansRouter, NexusRouter, UniRouteRouter])
def test_a_removed_model_leaves_the_others_as_they_were(make, tmp_path):
    router = make(encoder="hashing", n_clusters=6).fit(example_table())
    before = _quality(router)
    router.remove_model("generalist").save(tmp_path / "two")
    assert router.models == ["cook", "lawyer"]
    two = load_router(tmp_path / "two")
    assert _quality(two, two.models).tobytes() == before[:, [0, 2]].tobytes()
    with pytest.raises(RouterError, match="cannot remove 'generalist' from 'cook', 'lawyer'"):
        router.remove_model("generalist")


def test_ties_share_their_vote_and_ties_of_all_say_nothing():
    nan = np.nan
    scores = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.2, nan, 0.1], [nan, 0.0, 0.0]])
    assert _votes(scores).tolist() == [[0.5, 0.5, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert _votes(np.full((1, 3), nan)).tolist() == [[0, 0, 0]]


def test_pilots_lie_where_their_model_won():
    table = example_table()
    winner = {"cooking": 0, "general": 1, "law": 2}
    scores = np.zeros((len(table.prompts), 3))
    for row, category in enumerate(table.prompts.categories or ()):
        scores[row, winner[category]] = 1.0
    clear = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    router = PilotsRouter(encoder="hashing").fit(clear)
    assert router.winners_.tolist() == [0, 1, 2]
    assert _quality(router).argmax(axis=1).tolist() == [0, 2, 1]


def test_pilots_without_any_vote_predict_by_means():
    prompts = Prompts(["a", "b"], ["one", "two"])
    table = OutcomeTable(prompts, models=["x", "y"], numbers={"score": np.ones((2, 2))})
    router = PilotsRouter(encoder="hashing").fit(table, split="all")
    assert router.predict(QUERIES, ["x", "y"]).quality.shape == (3, 2)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (partial(RidgeRouter, encoder="hashing"), "groups", 7),
        (partial(PilotsRouter, encoder="hashing"), "groups", -1),
        (partial(TreeRouter, min_prompts=20), "lefts", 0),
        (partial(TreeRouter, min_prompts=20), "features", 10_000),
    ],
)
def test_arrays_that_would_lead_astray_are_refused(tmp_path, make, name, value):
    router = make().fit(example_table(per_split=240))
    array = getattr(router, f"{name}_")
    array[0] = value
    router.save(tmp_path / "bad")
    with pytest.raises(RouterError, match="artefact of"):
        load_router(tmp_path / "bad")


def test_one_prompt_is_enough_for_a_tree():
    table = OutcomeTable(
        Prompts(["a"], ["one"]), models=["x", "y"], numbers={"score": np.array([[0.0, 1.0]])}
    )
    router = TreeRouter(shrinkage=0).fit(table, split="all")
    assert _quality(router, ["x", "y"]).tolist() == [[0.0, 1.0]] * 3


def test_tree_prints_its_rules():
    texts = [f"def f{n}(): return {n}" if n % 2 else f"tell me about {n}" for n in range(400)]
    code = np.arange(400) % 2 == 1
    table = OutcomeTable(
        Prompts([str(n) for n in range(400)], texts),
        models=["coder", "talker"],
        numbers={"score": np.stack([code, ~code], axis=1).astype(float)},
    )
    router = TreeRouter().fit(table, split="all")
    assert router.metrics_["leaves"] == 2
    assert len(router.rules()) == 4
    assert router.rules()[0].startswith("if ")
    best = router.predict([Query(text) for text in texts[:2]], ["coder", "talker"]).quality
    assert best.argmax(axis=1).tolist() == [1, 0]
    [explanation] = router.predict([Query(texts[0])], ["coder"]).explanations
    assert explanation.detail["rule"] in router.rules()[0] + router.rules()[2]
