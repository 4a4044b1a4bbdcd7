from __future__ import annotations

import numpy as np

from evals.elimination import BATCH, survivors


def test_nobody_is_dropped_before_enough_prompts():
    scores = np.array([[1.0, 0.0]] * (BATCH - 1))
    assert survivors(scores, 100).all()


def test_who_is_always_worse_is_dropped():
    scores = np.array([[1.0, 0.0, 1.0]] * 20)
    assert survivors(scores, 100).tolist() == [True, False, True]


def test_close_ones_stay_until_the_end():
    rng = np.random.default_rng(0)
    scores = (rng.random((60, 2)) < [0.5, 0.45]).astype(float)
    assert survivors(scores, 1000).all()
    # When every prompt has been asked there is nothing left to be unsure of.
    means = scores.mean(axis=0)
    assert survivors(scores, 60).tolist() == (means == means.max()).tolist()


def test_failed_answers_are_left_out_of_the_comparison():
    scores = np.array([[1.0, np.nan]] * 30)
    assert survivors(scores, 100).all()


def test_the_best_is_seldom_dropped():
    dropped = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        rows = (rng.random((200, 4)) < [0.7, 0.6, 0.6, 0.5]).astype(float)
        best = rows.mean(axis=0).argmax()
        dropped += any(not survivors(rows[:end], 200)[best] for end in range(BATCH, 200, BATCH))
    assert dropped <= 10  # 5 % of 200 are allowed
