"""How likely each question's answer is by each method, and what choosing costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from evals.metrics import Estimate, Resamples, bootstrap_mean
from evals.moerging.methods import Method
from evals.moerging.setting import Setting
from experts.finetune_data import TokenPair
from experts.library.examiner import Examiner, Reader
from routers.encoders import forget_vectors

__all__ = ["Journal", "Measured", "Summary", "measure", "summarise", "with_exit"]

COMPARE_EVERY = 8


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
        relative_time: Of reading, to the base's without adapters on the same questions, a part of
            them, at the same time.
    """

    method: str
    seed: int
    losses: list[float]
    tokens: list[int]
    exact: list[int]
    choosing_ms: float
    reading_ms: float
    relative_time: float


def measure(
    setting: Setting, method: Method, seed: int, *, on_question: Callable[[], object] | None = None
) -> Measured:
    """Ask a method all questions, one at a time."""
    examiner, choose = method.prepare(setting, seed)
    # What is learnt with the first question of a domain is no part of a question's time.
    for places in setting.by_domain.values():
        choose(places[0])
    losses, tokens, exact = [], [], []
    choosing = reading = compared = alone = 0.0
    pairs = examiner.read([question.pair for question in setting.questions])
    # Nor is what a model does once.
    for reader, use in ((examiner, choose(0)), (setting.plain, None)):
        _read(reader, pairs[0], use)
    # A text's vector may be known from an earlier method; whoever asks anew has to wait for it.
    forget_vectors()
    for place, pair in enumerate(pairs):
        started = time.perf_counter()
        use = choose(place)
        chosen = time.perf_counter()
        logits = _read(examiner, pair, use)
        read = time.perf_counter()
        choosing += chosen - started
        reading += read - chosen
        if place % COMPARE_EVERY == 0:
            # Machines drift, so the base is timed along with every method.
            _read(setting.plain, pair, None)
            alone += time.perf_counter() - read
            compared += read - chosen
        targets = torch.tensor(pair.answer_ids)
        losses.append(float(functional.cross_entropy(logits, targets, reduction="sum")))
        tokens.append(len(pair.answer_ids))
        exact.append(int((logits.argmax(-1) == targets).all()))
        if on_question:
            on_question()
    each = 1000 / len(pairs)
    return Measured(
        method.name, seed, losses, tokens, exact, choosing * each, reading * each, compared / alone
    )


def _read(examiner: Examiner, pair: TokenPair, use: Reader) -> torch.Tensor:
    """Logits of an answer, on the CPU: what is timed is then done, on whatever device."""
    (logits,) = examiner.logits([pair], use)
    return logits.cpu()


class Journal:
    """A file of measurements, each a line of JSON with a hash of what it depends on.

    Args:
        file: The file; need not exist yet.
        setting: What is measured in now.
    """

    def __init__(self, file: Path, setting: Setting) -> None:
        self._file = file
        self._setting = setting
        # Checkpoints are hashed too, which takes seconds.
        self._of = cache(self._fingerprint)

    def read(self, method: Method) -> list[Measured]:
        """What was measured of a method in this setting; of others there is nothing to see."""
        if not self._file.exists():
            return []
        found = []
        for line in self._file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["method"] == method.name and row.pop("fingerprint") == self._of(
                method, row["seed"]
            ):
                found.append(Measured(**row))
        return found

    def add(self, method: Method, made: Measured) -> None:
        """Write a measurement down."""
        row = {"fingerprint": self._of(method, made.seed), **asdict(made)}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _fingerprint(self, method: Method, seed: int) -> str:
        if seed not in method.seeds(self._setting, seed + 1):
            return ""
        return self._setting.fingerprint(method.needs, seed)


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
    gain: Estimate | None


def summarise(
    made: Sequence[Measured],
    base: Measured,
    oracle: Measured | None,
    places: NDArray[np.intp],
    resamples: Resamples,
) -> Summary:
    """Put together a method's seeds on some questions; intervals are over questions.

    Args:
        made: With each seed.
        base: The base alone.
        oracle: Each question by its domain's adapter; none if there is none.
        places: Positions of the questions.
        resamples: Of as many questions.
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
        gains = np.stack([alone - losses, alone - best], axis=1)
        drawn, most = resamples.totals(gains).T
        value = float(gains[:, 0].sum() / gains[:, 1].sum())
        gain = resamples.estimate(value, drawn / most, len(places))
    return Summary(
        loss=bootstrap_mean(losses),
        loss_less_base=bootstrap_mean(losses - alone),
        exact=bootstrap_mean(exact),
        exact_less_base=bootstrap_mean(exact - alone_exact),
        gain=gain,
    )
