from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from routers.base import Query, RouterError
from routers.bert import BertRouter
from routers.outcomes import OutcomeTable, Prompts
from routers.registry import load_router
from routers.testing import MODELS, example_table
from routers.text_classifier import TextClassifier, fine_tune

QUERIES = {
    "cook": Query("garlic soup oven simmer"),
    "lawyer": Query("tenant appeal court judge clause"),
    "generalist": Query("hello friend travel story music"),
}


def _router(tiny_bert, **params):
    quick = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 8, "max_tokens": 16}
    return BertRouter(**{"model": tiny_bert, **quick, **params})


@pytest.fixture(scope="module", params=["category", "expert"])
def fitted(request, tiny_bert):
    return _router(tiny_bert, target=request.param).fit(example_table())


@pytest.fixture
def classifier(tiny_bert):
    torch.manual_seed(0)
    made = TextClassifier.from_checkpoint(tiny_bert, layers=None, n_outputs=3, max_tokens=16)
    return made.eval()


def _without_categories(table):
    prompts = Prompts(table.prompts.ids, table.prompts.texts, None, table.prompts.splits)
    numbers = {"score": table.scores("all")}
    return OutcomeTable(prompts, models=table.models, numbers=numbers, cards={})


def test_each_kind_of_query_goes_to_its_expert(fitted):
    quality = fitted.predict(list(QUERIES.values()), list(QUERIES)).quality
    assert quality.argmax(axis=1).tolist() == [0, 1, 2]


def test_predicted_quality_is_near_the_kinds_mean_scores(fitted):
    table = example_table()
    categories = table.prompts.categories or []
    law = [row for row in table.rows("train") if categories[row] == "law"]
    [quality] = fitted.predict([QUERIES["lawyer"]], MODELS).quality
    assert quality == pytest.approx(table.scores("all")[law].mean(axis=0), abs=0.2)


@pytest.mark.parametrize("fitted", ["category"], indirect=True)
def test_category_is_named_with_calibrated_probabilities(fitted):
    [explanation] = fitted.predict([QUERIES["lawyer"]], MODELS).explanations
    assert explanation.category == "law"
    assert explanation.confidence == max(explanation.detail["probabilities"].values())
    assert sum(explanation.detail["probabilities"].values()) == pytest.approx(1)
    assert fitted.metrics_["held_out_accuracy"] > 0.9
    assert fitted.metrics_["held_out_ece"] < 0.1


@pytest.mark.parametrize("fitted", ["category"], indirect=True)
def test_quality_is_the_posterior_mean_of_the_rows(fitted):
    prediction = fitted.predict([Query("bake a contract")], MODELS)
    posterior = np.array(list(prediction.explanations[0].detail["probabilities"].values()))
    assert prediction.quality[0] == pytest.approx(posterior @ fitted.quality_, rel=1e-6)


def test_experts_are_rated_without_categories_and_with_missing_scores(tiny_bert):
    table = _without_categories(example_table())
    scores = table.scores("all")
    scores[::4] = np.nan
    scores[1::4, 0] = np.nan
    sparse = OutcomeTable(table.prompts, models=MODELS, numbers={"score": scores}, cards={})
    router = _router(tiny_bert, target="expert").fit(sparse)
    quality = router.predict(list(QUERIES.values()), list(QUERIES)).quality
    assert quality.argmax(axis=1).tolist() == [0, 1, 2]
    assert router.metrics_["held_out_rows"] == 45


def test_without_validation_split_some_training_rows_are_held_out(tiny_bert):
    table = example_table()
    alone = OutcomeTable(
        table.prompts.take(table.rows("train")),
        models=MODELS,
        numbers={"score": table.scores("train")},
        cards={},
    )
    router = _router(tiny_bert, epochs=1).fit(alone)
    assert 0 < router.metrics_["held_out_rows"] < 20


def test_every_layer_is_trained(tiny_bert):
    router = _router(tiny_bert, epochs=1).fit(example_table())
    torch.manual_seed(router.random_state)
    before = TextClassifier.from_checkpoint(tiny_bert, layers=None, n_outputs=3, max_tokens=16)
    after = router.classifier_.state_dict()
    # A key's bias adds the same to all of a query's attention scores, so it has no gradient.
    same = [n for n, w in before.state_dict().items() if torch.equal(w, after[n])]
    assert [name for name in same if "key.bias" not in name] == []
    assert any("word_embeddings" in name for name in after)
    assert not any("pooler" in name for name in after)


def test_padding_changes_neither_logits_nor_gradients(classifier):
    texts = [classifier.tokens(text) for text in ("court", "bake bread onion soup oven salt")]
    together = classifier(**classifier.padded(texts))
    for row, text in zip(together, texts, strict=True):
        assert row.tolist() == pytest.approx(classifier.logits(text).tolist(), abs=1e-5)
    first = classifier.body.embeddings.word_embeddings.weight
    [padded] = torch.autograd.grad(together[0].sum(), first)
    [alone] = torch.autograd.grad(classifier(**classifier.padded(texts[:1])).sum(), first)
    assert torch.allclose(padded, alone, atol=1e-5)


