from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from routers.artefact import read_manifest
from routers.base import Query, RouterError
from routers.baselines import BestSingleRouter
from routers.centroids import CentroidsRouter
from routers.coe import CoERouter
from routers.kmeans import KMeansRouter
from routers.nexus import NexusRouter
from routers.outcomes import OutcomeTable, Prompts
from routers.pilots import PilotsRouter
from routers.registry import load_router
from routers.ridge import RidgeRouter
from routers.testing import MODELS, SKILL, WORDS, example_table
from routers.uniroute import UniRouteRouter
from routers.update_cli import update_command

QUERIES = [Query("bake bread onion soup"), Query("tenant court appeal"), Query("river city music")]
OLD = ["cook", "generalist"]
GROWING: dict[str, Callable[..., Any]] = {
    "kmeans": partial(KMeansRouter, n_clusters=6),
    "nexus": partial(NexusRouter, n_clusters=6, epochs=3),
    "ridge": RidgeRouter,
    "uniroute": partial(UniRouteRouter, n_clusters=6),
}
# Votes of old prompts change when a model joins, so the others' predictions do.
PILOTS: Callable[..., Any] = partial(PilotsRouter, encoder="hashing", n_clusters=6)
# Words of domains that adapters are named after, and of what is no adapter's.
DOMAINS = {
    "cook": WORDS["cooking"],
    "general": WORDS["general"],
    "lawyer": WORDS["law"],
    "musician": "chord melody tempo violin tune sing rhythm song note piano",
}
OTHERS: dict[str, Callable[..., Any]] = {
    "BEST": BestSingleRouter,
    "COE": partial(CoERouter, encoder="hashing"),
    "KMEANS": partial(KMeansRouter, encoder="hashing"),
}


@pytest.fixture
def table():
    return example_table(per_split=150)


@pytest.fixture
def ridge(table, tmp_path):
    """An artefact that knows two of the table's models."""
    RidgeRouter(encoder="hashing").fit(table.restricted_to(OLD)).save(tmp_path / "ridge")
    return tmp_path / "ridge"


def _run(*arguments):
    return CliRunner().invoke(update_command, list(map(str, arguments)))


def _updated(folder, *arguments):
    result = _run(*arguments, "--out", folder / "new")
    assert result.exit_code == 0, result.output
    return load_router(folder / "new")


def _written(table, path):
    table.write(path)
    return path


def _quality(router, models, queries=QUERIES):
    return router.predict(queries, list(models)).quality


def _of_split(table, *splits):
    rows = np.concatenate([table.rows(split) for split in splits])
    return OutcomeTable(
        table.prompts.take(rows), models=MODELS, numbers={"score": table.scores("all")[rows]}
    )


def _with_gaps(table):
    """The table with a third of its cells missing."""
    scores = table.scores("all")
    scores[np.random.default_rng(0).random(scores.shape) < 1 / 3] = np.nan
    return OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})


@pytest.mark.parametrize("method", GROWING)
def test_a_model_joins_by_its_scores(method, table, tmp_path):
    artefact = tmp_path / "old"
    GROWING[method](encoder="hashing").fit(table.restricted_to(OLD)).save(artefact)
    before = _quality(load_router(artefact), OLD)
    path = _written(table, tmp_path / "table")
    router = _updated(tmp_path, artefact, "--table", path, "--split", "validation")
    assert router.models == [*OLD, "lawyer"]
    assert _quality(router, OLD).tobytes() == before.tobytes()
    assert _quality(router, MODELS).argmax(axis=1)[1] == 2
    by_hand: Any = load_router(artefact)
    texts = table.with_prompts_of("validation").texts
    by_hand.add_model("lawyer", texts, table.scores("validation")[:, 2])
    assert _quality(router, MODELS).tobytes() == _quality(by_hand, MODELS).tobytes()


@pytest.fixture
def clear(table):
    """The table with each model's skill in place of luck, so one is the best by far everywhere."""
    skill = np.array([SKILL[category] for category in table.prompts.categories])
    return OutcomeTable(table.prompts, models=MODELS, numbers={"score": skill})


