from __future__ import annotations

import math

import pytest
import torch

from experts.sampling import Sampler, SamplingOptions

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def _draws(count, **options):
    sampler = Sampler(SamplingOptions(**options))
    return [sampler.draw(LOGITS).token_id for _ in range(count)]


def test_temperature_zero_takes_the_likeliest():
    assert _draws(5, temperature=0) == [0] * 5


def test_draws_follow_the_probabilities():
    draws = _draws(4000, seed=1)
    expected = torch.softmax(LOGITS, -1).tolist()
    assert [draws.count(i) / 4000 for i in range(4)] == pytest.approx(expected, abs=0.03)


def test_nucleus_leaves_unlikely_tokens_out():
    assert set(_draws(500, top_p=0.7, seed=1)) == {0, 1}
    assert set(_draws(50, top_p=0.01, seed=1)) == {0}


def test_tokens_after_the_likeliest_few_are_left_out():
    assert set(_draws(500, top_k=2, seed=1)) == {0, 1}
    assert set(_draws(50, top_k=1, seed=1)) == {0}
    assert _draws(50, top_k=9, seed=1) == _draws(50, seed=1)
    # Of the two that are left, the first has a probability of 0.73.
    assert set(_draws(50, top_k=2, top_p=0.7, seed=1)) == {0}


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(temperature):
    sampler = Sampler(SamplingOptions(temperature=temperature))
    with pytest.raises((ValueError, RuntimeError)):
        sampler.draw(torch.tensor([1.0, float("nan"), 2.0]))


def test_seed_fixes_the_draws():
    assert _draws(30, seed=3) == _draws(30, seed=3)
    assert _draws(30, seed=3) != _draws(30, seed=4)
    assert _draws(30) != _draws(30)


def test_penalties_push_what_occurred_back():
    assert _draws(4, temperature=0, presence_penalty=1.5) == [0, 1, 0, 0]
    assert _draws(4, temperature=0, frequency_penalty=1.5) == [0, 1, 0, 2]


def test_logit_bias_bans_and_forces():
    assert _draws(1, temperature=0, logit_bias={0: -100}) == [1]
    assert _draws(1, temperature=0, logit_bias={3: 100}) == [3]


def test_logprobs_are_the_models_own():
    sampler = Sampler(SamplingOptions(temperature=0.1, seed=1, top_logprobs=2, logit_bias={3: 100}))
    drawn = sampler.draw(LOGITS)
    total = math.log(sum(math.exp(value) for value in LOGITS.tolist()))
    assert drawn.token_id == 3
    assert drawn.logprob == pytest.approx(-1 - total)
    assert [entry.token_id for entry in drawn.top] == [0, 1]


def test_logits_are_not_changed():
    before = LOGITS.clone()
    _draws(3, presence_penalty=2.0, logit_bias={1: 5})
    assert torch.equal(before, LOGITS)
