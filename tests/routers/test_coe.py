from __future__ import annotations

import json

import numpy as np
import pytest

from routers.base import Query, RouterError
from routers.c3po import C3PORouter
from routers.category_classifier import equal_mass_bins, expected_calibration_error
from routers.category_learning import fit_classifier
from routers.coe import CoERouter
from routers.ngrams import fit_ngrams
from routers.outcomes import OutcomeTable, Prompts
from routers.testing import MODELS, WORDS, example_table
from routers.training import shrunken_means


def _fitted(**params):
    return CoERouter(encoder="hashing", **params).fit(example_table())


def _best(router, text):
    return MODELS[int(router.predict([Query(text)], MODELS).quality[0].argmax())]


def test_each_category_goes_to_its_expert():
    router = _fitted()
    assert _best(router, "garlic soup oven simmer") == "cook"
    assert _best(router, "tenant appeal court judge clause") == "lawyer"
    assert _best(router, "hello friend travel story") == "generalist"


def test_explanation_names_category_and_probabilities():
    [explanation] = _fitted().predict([Query("court judge lawyer trial")], MODELS).explanations
    assert explanation.category == "law"
    probabilities = explanation.detail["probabilities"]
    assert explanation.confidence == max(probabilities.values())
    assert set(probabilities) == {"cooking", "general", "law"}
    assert sum(probabilities.values()) == pytest.approx(1)
    assert explanation.detail["likely"] == ["law"]
    assert not explanation.fallback


def test_strange_query_gets_the_general_row():
    router = _fitted()
    strange = router.predict([Query("zqx wvk jjj ooo")], MODELS)
    assert strange.explanations[0].fallback or strange.explanations[0].category == "general"
    general = router.quality_[(router.categories_ or []).index("general")].astype(np.float32)
    assert strange.quality[0].tobytes() == general.tobytes()


def test_without_general_category_strange_queries_get_the_overall_means():
    router = _fitted(general_category="elsewhere", familiar_share=0.5)
    quality = router.predict([Query("zqx wvk jjj ooo")], MODELS).quality[0]
    means = np.nanmean(example_table().scores("train"), axis=0)
    assert quality == pytest.approx(means)


def test_fallback_can_be_turned_off():
    prediction = _fitted(fallback=False).predict([Query("zqx wvk jjj ooo")], MODELS)
    assert not prediction.explanations[0].fallback


def test_soft_mixing_is_the_posterior_mean_of_the_rows():
    router = _fitted(soft=True, fallback=False)
    prediction = router.predict([Query("bake a contract")], MODELS)
    posterior = np.array(list(prediction.explanations[0].detail["probabilities"].values()))
    assert prediction.quality[0] == pytest.approx(posterior @ router.quality_, rel=1e-6)


def test_general_texts_teach_the_classifier_what_is_general(tmp_path):
    file = tmp_path / "general.jsonl"
    texts = [f"unicorn\u2028 rainbow number{i}" for i in range(20)]
    file.write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + "\n\n"
    )
    router = _fitted(general_texts=str(file))
    [explanation] = router.predict([Query("a unicorn and a rainbow")], MODELS).explanations
    assert explanation.category == "general"
    assert router.metrics_["general_texts"] == 20


def test_general_texts_make_a_category_where_the_table_has_none(tmp_path):
    file = tmp_path / "general.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"unicorn {i} rainbow"}) for i in range(20)))
    router = _fitted(general_texts=str(file), general_category="other", soft=False)
    quality = router.predict([Query("unicorn rainbow")], MODELS).quality[0]
    assert quality == pytest.approx(np.nanmean(example_table().scores("train"), axis=0))


@pytest.mark.parametrize("line", ["[1]", '{"text": 3}', "no json", "{}"])
def test_bad_general_texts_are_refused_with_their_line(tmp_path, line):
    file = tmp_path / "general.jsonl"
    file.write_text('{"text": "good"}\n' + line)
    with pytest.raises(RouterError, match="line 2"):
        _fitted(general_texts=str(file))


def test_missing_general_texts_are_refused():
    with pytest.raises(RouterError, match=r"cannot read nowhere\.jsonl"):
        _fitted(general_texts="nowhere.jsonl")