@pytest.mark.parametrize("method", [*GROWING, "pilots"])
def test_a_model_that_joins_or_leaves_decides_as_a_rebuild_does(method, clear):
    make = {**GROWING, "pilots": PILOTS}[method]
    queries = [Query(text) for text in clear.with_prompts_of("test").texts]
    whole, old = (make(encoder="hashing").fit(t) for t in (clear, clear.restricted_to(OLD)))
    left: Any = copy.deepcopy(whole)
    left.remove_model("lawyer")
    joined: Any = copy.deepcopy(old)
    joined.add_model("lawyer", clear.with_prompts_of("train").texts, clear.scores("train")[:, 2])
    for changed, rebuilt in ((left, old), (joined, whole)):
        models = rebuilt.models
        found, expected = _quality(changed, models, queries), _quality(rebuilt, models, queries)
        assert set(expected.argmax(axis=1)) == set(range(len(models)))
        assert np.array_equal(found.argmax(axis=1), expected.argmax(axis=1))
        # Methods with clusters expect of a new model what models like it do there, and nexus makes
        # its vector by a network that has not seen it.
        if (changed is left and method != "nexus") or method in ("pilots", "ridge"):
            assert found == pytest.approx(expected, abs=1e-6)


def _library(*domains, scored=None):
    """What 'collegium library table' writes: each adapter is scored on all domains, as the base is.

    Args:
        domains: Of the texts.
        scored: The models; by default the base, and those that the domains are named after.
    """
    rng = {domain: random.Random(domain) for domain in domains}
    texts = {d: [" ".join(rng[d].choices(DOMAINS[d].split(), k=6)) for _ in range(40)] for d in rng}
    rows = [(text, domain) for domain, found in texts.items() for text in found]
    ids = [f"{domain}-{number}" for number, (_, domain) in enumerate(rows)]
    models = scored or ["base", *(domain for domain in domains if domain != "general")]
    prompts = Prompts(ids, [text for text, _ in rows], [domain for _, domain in rows])
    scores = np.full((len(rows), len(models)), 0.5)
    return OutcomeTable(prompts, models=models, numbers={"score": scores})


@pytest.mark.parametrize(
    ("trained_on", "given"),
    [
        (_library("cook", "general"), _library("cook", "lawyer", "musician", "general")),
        # Of the newcomers' texts alone, with their scores and the base's.
        (_library("cook", "general"), _library("lawyer", "musician")),
        # Their texts were there before, as no model's.
        (
            _library("cook", "lawyer", "musician", "general", scored=["base", "cook"]),
            _library("cook", "lawyer", "musician", "general"),
        ),
        (
            _library("cook", "lawyer", "musician", scored=["base", "cook"]),
            _library("cook", "lawyer", "musician"),
        ),
        # The base has no texts.
        (_library("cook", "general", scored=["cook"]), _library("cook", "general")),
    ],
)
def test_adapters_join_with_their_own_texts_alone(trained_on, given, tmp_path):
    CentroidsRouter(encoder="hashing").fit(trained_on).save(tmp_path / "old")
    router = _updated(tmp_path, tmp_path / "old", "--table", _written(given, tmp_path / "table"))
    domains = dict.fromkeys([*trained_on.prompts.categories, *given.prompts.categories])
    rebuilt = CentroidsRouter(encoder="hashing").fit(_library(*domains))
    queries = [*QUERIES, *(Query(text) for text in given.prompts.texts)]
    found, expected = (_quality(one, rebuilt.models, queries) for one in (router, rebuilt))
    assert np.array_equal(found, expected)
    newcomers = set(rebuilt.models) - set(trained_on.models)
    assert router.updates_[-1].added == {name: 40 if name != "base" else 0 for name in newcomers}


