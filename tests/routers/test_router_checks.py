"""The shipped battery, run on every registered router."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from routers.bert import BertRouter
from routers.blend import BlendRouter
from routers.c3po import C3PORouter
from routers.coe import CoERouter
from routers.fitted import VectorRouter
from routers.pilots import PilotsRouter
from routers.registry import ROUTERS, get_router_class
from routers.testing import router_checks


def _maker(name):
    """A small, quick variant: hashed words run the same code as a model does."""
    found: Any = get_router_class(name)
    return partial(found, encoder="hashing") if issubclass(found, VectorRouter) else found


MAKERS = {
    **{name: _maker(name) for name in ROUTERS if name != "bert"},  # below, on a tiny encoder
    "c3po": partial(C3PORouter, base="kmeans encoder=hashing", encoder="hashing"),
    "blend": partial(
        BlendRouter, members=["coe encoder=hashing soft=true", "ridge encoder=hashing"], folds=3
    ),
    "blend, of all": partial(
        BlendRouter, members=["tree", "knn encoder=hashing", "random"], folds=2, tolerance=0.0
    ),
    "coe, soft": partial(CoERouter, encoder="hashing", soft=True, fallback=False, C=1.0),
    "pilots, one vote": partial(PilotsRouter, encoder="hashing", least_votes=0.0),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("check", router_checks(), ids=lambda check: check.__name__)
def test_router(check, name, tmp_path):
    check(MAKERS[name], tmp_path)


@pytest.mark.parametrize("target", ["category", "expert"])
@pytest.mark.parametrize("check", router_checks(), ids=lambda check: check.__name__)
def test_bert(check, target, tiny_bert, tmp_path):
    check(partial(BertRouter, model=tiny_bert, target=target, max_tokens=16, epochs=1), tmp_path)