def test_table_without_categories_is_refused():
    table = example_table()
    prompts = Prompts(table.prompts.ids, table.prompts.texts, None, table.prompts.splits)
    bare = OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")})
    with pytest.raises(RouterError, match="needs a column 'category'"):
        CoERouter(encoder="hashing").fit(bare)


def test_without_validation_split_it_calibrates_by_cross_validation():
    table = example_table()
    splits = ["train" if s == "validation" else s for s in table.prompts.splits or ()]
    prompts = Prompts(table.prompts.ids, table.prompts.texts, table.prompts.categories, splits)
    merged = OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")})
    router = CoERouter(encoder="hashing").fit(merged)
    assert router.metrics_["held_out_rows"] == 120
    assert router.metrics_["held_out_accuracy"] > 0.9


def test_rows_it_has_learnt_from_calibrate_nothing():
    router = CoERouter(encoder="hashing").fit(example_table(), split="all")
    # Cross-validation over all, not the split ``validation``, which is among them.
    assert router.metrics_["held_out_rows"] == 180


def test_one_category_is_enough():
    table = example_table()
    prompts = Prompts(table.prompts.ids, table.prompts.texts, ["law"] * 180, table.prompts.splits)
    single = OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")})
    router = CoERouter(encoder="hashing").fit(single)
    [explanation] = router.predict([Query("bread")], MODELS).explanations
    assert explanation.category == "law"
    assert explanation.confidence == 1.0


def test_two_categories_keep_their_names():
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)
    model = fit_classifier(vectors, np.array([0, 0, 1, 1]), ["a", "b"], C=10.0)
    for column, vector in enumerate(np.eye(2, dtype=np.float32)):
        assert model.probabilities(model.evidence(vector, "")).argmax() == column


