"""The rules by which tokens choose adapters, against examples worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from experts.adapter_files import LowRank  # noqa: E402
from experts.config import TokenRouterConfig  # noqa: E402
from experts.token_routing import (  # noqa: E402
    AffineGate,
    NormalisedGate,
    TokenRouter,
    read_token_router,
)

X = torch.tensor([[[3.0, 0.0, 0.0, 4.0]]])
# Two updates of rank 1: the first answers to the first input, the second to the last.
UPDATES = [
    LowRank(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0], [0.0]])),
    LowRank(torch.tensor([[0.0, 0.0, 0.0, -1.0]]), torch.tensor([[0.0], [3.0]])),
]


def _shares(gate) -> list[float]:
    hidden = torch.stack([X @ update.down.T for update in UPDATES], dim=2)
    shares: list[float] = gate(X, hidden)[0, 0].tolist()
    return shares


def _softmax(*scores: float) -> list[float]:
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def test_arrow_takes_the_length_along_each_direction_whatever_its_sign_and_size():
    gate = TokenRouter("arrow", ("one", "two"), 2, temperature=2.0).gate("q", UPDATES)
    assert _shares(gate) == pytest.approx(_softmax(3 / 2, 4 / 2))


def test_spectr_takes_the_length_of_what_each_adapter_would_add():
    gate = TokenRouter("spectr", ("one", "two"), 2).gate("q", UPDATES)
    # |(6, 0)| and |(0, -12)|
    assert _shares(gate) == pytest.approx(_softmax(6, 12))


def test_vectors_and_inputs_are_normalised():
    vectors = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, 1.0]])
    # Less its mean, 1.75, over its spread, 1.7854: (.7001, -.9802, -.9802, 1.2602); vectors are
    # (1, -1, 1, -1) and (1, -1, -1, 1) then, and scores are divided by the root of 4.
    scores = [(0.7001 + 0.9802 - 0.9802 - 1.2602) / 2, (0.7001 + 0.9802 + 0.9802 + 1.2602) / 2]
    assert _shares(NormalisedGate(vectors, 2, 1.0)) == pytest.approx(_softmax(*scores), abs=1e-3)


def test_only_the_best_are_kept():
    weight, bias = torch.eye(4)[:2], torch.tensor([0.0, 1.0])
    assert _shares(AffineGate(weight, bias, 1, 0.1)) == [1, 0]
    assert _shares(AffineGate(weight, bias, 2, 1.0)) == pytest.approx(_softmax(3, 1))


def test_an_adapter_that_leaves_a_layer_alone_has_no_share_there():
    router = TokenRouter("arrow", ("one", "none", "two"), 3)
    gate = router.gate("q", [UPDATES[0], None, UPDATES[1]])
    one, two = _softmax(3, 4)
    assert _shares(gate) == pytest.approx([one, 0, two])
    assert router.gate("q", [None, None, None]) is None


def test_a_config_names_a_method_or_gates():
    arrow = read_token_router(
        TokenRouterConfig(name="r", method="arrow"), {"a": Path(), "b": Path()}
    )
    assert (arrow.adapters, arrow.top_k, arrow.temperature) == (("a", "b"), 4, 1.0)
    with pytest.raises(ValueError, match="give either a method"):
        TokenRouterConfig(name="r")
    with pytest.raises(ValueError, match="give either a method"):
        TokenRouterConfig(name="r", method="arrow", gates="x")