def test_the_epoch_of_least_held_out_loss_is_kept(classifier):
    texts = [classifier.tokens(word) for word in "bake bread court judge".split()]
    logits, facts = fine_tune(
        classifier,
        [texts[0], texts[0], texts[2], texts[2]],
        # What is learnt from rows 0 and 2 is wrong for the others, so the first epoch is the best.
        np.array([0, 1, 1, 0]),
        torch.nn.functional.cross_entropy,
        np.array([0, 2]),
        np.array([1, 3]),
        epochs=6,
        learning_rate=0.02,
        batch_size=2,
        random_state=0,
        name="test",
    )
    assert facts["best_epoch"] < 6
    kept = np.stack([classifier.logits(texts[row]) for row in (0, 2)])
    assert kept == pytest.approx(logits, abs=1e-6)


def test_artefact_needs_no_checkpoint(tiny_bert, tmp_path):
    moved = shutil.copytree(tiny_bert, tmp_path / "checkpoint")
    router = _router(str(moved), epochs=1, layers=1).fit(example_table())
    router.save(tmp_path / "artefact")
    shutil.rmtree(moved)
    loaded = load_router(tmp_path / "artefact")
    queries = list(QUERIES.values())
    expected = router.predict(queries, MODELS)
    assert loaded.predict(queries, MODELS).quality.tobytes() == expected.quality.tobytes()
    manifest = json.loads((tmp_path / "artefact" / "manifest.json").read_text())
    assert manifest["state"]["config"]["num_hidden_layers"] == 1


def test_damaged_artefact_is_refused(tiny_bert, tmp_path):
    _router(tiny_bert, epochs=1).fit(example_table()).save(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"]["config"]["num_hidden_layers"] = 3
    path.write_text(json.dumps(manifest))
    with pytest.raises(RouterError, match="config and weights do not fit"):
        BertRouter.load(tmp_path)
    manifest["state"]["config"]["model_type"] = "no such"
    path.write_text(json.dumps(manifest))
    with pytest.raises(RouterError, match="no such"):
        BertRouter.load(tmp_path)
    del manifest["state"]["config"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RouterError, match="'config' is missing"):
        BertRouter.load(tmp_path)


def test_threads_get_the_same_bits(fitted):
    queries = list(QUERIES.values())
    expected = fitted.predict(queries, MODELS).quality.tobytes()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: fitted.predict(queries, MODELS).quality.tobytes(), range(20))
    assert set(found) == {expected}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"model": "/no/such/folder"}, "cannot load the checkpoint '/no/such/folder'"),
        ({"model": "nobody/nothing"}, "local hub cache"),
        ({"layers": 3}, "has 2 layers, not 3"),
        ({"max_tokens": 64}, "up to 40 tokens"),
        ({"target": "model"}, "one of 'category', 'expert'"),
        ({"device": "tpu"}, "one of 'auto', 'cpu', 'cuda'"),
        ({"epochs": 0}, "'epochs'"),
    ],
)
def test_wrong_parameter_is_refused(params, message, tiny_bert):
    with pytest.raises(RouterError, match=message):
        _router(tiny_bert, **params).fit(example_table())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused(tiny_bert):
    with pytest.raises(RouterError, match="device=auto"):
        _router(tiny_bert, device="cuda").fit(example_table())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_trains_and_predicts(tiny_bert):
    router = _router(tiny_bert, device="cuda").fit(example_table())
    quality = router.predict(list(QUERIES.values()), list(QUERIES)).quality
    assert quality.argmax(axis=1).tolist() == [0, 1, 2]


def test_categories_are_needed_to_name_them(tiny_bert):
    with pytest.raises(RouterError, match="set target=expert"):
        _router(tiny_bert).fit(_without_categories(example_table()))


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_package_is_named(package, tiny_bert, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RouterError, match=rf"needs the package '{package}'.*collegium\[torch\]"):
        _router(tiny_bert).fit(example_table())


def test_deberta_is_trained_masked_and_restored(tiny_bert, tmp_path):
    from transformers import DebertaV2Config, DebertaV2Model

    checkpoint = shutil.copytree(tiny_bert, tmp_path / "checkpoint")
    words = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    config = DebertaV2Config(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )
    torch.manual_seed(0)
    DebertaV2Model(config).save_pretrained(checkpoint)
    router = _router(str(checkpoint), epochs=3, layers=1).fit(example_table())
    router.save(tmp_path / "artefact")
    loaded = BertRouter.load(tmp_path / "artefact")
    queries = list(QUERIES.values())
    expected = router.predict(queries, list(QUERIES)).quality
    assert loaded.predict(queries, list(QUERIES)).quality.tobytes() == expected.tobytes()
    assert expected.argmax(axis=1).tolist() == [0, 1, 2]
    texts = [loaded.classifier_.tokens(text) for text in ("court", "bake bread onion soup oven")]
    together = loaded.classifier_(**loaded.classifier_.padded(texts))[0].tolist()
    assert together == pytest.approx(loaded.classifier_.logits(texts[0]).tolist(), abs=1e-5)


def test_minilm_is_found_in_its_package():
    router = BertRouter(layers=1, max_tokens=8, epochs=1).fit(example_table(per_split=6))
    assert router.classifier_.config["hidden_size"] == 384
    assert len(router.classifier_.body.encoder.layer) == 1
