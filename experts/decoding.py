"""The decode loop: one thread, many rows that come and go at any step.

Each step reads some prompt tokens of new rows, then decodes one token for every row that is past
its prompt; ``experts.passes`` computes them. Knows tokens only: no model, no text, no requests, no
event loop. Imports torch: loaded by engines that decode in process only.

Each row has its own generator and constraint, so what it draws depends on its logits alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from experts.lora import NO_ADAPTER, AdapterUse
from experts.passes import PREFILL_TOKENS, Passes

if TYPE_CHECKING:
    from experts.sampling import Drawn, Sampler

__all__ = ["Decoder", "Prompt", "Row", "Sink"]

T = TypeVar("T")


class Sink(Protocol):
    """Where a row's tokens go. Called from the decode thread; must not block."""

    def token(self, drawn: Drawn, finish_reason: str | None) -> bool:
        """Take a token; ``finish_reason`` is set on the last. Return whether to stop here."""
        ...

    def listens_to(self, peers: Mapping[str, float]) -> None:
        """Take note of whose states the row reads from its next token on, with their gates."""
        ...

    def fail(self, error: Exception) -> None:
        """Take note that no more tokens will come."""
        ...


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt, shared by the rows that answer it.

    Attributes:
        token_ids: Its tokens.
        adapters: How adapters change what the model computes.
        logits: Logits after its last token, once a row has read it.
    """

    token_ids: Sequence[int]
    adapters: AdapterUse = NO_ADAPTER
    logits: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One answer in the making.

    Attributes:
        prompt: What it answers.
        sampler: Draws its tokens.
        max_tokens: Longest answer.
        end_ids: Tokens that end it.
        sink: Where its tokens go.
        cancelled: Set from any thread to drop it before the next step.
        drawn: Number of tokens drawn; the last of them is not in the cache yet.
        last_id: The token drawn last.
    """

    prompt: Prompt
    sampler: Sampler
    max_tokens: int
    end_ids: frozenset[int]
    sink: Sink
    cancelled: bool = False
    drawn: int = 0
    last_id: int = 0

    @property
    def decoding(self) -> bool:
        """Whether its prompt has been read."""
        return self.drawn > 0


class Decoder:
    """Decodes rows in a thread of its own.

    Args:
        passes: Compute logits.
        max_rows: Rows decoded together; more wait, first come first served.
        threads: CPU threads of the passes; none leaves torch's default.
    """

    def __init__(self, passes: Passes, *, max_rows: int, threads: int | None = None) -> None:
        self._passes = passes
        self._max_rows = max_rows
        self._threads = threads
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="collegium-decode", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether rows submitted now would be decoded."""
        return self._thread.is_alive() and not self._closing

    @property
    def load(self) -> int:
        """Rows decoding or waiting."""
        return len(self._rows) + len(self._waiting)

    def submit(self, rows: Sequence[Row]) -> None:
        """Queue rows. They join at the next step with a free slot."""
        with self._wake:
            if not self.alive:
                raise RuntimeError("the decoder is closed")
            self._waiting.extend(rows)
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps, when it has the models for itself."""
        future: Future[T] = Future()
        with self._wake:
            if not self.alive:
                raise RuntimeError("the decoder is closed")
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Stop after the running step; rows on their way fail. Blocks until then. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        if self._threads:
            # OpenMP keeps the number per calling thread.
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while self._wait():
                try:
                    self._admit()
                    self._step()
                except Exception as exc:  # whatever a pass raises, later rows must find a loop
                    self._fail_all(exc)
                    self._passes.reset()
        self._fail_all(RuntimeError("the engine was closed"))

    def _wait(self) -> bool:
        """Wait for work. False once closing."""
        with self._wake:
            while not (self._closing or self._rows or self._waiting or self._calls):
                self._wake.wait()
            return not self._closing

    def _admit(self) -> None:
        """Have cancelled rows leave and waiting ones join; run calls."""
        with self._wake:
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
            self._drop([row for row in self._rows if row.cancelled])
            while self._waiting and len(self._rows) < self._max_rows:
                # First come first served: who waits for memory is not overtaken.
                if not self._passes.fits(self._waiting[0]):
                    break
                row = self._waiting.popleft()
                self._rows.append(row)
                failure = self._passes.join(row)
                if failure is not None:
                    self._rows.remove(row)
                    row.sink.fail(failure)
            calls = list(self._calls)
            self._calls.clear()
        for function, future in calls:
            _answer(function, future)

    def _step(self) -> None:
        budget = PREFILL_TOKENS
        for row in list(self._rows):
            while budget > 0 and not (row.decoding or row.cancelled):
                spent, found = self._passes.read(row, budget)
                budget -= spent
                if found is not None:
                    self._take(row, found)
        decoding = [row for row in self._rows if row.decoding]
        if decoding:
            for row, found in self._passes.decode(decoding).items():
                self._take(row, found)

    def _take(self, row: Row, found: torch.Tensor | Exception) -> None:
        """Draw a row's next token, or end it where there is none."""
        if isinstance(found, Exception):
            row.sink.fail(found)
            row.cancelled = True
            self._drop([row])
        else:
            self._draw(row, found)

    def _draw(self, row: Row, logits: torch.Tensor) -> None:
        """Draw a row's next token and hand it out; the row leaves if that was its last."""
        finish_reason = None
        try:
            drawn = row.sampler.draw(logits)
            row.drawn += 1
            row.last_id = drawn.token_id
            if drawn.token_id in row.end_ids or row.sampler.finished:
                finish_reason = "stop"
            elif row.drawn >= row.max_tokens:
                finish_reason = "length"
            stop = row.sink.token(drawn, finish_reason)
        except Exception as exc:  # one row's constraint or client must not end the others
            row.sink.fail(exc)
            stop = True
        if stop or finish_reason:
            row.cancelled = True
            self._drop([row])

    def _drop(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._rows.remove(row)
        self._passes.leave(rows)

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            rows = [*self._rows, *self._waiting] if self._closing else list(self._rows)
            self._rows.clear()
            if self._closing:
                self._waiting.clear()
            calls = list(self._calls) if self._closing else []
        for row in rows:
            row.sink.fail(error)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as exc:  # belongs to the caller, who waits for it in another thread
        future.set_exception(exc)
