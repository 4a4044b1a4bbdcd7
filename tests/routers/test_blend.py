"""The blend takes what held-out prompts speak for, and the simplest of equals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tqdm import tqdm

from routers import blend
from routers.base import Query, RouterError
from routers.blend import BlendRouter, _greedy, _least_squares
from routers.c3po import C3PORouter
from routers.knn import KNNRouter
from routers.outcomes import OutcomeTable, Prompts
from routers.registry import load_router
from routers.testing import MODELS, WORDS, example_table
from routers.training import clearly_above

COE, KMEANS = "coe encoder=hashing fallback=false", "kmeans encoder=hashing"
LENGTH = "length bins=2 shrinkage=0"


def test_a_member_that_knows_beats_one_that_guesses():
    router = BlendRouter(members=["random", COE]).fit(example_table(per_split=120))
    assert router.metrics_["chosen"] == COE
    scores = router.metrics_["held_out_scores"]
    assert scores[COE] > scores["random"] + 0.2
    assert len(router.members_) == 1


def test_the_simplest_of_equals_is_taken():
    router = BlendRouter(members=[COE, COE.replace("hashing", "hashing+surface")]).fit(
        example_table(per_split=120)
    )
    assert router.metrics_["chosen"] == COE


@pytest.mark.parametrize("members", [[LENGTH, COE], [COE, LENGTH]])
def test_explanations_come_from_the_member_that_knows_categories(members):
    # A category's model is right for short texts, one more for long ones: each member knows half.
    table = example_table(per_split=120)
    prompts = replace(
        table.prompts, texts=[text * (1 + n % 2 * 5) for n, text in enumerate(table.prompts.texts)]
    )
    right = [
        "reader" if n % 2 else MODELS[sorted(WORDS).index(category)]
        for n, category in enumerate(prompts.categories or [])
    ]
    models = [*MODELS, "reader"]
    scores = np.array([[float(name == model) for model in models] for name in right])
    router = BlendRouter(members=members).fit(
        OutcomeTable(prompts, models=models, numbers={"score": scores})
    )
    assert [member.method for member in router.members_] == [text.split()[0] for text in members]
    queries = [Query("court judge"), Query("onion soup salt " * 10)]
    found = router.predict(queries, models).explanations
    assert [explanation.category for explanation in found] == ["law", "cooking"]
    knows = router.members_[members.index(COE)]
    assert found == knows.predict(queries, models).explanations


def test_members_that_need_categories_are_left_out_of_a_table_without():
    table = example_table()
    prompts = Prompts(table.prompts.ids, table.prompts.texts, None, table.prompts.splits)
    bare = OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")})
    router = BlendRouter(members=[COE, KMEANS]).fit(bare)
    assert list(router.metrics_["skipped"]) == [COE]
    with pytest.raises(RouterError, match="no member can learn"):
        BlendRouter(members=[COE]).fit(bare)


def test_members_that_leave_out_models_are_left_out():
    table = example_table()
    cards = {name: {"total_params_b": 7.0} for name in MODELS}
    sized = OutcomeTable(
        table.prompts, models=MODELS, numbers={"score": table.scores("all")}, cards=cards
    )
    small = "coe encoder=hashing max_total_params_b=7"
    router = BlendRouter(members=[small, "random"], folds=2).fit(sized)
    assert "leaves out" in router.metrics_["skipped"][small]


def test_an_artefact_with_a_foreign_member_is_refused(tmp_path):
    BlendRouter(members=[COE, KMEANS]).fit(example_table()).save(tmp_path / "blend")
    manifest = tmp_path / "blend" / "manifest.json"
    text = manifest.read_text()
    assert '"method": "coe"' in text
    manifest.write_text(text.replace('"method": "coe"', '"method": "os:system"'))
    with pytest.raises(RouterError, match="unknown router 'os:system'"):
        load_router(tmp_path / "blend")
    manifest.write_text(text.replace('"method": "coe"', '"method": null'))
    with pytest.raises(RouterError, match="state 'members': Input should be a valid string"):
        load_router(tmp_path / "blend")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ("kmeans", "must be a list"),
        ([], "must be a list"),
        (["no_such"], "unknown router 'no_such'"),
        (["kmeans C=1"], "unknown parameter 'C'"),
        (["kmeans top_k=0"], "'top_k' parameter"),
    ],
)
def test_bad_members_are_refused(members, message):
    with pytest.raises(RouterError, match=message):
        BlendRouter(members=members).fit(example_table())


def test_least_squares_finds_the_mixture():
    rng = np.random.default_rng(0)
    predictions = rng.random((2, 300, 4))
    scores = 0.75 * predictions[0] + 0.25 * predictions[1]
    scores[::7, 1] = np.nan
    assert _least_squares(predictions, scores) == pytest.approx([0.75, 0.25], abs=1e-6)


def test_greedy_ignores_a_useless_member():
    rng = np.random.default_rng(0)
    scores = rng.random((200, 4))
    predictions = np.array([rng.random((200, 4)), scores])
    assert _greedy(predictions, scores).argmax() == 1


def test_clearly_below_is_measured_on_the_same_prompts():
    best = np.array([1.0, 0.0, 1.0, 1.0] * 25)
    assert not clearly_above(best, best.copy(), 0.0)
    assert clearly_above(best, best - 0.5)
    assert not clearly_above(best, np.roll(best, 1))


def test_c3po_mixes_base_and_solved_neighbours():
    table = example_table()
    queries = [Query(text) for text in table.with_prompts_of("test").texts]
    prior = C3PORouter(base=KMEANS, encoder="hashing", prior=1.0).fit(table)
    base, neighbours = prior.members_
    mixed = C3PORouter(base=KMEANS, encoder="hashing", prior=0.25).fit(table)
    wanted = (
        0.25 * base.predict(queries, MODELS).quality
        + 0.75 * neighbours.predict(queries, MODELS).quality
    )
    assert mixed.predict(queries, MODELS).quality == pytest.approx(wanted, abs=1e-6)
    # Only prompts that somebody solved are neighbours.
    solved = (table.scores("train").max(axis=1) >= 0.5).sum()
    assert isinstance(neighbours, KNNRouter)
    assert len(neighbours.neighbours_) == solved


def test_calibration_keeps_the_order_and_brings_quality_near_the_scores():
    table = example_table(per_split=200)
    router = BlendRouter(members=["knn encoder=hashing k=2 shrinkage=0"]).fit(table)
    metrics = router.metrics_
    assert metrics["held_out_ece_calibrated"] < 0.7 * metrics["held_out_ece"]
    texts = [Query(text) for text in table.with_prompts_of("test").texts]
    alone = router.members_[0].predict(texts, MODELS).quality
    quality = router.predict(texts, MODELS).quality
    assert (quality.argmax(axis=1) == alone.argmax(axis=1)).all()
    scores = table.scores("test")
    assert abs(quality.mean() - scores.mean()) < 0.05


def test_the_bar_counts_folds_of_every_member_those_left_out_too(monkeypatch, capsys):
    # As in a run of more than two seconds.
    monkeypatch.setattr(blend, "tqdm", lambda **said: tqdm(**{**said, "delay": 0}))
    table = example_table()
    prompts = replace(table.prompts, categories=None)
    scores = {"score": table.scores("all")}
    without = OutcomeTable(prompts, models=MODELS, numbers=scores)
    router = BlendRouter(members=[COE, LENGTH, KMEANS], folds=4).fit(without)
    assert list(router.metrics_["skipped"]) == [COE]
    err = capsys.readouterr().err
    assert "blend:   0%" in err
    assert "| 12/12 [" in err
