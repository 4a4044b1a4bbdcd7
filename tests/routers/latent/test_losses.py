"""Choices, gates and the router's own losses, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from routers.latent.losses import choose, entropy_loss, gates, load_balance_loss  # noqa: E402

LOG2 = math.log(2)
# Softmax of the rows: (1/2, 1/4, 1/4) and (1/4, 1/4, 1/2).
SCORES = torch.tensor([[LOG2, 0.0, 0.0], [0.0, 0.0, LOG2]])


def test_the_highest_scores_are_active_and_the_highest_writes():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    assert choose(scores, 1).tolist() == [[1], [0]]
    assert choose(scores, 2).tolist() == [[1, 2], [0, 2]]
    assert choose(scores, 3).tolist() == [[1, 2, 0], [0, 2, 1]]


def test_a_named_writer_comes_first_whatever_its_score():
    scores = torch.tensor([[0.1, 0.9, 0.5], [3.0, 1.0, 2.0]])
    assert choose(scores, 2, writer=2).tolist() == [[2, 1], [2, 0]]
    assert choose(scores, 1, writer=1).tolist() == [[1], [1]]


def test_random_peers_leave_the_writer():
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    draws = torch.tensor([[0.8, 0.1, 0.3]])
    assert choose(scores, 2, draws=draws).tolist() == [[1, 0]]
    assert choose(scores, 2, writer=2, draws=draws).tolist() == [[2, 0]]


def test_gates_are_the_softmax_of_the_active():
    found = gates(SCORES, torch.tensor([[0, 1], [2, 0]]))
    assert found.tolist() == [pytest.approx([2 / 3, 1 / 3])] * 2
    assert gates(SCORES, torch.tensor([[0], [0]])).tolist() == [[1.0], [1.0]]


def test_entropy_loss():
    # H(1/2, 1/4, 1/4) = 1.5 log 2
    assert float(entropy_loss(SCORES)) == pytest.approx(-1.5 * LOG2)
    assert float(entropy_loss(torch.zeros(4, 3))) == pytest.approx(-math.log(3))


def test_entropy_loss_draws_scores_together():
    scores = SCORES.clone().requires_grad_()
    entropy_loss(scores).backward()
    assert scores.grad[0, 0] > 0 > scores.grad[0, 1]
    assert scores.grad.sum(1).abs().max() < 1e-6


def test_load_balance_loss():
    # Mean probabilities are (3/8, 1/4, 3/8); of four choices the shares are (1/2, 1/4, 1/4).
    chosen = torch.tensor([[True, True, False], [True, False, True]])
    assert float(load_balance_loss(SCORES, chosen)) == pytest.approx(
        3 * (1 / 2 * 3 / 8 + 1 / 4 * 1 / 4 + 1 / 4 * 3 / 8)
    )
    even = torch.ones(2, 3, dtype=torch.bool)
    assert float(load_balance_loss(SCORES, even)) == pytest.approx(1.0)


def test_load_balance_loss_lowers_what_is_chosen_often():
    scores = torch.zeros(2, 3, requires_grad=True)
    chosen = torch.tensor([[True, False, False], [True, False, False]])
    load_balance_loss(scores, chosen).backward()
    # d/ds_0 of 3 * mean p_0 at p = 1/3 is 3 * p (1 - p) / 2 rows
    assert scores.grad[0].tolist() == pytest.approx([1 / 3, -1 / 6, -1 / 6])