def test_an_adapter_that_leaves_takes_its_texts_with_it(tmp_path):
    whole = _library("cook", "lawyer", "musician", "general")
    CentroidsRouter(encoder="hashing").fit(whole).save(tmp_path / "old")
    router = _updated(tmp_path, tmp_path / "old", "--remove-model", "lawyer")
    left = CentroidsRouter(encoder="hashing").fit(_library("cook", "musician", "general"))
    queries = [Query(text) for text in whole.prompts.texts]
    assert np.array_equal(
        _quality(router, left.models, queries), _quality(left, left.models, queries)
    )


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("thin", [lambda table: table, _with_gaps])
def test_pilots_count_votes_again(labelled, thin, table, tmp_path):
    whole = _taken(thin(table), np.arange(len(table.prompts)), labelled)
    PILOTS().fit(whole).save(tmp_path / "whole")
    PILOTS().fit(whole.restricted_to(OLD)).save(tmp_path / "old")
    left = _updated(tmp_path, tmp_path / "whole", "--remove-model", "lawyer")
    assert _quality(left, OLD) == pytest.approx(
        _quality(load_router(tmp_path / "old"), OLD), abs=1e-6
    )
    # What is known of the others need not be told again.
    path = _written(whole.restricted_to(["lawyer"]), tmp_path / "table")
    joined = _updated(tmp_path, tmp_path / "old", "--table", path)
    expected = _quality(load_router(tmp_path / "whole"), MODELS)
    assert _quality(joined, MODELS) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_pilots_take_over_prompts_that_come_with_a_new_model(labelled, clear, tmp_path):
    law = np.array([category == "law" for category in clear.prompts.categories])
    order = np.argsort(law, kind="stable")
    whole = _taken(clear, order, labelled)
    old = _taken(clear, order[: int((~law).sum())], labelled).restricted_to(OLD)
    PILOTS().fit(old).save(tmp_path / "old")
    path = _written(whole, tmp_path / "table")
    router = _updated(tmp_path, tmp_path / "old", "--table", path)
    rebuilt = PILOTS().fit(whole)
    assert _quality(router, MODELS).argmax(axis=1).tolist() == [0, 2, 1]
    assert _quality(router, MODELS) == pytest.approx(_quality(rebuilt, MODELS), abs=1e-6)
    if labelled:
        _taken(clear, order, labelled=False).write(tmp_path / "bare")
        result = _run(tmp_path / "old", "--table", tmp_path / "bare", "--out", tmp_path / "out")
        assert "give a table with the column 'category'" in result.stderr


def _taken(table, rows, labelled):
    """Some rows in some order, with or without their categories."""
    prompts = table.prompts.take(rows)
    if not labelled:
        prompts = Prompts(prompts.ids, prompts.texts, None, prompts.splits)
    return OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")[rows]})


def test_pilots_refuse_scores_on_prompts_that_no_other_model_has(clear):
    router = PILOTS().fit(clear.restricted_to(OLD))
    known = clear.with_prompts_of("train").texts[0]
    with pytest.raises(RouterError, match="does not know 1 of 2; give a table with the scores of"):
        router.add_model("lawyer", [known, "an unknown prompt"], [0.5, 0.5])


@pytest.mark.parametrize("thin", [lambda table: table, _with_gaps])
def test_rows_added_later_count_as_those_of_training(table, tmp_path, thin):
    whole = thin(table)
    path = _written(whole, tmp_path / "table")
    RidgeRouter(encoder="hashing").fit(_of_split(whole, "train")).save(tmp_path / "half")
    arguments = [tmp_path / "half", "--table", path, "--split", "validation", "--rows"]
    router = _updated(tmp_path, *arguments)
    joint = _of_split(whole, "train", "validation")
    wanted = RidgeRouter(encoder="hashing").fit(joint, split="all")
    assert router._weights == pytest.approx(wanted._weights, abs=1e-9)
    assert _quality(router, MODELS) == pytest.approx(_quality(wanted, MODELS), abs=1e-7)
    assert len(router.grams_) == len(wanted.grams_)


def test_the_manifest_tells_what_was_changed(ridge, table, tmp_path):
    scores = table.scores("all")
    scores[table.rows("train")[:50], 2] = np.nan
    gaps = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    path = _written(gaps, tmp_path / "table")
    result = _run(ridge, "--table", path, "--rows", "--out", tmp_path / "new", "--json")
    [update] = json.loads(result.stdout)["updates"]
    assert update == {
        "table_sha256": gaps.sha256,
        "split": "train",
        "removed": [],
        "rows": 150,
        "added": {"lawyer": 100},
    }
    result = _run(tmp_path / "new", "--remove-model", "cook", "--out", tmp_path / "new")
    assert "removed    cook" in result.stdout
    assert "learnt     150 more prompts" in result.stdout
    assert "added      lawyer by 100 prompts" in result.stdout
    manifest = read_manifest(tmp_path / "new")
    assert manifest.models == ["generalist", "lawyer"]
    assert [found.removed for found in manifest.updates] == [[], ["cook"]]
    assert manifest.updates[1].table_sha256 is None
    assert manifest.table_sha256 == read_manifest(ridge).table_sha256


