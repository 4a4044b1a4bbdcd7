"""200 prompts through the default encoder: what else is in the batch changes no bit."""

from __future__ import annotations

import random

import numpy as np
import pytest

from orchestrator.policies import UtilityPolicy
from routers.base import Query
from routers.coe import CoERouter
from routers.encoders import MiniLMEncoder
from routers.testing import MODELS, WORDS, example_table


@pytest.fixture(scope="module")
def router():
    return CoERouter().fit(example_table(per_split=30))


def _prompts(n=200):
    rng = random.Random(11)
    words = " ".join(WORDS.values()).split()
    return [Query(" ".join(rng.choices(words, k=rng.randint(1, 20)))) for _ in range(n)]


def _decisions(prediction):
    costs = np.tile([0.2, 1.0, 0.5], (len(prediction.quality), 1))
    policy = UtilityPolicy(cost_quality=0.7)
    return policy.choices(MODELS, prediction.quality, costs).tolist()


def test_alone_or_in_any_batch_decisions_are_equal(router):
    queries = _prompts()
    alone = [router.predict([query], MODELS) for query in queries]
    rng = random.Random(12)
    for size in (200, 64, 7):
        order = rng.sample(range(len(queries)), len(queries))
        # A new object has an empty cache, so vectors are really computed again.
        router.encoder = MiniLMEncoder(layers=router._encoder().layers)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            batch = router.predict([queries[i] for i in part], MODELS)
            for row, i in enumerate(part):
                assert batch.quality[row].tobytes() == alone[i].quality[0].tobytes()
                assert batch.explanations[row] == alone[i].explanations[0]
            assert _decisions(batch) == [_decisions(alone[i])[0] for i in part]
