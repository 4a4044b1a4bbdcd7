"""How likely each question's answer is by each method, and what choosing costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from evals.metrics import Estimate, bootstrap_mean
from evals.moerging.methods import Method
from evals.moerging.setting import Setting

__all__ = ["Measured", "Summary", "measure", "summarise", "with_exit"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one method made of all questions with one seed.

    Attributes:
        method: Its name.
        seed: The seed.
        losses: Summed over each answer's tokens, in nats; shape (n_questions,).
        tokens: Of each answer; shape (n_questions,).
        exact: Whether greedy decoding writes just the answer; shape (n_questions,).
        choosing_ms: Milliseconds to choose, a question.
        reading_ms: Milliseconds to read question and answer once that is known, a question.
    """

    method: str
    seed: int
    losses: list[float]
    tokens: list[int]
    exact: list[int]
    choosing_ms: float
    reading_ms: float


def measure(
    setting: Setting, method: Method, seed: int, *, on_question: Callable[[], object] | None = None
) -> Measured:
    """Ask a method all questions, one at a time."""
    choose = method.prepare(setting, seed)
    # What is learnt with the first question of a domain is no part of a question's time.
    for places in setting.by_domain.values():
        choose(places[0])
    losses, tokens, exact = [], [], []
    choosing = reading = 0.0
    for place, pair in enumerate(setting.pairs):
        started = time.perf_counter()
        use = choose(place)
        chosen = time.perf_counter()
        (logits,) = setting.examiner.logits([pair], use)
        reading += time.perf_counter() - chosen
        choosing += chosen - started
        targets = torch.tensor(pair.answer_ids, device=logits.device)
        losses.append(float(functional.cross_entropy(logits, targets, reduction="sum")))
        tokens.append(len(pair.answer_ids))
        exact.append(int((logits.argmax(-1) == targets).all()))
        if on_question:
            on_question()
    each = 1000 / len(setting.pairs)
    return Measured(method.name, seed, losses, tokens, exact, choosing * each, reading * each)


def with_exit(made: Measured, base: Measured, leaves: Sequence[bool]) -> Measured:
    """What a method makes of the questions if the base answers some of them.

    Args:
        made: By the method alone.
        base: By the base.
        leaves: Which questions the base answers, shape (n_questions,).
    """
    pick = zip(leaves, made.losses, base.losses, made.exact, base.exact, strict=True)
    rows = [(b, y) if leaves else (a, x) for leaves, a, b, x, y in pick]
    return replace(made, losses=[loss for loss, _ in rows], exact=[exact for _, exact in rows])


@dataclass(frozen=True, slots=True)
class Summary:
    """A method on the questions that have an adapter, or on those that have none.

    Attributes:
        loss: Per token of the answers, in nats.
        loss_less_base: Its difference to the base's.
        exact: Share of right answers.
        exact_less_base: Its difference to the base's.
        gain: What of the oracle's gain over the base it has, in loss; none out of domain.
    """

    loss: Estimate
    loss_less_base: Estimate
    exact: Estimate
    exact_less_base: Estimate
    gain: float | None


def summarise(
    made: Sequence[Measured],
    base: Measured,
    oracle: Measured | None,
    places: NDArray[np.intp],
) -> Summary:
    """Put together a method's seeds on some questions; intervals are over questions.

    Args:
        made: With each seed.
        base: The base alone.
        oracle: Each question by its domain's adapter; none if there is none.
        places: Positions of the questions.
    """

    def mean(rows: Sequence[Measured], part: str) -> NDArray[np.float64]:
        found = np.array([getattr(one, part) for one in rows], np.float64)[:, places]
        return np.asarray(found.mean(0))

    tokens = mean([base], "tokens").mean()
    losses, alone = mean(made, "losses") / tokens, mean([base], "losses") / tokens
    exact, alone_exact = mean(made, "exact"), mean([base], "exact")
    gain = None
    if oracle is not None:
        best = mean([oracle], "losses") / tokens
        gain = float((alone - losses).mean() / (alone - best).mean())
    return Summary(
        loss=bootstrap_mean(losses),
        loss_less_base=bootstrap_mean(losses - alone),
        exact=bootstrap_mean(exact),
        exact_less_base=bootstrap_mean(exact - alone_exact),
        gain=gain,
    )