def _misled_table():
    """A table whose category names say nothing where texts are hard to tell apart."""
    table = example_table(per_split=200)
    rng = np.random.default_rng(0)
    words = " ".join(WORDS.values()).split()
    texts, scores = list(table.prompts.texts), table.scores("all")
    for row in rng.choice(len(texts), len(texts) // 4, replace=False):
        texts[row] = " ".join(rng.choice(words, 6))
        scores[row] = [0.0, 1.0, 0.0]
    prompts = Prompts(table.prompts.ids, texts, table.prompts.categories, table.prompts.splits)
    return OutcomeTable(prompts, models=MODELS, numbers={"score": scores})


def test_threshold_is_the_median_of_the_best_on_validation():
    router = CoERouter(encoder="hashing", soft=False).fit(_misled_table())
    sweep = {float(t): score for t, score in router.metrics_["score_by_threshold"].items()}
    equal = sorted(t for t, score in sweep.items() if score == max(sweep.values()))
    assert router.threshold_ == equal[len(equal) // 2] > 0
    assert max(sweep.values()) > sweep[0.0]


def test_without_a_clear_gain_no_category_is_mistrusted():
    assert _fitted().threshold_ == 0.0


def test_likely_categories_hold_the_true_one_as_often_as_stated():
    table = _misled_table()
    prompts = table.with_prompts_of("test")
    sizes = []
    for coverage in (0.8, 0.95):
        router = CoERouter(encoder="hashing", coverage=coverage).fit(table)
        explanations = router.predict([Query(t) for t in prompts.texts], MODELS).explanations
        likely = [explanation.detail["likely"] for explanation in explanations]
        held = [c in found for c, found in zip(prompts.categories or [], likely, strict=True)]
        # Three standard errors of 200 prompts to judge on and 200 to calibrate with.
        assert np.mean(held) > coverage - 3 * (2 * coverage * (1 - coverage) / 200) ** 0.5
        sizes.append(np.mean([len(found) for found in likely]))
    assert sizes[0] < sizes[1] < 3


def test_familiarity_is_uniform_at_home_and_low_elsewhere():
    router = CoERouter(encoder="hashing").fit(example_table(per_split=200))
    texts = example_table(per_split=200).with_prompts_of("test").texts
    at_home = [
        e.detail["familiarity"]
        for e in router.predict([Query(t) for t in texts], MODELS).explanations
    ]
    assert np.quantile(at_home, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.12)
    [elsewhere] = router.predict([Query("zqx wvk jjj ooo")], MODELS).explanations
    assert elsewhere.detail["familiarity"] < 0.01


def test_n_grams_tell_apart_what_the_encoder_cannot():
    texts = [f"{noun} {number}" for number in range(60) for noun in ("integral", "verdicts")]
    splits = ["train", "validation", "test"] * 40
    prompts = Prompts([str(n) for n in range(120)], texts, ["maths", "law"] * 60, splits)
    scores = np.tile([[1.0, 0.0], [0.0, 1.0]], (60, 1))
    table = OutcomeTable(prompts, models=["a", "b"], numbers={"score": scores})
    judged = table.with_prompts_of("test").texts
    right = table.scores("test").argmax(axis=1)
    reached = {}
    for ngrams in (True, False):
        router = CoERouter(encoder="surface", ngrams=ngrams, fallback=False).fit(table)
        quality = router.predict([Query(text) for text in judged], ["a", "b"]).quality
        reached[ngrams] = (quality.argmax(axis=1) == right).mean()
    assert reached[True] == 1.0
    assert reached[False] < 0.75


def test_left_out_scores_are_those_of_a_fit_without_the_text():
    texts = [" ".join(words) for words in zip(*(w.split() for w in WORDS.values()), strict=False)]
    texts += list(WORDS.values())
    labels = np.arange(len(texts)) % 2
    _, left_out = fit_ngrams(texts, labels, 2)
    others = np.arange(len(texts)) != 0
    whole, _ = fit_ngrams(texts, labels, 2)
    part, _ = fit_ngrams([t for t, keep in zip(texts, others, strict=True) if keep],
                         labels[others], 2)  # fmt: skip
    # Document frequencies and shares of categories are those of all texts: nearly the same.
    assert left_out[0] == pytest.approx(part.scores(texts[0]), abs=0.05)
    assert whole.scores(texts[0])[labels[0]] > left_out[0, labels[0]]


def test_threshold_does_not_look_at_test_scores():
    table = example_table()
    scores = table.scores("all")
    scores[table.rows("test")] = 1 - scores[table.rows("test")]
    flipped = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    router = CoERouter(encoder="hashing").fit(flipped)
    assert router.metrics_ == _fitted().metrics_
    assert np.array_equal(router.quality_, _fitted().quality_)


def test_temperature_brings_confidence_near_accuracy():
    table = example_table(per_split=300)
    router = CoERouter(encoder="hashing", C=0.1, ngrams=False).fit(table)
    assert router.classifier_.temperature < 0.5
    assert router.metrics_["held_out_ece"] < 0.05


def test_expected_calibration_error_by_hand():
    confidence = np.array([0.5, 0.5, 0.9, 0.9])
    correct = np.array([True, False, True, False])
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(0.2)


def test_equal_confidence_is_one_bin_whatever_the_order_of_rows():
    constant, correct = np.full(40, 0.75), np.arange(40) >= 10
    assert expected_calibration_error(constant, correct) == 0.0
    assert expected_calibration_error(constant, correct[::-1]) == 0.0
    # Of the two middle values the second belongs to the first's bin.
    bins = equal_mass_bins(np.array([0.9, 0.5, 0.5, 0.1]), 4)
    assert [part.tolist() for part in bins] == [[3], [1, 2], [0]]
    assert equal_mass_bins(np.array([]), 4) == []


@pytest.mark.parametrize("count", [1, 7, 15, 16, 100])
def test_bins_of_unequal_values_are_of_equal_mass(count):
    values = np.random.default_rng(count).permutation(count) / count
    found = equal_mass_bins(values, 15)
    expected = [part for part in np.array_split(values.argsort(), 15) if len(part)]
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


def test_small_categories_shrink_towards_the_model_mean():
    scores = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [np.nan, 1.0]])
    table = shrunken_means(scores, np.array([0, 1, 1, 1]), 3, 2.0)
    mean = 1 / 3
    assert table[0] == pytest.approx([(1 + 2 * mean) / 3, (0 + 2 * 0.5) / 3])
    assert table[1] == pytest.approx([(0 + 2 * mean) / 4, (2 + 2 * 0.5) / 5])
    assert table[2] == pytest.approx([mean, 0.5])
    assert table[3] == pytest.approx([mean, 0.5])


