"""The shipped battery, run on every registered router."""

from __future__ import annotations

from functools import partial

import pytest

from routers.coe import CoERouter
from routers.registry import ROUTERS, get_router_class
from routers.testing import router_checks

MAKERS = {
    **{name: get_router_class(name) for name in ROUTERS},
    # Hashed words: the same code without a model, and so many times faster.
    "coe": partial(CoERouter, encoder="hashing"),
    "coe, soft": partial(CoERouter, encoder="hashing", soft=True, fallback=False, C=1.0),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("check", router_checks(), ids=lambda check: check.__name__)
def test_router(check, name, tmp_path):
    check(MAKERS[name], tmp_path)
