"""What the battery of all routers does not see of the one that leads collaborations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from routers.base import Query  # noqa: E402
from routers.latent.router import LatentRouter  # noqa: E402
from routers.registry import load_router  # noqa: E402
from routers.testing import MODELS, example_table  # noqa: E402

TEXTS = ["bake bread onion soup", "tenant court appeal", "river city music"]


def _last(network) -> Any:
    return network[-1]


def _adopted():
    torch.manual_seed(0)
    router = LatentRouter(encoder="hashing")
    network = router.network(3)
    with torch.no_grad():
        _last(network).weight.mul_(50)  # scores that differ
    return router, network.eval()


def test_quality_is_the_sigmoid_of_the_networks_scores(tmp_path):
    router, network = _adopted()
    with torch.no_grad():
        scores = network(router.encode(TEXTS))
    router.adopt(network, MODELS, {"held_out_loss": 1.0})
    router.save(tmp_path / "router")
    loaded = load_router(tmp_path / "router")
    quality = loaded.predict([Query(text) for text in TEXTS], MODELS).quality
    assert quality == pytest.approx(scores.sigmoid().numpy(), abs=1e-6)
    # So the gates can be had from predicted qualities.
    odds = torch.logit(torch.from_numpy(quality))
    assert odds.softmax(1).numpy() == pytest.approx(scores.softmax(1).numpy(), abs=1e-5)


def test_a_new_network_favours_nobody():
    torch.manual_seed(0)
    last = _last(LatentRouter(encoder="hashing").network(3))
    assert last.bias.tolist() == [0.0, 0.0, 0.0]
    assert float(last.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_it_learns_from_a_table_alone():
    table = example_table(per_split=240)
    router = LatentRouter(encoder="hashing").fit(table)
    quality = router.predict([Query(text) for text in TEXTS], MODELS).quality
    assert quality.argmax(axis=1).tolist() == [0, 2, 1]
    texts = table.with_prompts_of("validation").texts
    found = router.predict([Query(text) for text in texts], MODELS).quality
    scores = table.scores("validation")
    mean = np.broadcast_to(table.scores("train").mean(axis=0), scores.shape)
    assert np.square(found - scores).mean() < 0.9 * np.square(mean - scores).mean()