def test_what_was_measured_follows_the_models(table, tmp_path):
    cells = np.ones((len(table.prompts), 1))
    numbers = {"score": table.scores("all"), "output_tokens": cells * [10.0, 20.0, 30.0]}
    measured = OutcomeTable(table.prompts, models=MODELS, numbers=numbers)
    path = _written(measured, tmp_path / "table")
    RidgeRouter(encoder="hashing").fit(measured.restricted_to(OLD)).save(tmp_path / "old")
    arguments = [tmp_path / "old", "--table", path, "--remove-model", "cook"]
    found = _updated(tmp_path, *arguments).measured
    assert {name: one.output_tokens for name, one in found.items()} == {
        "generalist": 20.0,
        "lawyer": 30.0,
    }


def test_a_removed_model_may_join_again_by_other_scores(ridge, table, tmp_path):
    path = _written(table, tmp_path / "table")
    arguments = [ridge, "--table", path, "--split", "validation", "--remove-model", "cook"]
    assert _updated(tmp_path, *arguments).models == ["generalist", "lawyer"]
    again = _updated(tmp_path, *arguments, "--add-model", "cook")
    assert again.models == ["generalist", "cook"]
    before = _quality(load_router(ridge), again.models)
    assert (_quality(again, again.models) != before).any(axis=0).tolist() == [False, True]


def test_fitting_again_forgets_updates(ridge, table, tmp_path):
    router = _updated(tmp_path, ridge, "--remove-model", "cook")
    assert len(router.updates_) == 1
    assert router.fit(table).updates_ == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RIDGE"], "come from an outcome table: give '--table'"),
        (["RIDGE", "--rows"], "come from an outcome table: give '--table'"),
        (["RIDGE", "--table", "KNOWN"], "knows all models of"),
        (["RIDGE", "--table", "TABLE", "--add-model", "cook"], "already; give another name, or"),
        (["RIDGE", "--table", "TABLE", "--add-model", "x"], "the outcome table has no model 'x'"),
        (["RIDGE", "--table", "TABLE", "--add-model", "idle"], "'idle' has no scores in the split"),
        (["RIDGE", "--table", "IDLE", "--rows"], "no scores of a model that the artefact knows"),
        (["RIDGE", "--table", "TABLE", "--split", "dev"], "unknown split 'dev'"),
        (["RIDGE", "--remove-model", "x"], "cannot remove 'x' from 'cook', 'generalist'"),
        (["KMEANS", "--table", "TABLE", "--rows"], "'kmeans' cannot learn from more rows; train it "
         "again, or train one that can: 'ridge'"),
        (["COE", "--table", "TABLE"], "'coe' cannot take new models; train it again, or train one "
         "that can: 'centroids', 'kmeans', 'nexus', 'pilots', 'ridge', "
         "'uniroute'"),
        (["BEST", "--remove-model", "cook"], "'best_single' cannot forget models"),
        (["/nowhere", "--table", "TABLE"], "does not exist"),
        (["TABLE", "--table", "TABLE"], "no artefact at"),
    ],
)  # fmt: skip
def test_mistakes_exit_with_2_and_one_line(ridge, table, tmp_path, arguments, message):
    for name in OTHERS.keys() & set(arguments):
        OTHERS[name]().fit(table.restricted_to(OLD)).save(tmp_path / name)
    idle = np.full((len(table.prompts), 1), np.nan)
    idle[table.rows("test")] = 1.0
    scores = np.hstack([table.scores("all"), idle])
    more = OutcomeTable(table.prompts, models=[*MODELS, "idle"], numbers={"score": scores})
    more.write(tmp_path / "TABLE")
    more.restricted_to(["lawyer"]).write(tmp_path / "IDLE")
    table.restricted_to(OLD).write(tmp_path / "KNOWN")
    places = {name: tmp_path / name for name in (*OTHERS, "TABLE", "IDLE", "KNOWN")}
    places["RIDGE"] = ridge
    arguments = [places.get(argument, argument) for argument in arguments]
    result = _run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
