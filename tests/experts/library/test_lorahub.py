"""The search for weights of adapters, on losses whose best weights are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("torch")

from experts.finetune_data import TokenPair
from experts.library.merging import lorahub_weights

PAIRS = [TokenPair([1], [2, 3]), TokenPair([1], [4, 5])]


class Examiner:
    """Pairs lose more the further the weights are from given ones."""

    def __init__(self, best: dict[str, float]) -> None:
        self.best = best
        self.adapters = SimpleNamespace(fused=lambda weights: weights)
        self.seen: list[dict[str, float]] = []

    def losses(self, pairs: list[TokenPair], use: Any) -> np.ndarray:
        """Shape (n_pairs,), summed over four tokens in all."""
        ((weights, share),) = use.shares
        assert share == 1.0
        self.seen.append(weights)
        far = sum((weights[name] - self.best[name]) ** 2 for name in self.best)
        return np.full(len(pairs), 2 * far)


def _found(best: dict[str, float], evaluations: int = 40) -> tuple[Examiner, list[float], Any]:
    examiner, objective = Examiner(best), []
    weights = lorahub_weights(
        cast(Any, examiner), [*best], PAIRS, evaluations=evaluations,
        on_step=lambda step, loss: objective.append(loss),
    )  # fmt: skip
    return examiner, objective, weights


def test_weights_come_near_the_best():
    _, _, weights = _found({"one": 1.0, "two": -0.5}, evaluations=120)
    assert weights == pytest.approx({"one": 1.0, "two": -0.5}, abs=0.15)


def test_the_objective_is_loss_per_token_plus_a_twentieth_of_the_mean_weight_and_starts_at_zero():
    examiner, objective, _ = _found({"one": 1.0, "two": -0.5}, evaluations=5)
    assert examiner.seen[0] == {"one": 0.0, "two": 0.0}
    for weights, value in zip(examiner.seen, objective, strict=True):
        far = sum((weights[name] - examiner.best[name]) ** 2 for name in weights)
        assert value == pytest.approx(far + 0.05 * np.mean([abs(w) for w in weights.values()]))


def test_weights_stay_within_bounds():
    examiner, _, weights = _found({"one": 9.0, "two": -9.0})
    assert all(abs(w) <= 1.5 for seen in examiner.seen for w in seen.values())
    assert weights["one"] > 1.2
    assert weights["two"] < -1.2