def test_model_without_training_scores_is_left_out():
    table = example_table()
    scores = table.scores("all")
    scores[table.rows("train"), 1] = np.nan
    part = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores})
    router = CoERouter(encoder="hashing").fit(part)
    assert router.models == ["cook", "lawyer"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"C": 0}, "The 'C' parameter of CoERouter must be a number in the range (0, inf)"),
        ({"C": "big"}, "Got 'big' instead."),
        ({"C": float("inf")}, "in the range (0, inf). Got inf instead."),
        ({"n_clusters": 2.5}, "must be a whole number in the range [1, inf). Got 2.5 instead."),
        ({"shrinkage": -1}, "in the range [0, inf)"),
        ({"familiar_share": 1.5}, "in the range (0, 1]. Got 1.5 instead."),
        ({"soft": 1}, "must be true or false. Got 1 instead."),
        ({"general_category": ""}, "must be a non-empty text"),
        ({"general_texts": 3}, "must be a non-empty text"),
        ({"encoder": "minilm-int4"}, "unknown encoder 'minilm-int4'; known: 'minilm-int8'"),
    ],
)
def test_wrong_hyper_parameters_are_refused(params, message):
    with pytest.raises(RouterError) as caught:
        CoERouter(**{"encoder": "hashing", **params}).fit(example_table())
    assert message in str(caught.value)


def _sized_table():
    table = example_table()
    cards = {
        "cook": {"total_params_b": 7.0},
        "generalist": {"total_params_b": 70.0, "active_params_b": 13.0},
        "lawyer": {"total_params_b": 9.0},
    }
    return OutcomeTable(
        table.prompts, models=MODELS, numbers={"score": table.scores("all")}, cards=cards
    )


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        ({"max_total_params_b": 100.0}, {"cook", "generalist", "lawyer"}),
        ({"max_total_params_b": 16.0}, {"cook", "lawyer"}),
        ({"max_active_params_b": 8.0}, {"cook", "lawyer"}),
    ],
)
def test_budgets_are_kept_to(budget, chosen):
    router = CoERouter(encoder="hashing", **budget).fit(_sized_table())
    texts = example_table().with_prompts_of("test").texts
    quality = router.predict([Query(text) for text in texts], router.models).quality
    assert {router.models[column] for column in quality.argmax(axis=1)} == chosen


def test_models_that_no_category_needs_are_not_loaded(tmp_path):
    table = _sized_table()
    router = CoERouter(encoder="hashing", max_total_params_b=16.0).fit(table)
    assert router.models == ["cook", "lawyer"]
    assert router.metrics_["held_out_score"] > 0.5
    router.save(tmp_path / "art")
    assert CoERouter.load(tmp_path / "art").models == ["cook", "lawyer"]
    with pytest.raises(RouterError, match="'generalist'"):
        router.predict([Query("soup")], MODELS)
    with pytest.raises(RouterError, match="leaves out 'generalist'; members must know all"):
        C3PORouter(base="coe encoder=hashing max_total_params_b=16", encoder="hashing").fit(table)


@pytest.mark.parametrize("models", [MODELS, MODELS[::-1]])
def test_only_categories_with_scores_decide_which_models_are_kept(tmp_path, models):
    file = tmp_path / "general.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"unicorn {i} rainbow"}) for i in range(20)))
    table = _sized_table()
    means = {"cook": {"cooking": 0.9}, "generalist": {}, "lawyer": {"law": 0.9, "general": 0.9}}
    categories = table.prompts.categories or []
    # The generalist is the best over all, in no category, and fits into the budget.
    rows = [[means[name].get(kind, 0.0) for name in models] for kind in categories]
    scores = np.where(np.array(models) == "generalist", 0.8, np.array(rows))
    balanced = OutcomeTable(
        table.prompts, models=models, numbers={"score": scores}, cards=table.cards
    )
    router = CoERouter(
        encoder="hashing",
        shrinkage=0,
        max_total_params_b=100.0,
        general_texts=str(file),
        general_category="unicorns",
    ).fit(balanced)
    assert sorted(router.models) == ["cook", "lawyer"]
    [quality] = router.predict([Query("unicorn rainbow")], router.models).quality
    assert router.models[int(quality.argmax())] == "lawyer"


def test_budgets_need_sizes_and_one_category_per_query():
    with pytest.raises(RouterError, match="missing for 'generalist', 'lawyer'"):
        CoERouter(encoder="hashing", max_total_params_b=9.0).fit(
            OutcomeTable(
                example_table().prompts,
                models=MODELS,
                numbers={"score": example_table().scores("all")},
                cards={"cook": {"total_params_b": 7.0}},
            )
        )
    with pytest.raises(RouterError, match="leave out soft=true"):
        CoERouter(encoder="hashing", max_total_params_b=9.0, soft=True).fit(_sized_table())


def _without_categories():
    table = example_table()
    prompts = Prompts(table.prompts.ids, table.prompts.texts, None, table.prompts.splits)
    return OutcomeTable(prompts, models=MODELS, numbers={"score": table.scores("all")})


def test_categories_may_be_clusters():
    router = CoERouter(encoder="hashing", categories="clusters", n_clusters=6, soft=False)
    router.fit(_without_categories())
    assert router.categories_ == [f"cluster {number}" for number in range(6)]
    assert _best(router, "tenant appeal court judge clause") == "lawyer"


def test_categories_may_come_from_examples_in_a_csv_file(tmp_path):
    file = tmp_path / "examples.csv"
    rows = ["category,text"]
    for category, words in WORDS.items():
        rows += [f'{category},"{word}, {words}"' for word in words.split()]
    file.write_text("\n".join(rows))
    router = CoERouter(encoder="hashing", categories=str(file)).fit(_without_categories())
    assert router.categories_ == ["cooking", "general", "law"]
    assert _best(router, "tenant appeal court judge clause") == "lawyer"
    assert _best(router, "garlic soup oven simmer") == "cook"


def test_categories_may_come_from_another_artefact(tmp_path):
    _fitted().save(tmp_path / "namer")
    router = CoERouter(encoder="hashing", categories=str(tmp_path / "namer"))
    router.fit(_without_categories())
    assert router.categories_ == ["cooking", "general", "law"]
    assert _best(router, "tenant appeal court judge clause") == "lawyer"
    assert _best(router, "garlic soup oven simmer") == "cook"


def test_categories_may_come_from_the_shipped_domain_classifier():
    texts = [f"What is {n} plus {n + 9}?" for n in range(12)]
    texts += [f"remind me to call mum at {n} tomorrow" for n in range(12)]
    scores = np.repeat([[1.0, 0.0], [0.0, 1.0]], 12, axis=0)
    prompts = Prompts([str(n) for n in range(24)], texts)
    table = OutcomeTable(prompts, models=["solver", "butler"], numbers={"score": scores})
    router = CoERouter(encoder="hashing", categories="domains").fit(table)
    assert router.categories_ == ["assistant", "mathematics"]
    found = router.predict([Query("What is 3 plus 12?")], ["solver", "butler"]).quality[0]
    assert found[0] > found[1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("package:routers/nowhere", "categories: .* has no 'nowhere'"),
        ("package:routers/encoders", "no artefact at .*encoders"),
    ],
)
def test_missing_classifier_is_refused(reference, message):
    with pytest.raises(RouterError, match=message):
        CoERouter(encoder="hashing", categories=reference).fit(_without_categories())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2", "needs the columns 'text' and 'category' in its first line; it has 'a', 'b'"),
        ("text,category\n", "has no rows"),
        ("text,category\nhello,x\n,y", "line 3: text or category is empty"),
        (None, "give 'table', 'domains', 'clusters', a CSV file or an artefact's folder"),
    ],
)
def test_bad_examples_are_refused(tmp_path, content, message):
    file = tmp_path / "examples.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RouterError, match=message):
        CoERouter(encoder="hashing", categories=str(file)).fit(_without_categories())
