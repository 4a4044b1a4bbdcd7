"""The decode loop: one thread, one model, many rows that come and go at any step.

Each step reads some prompt tokens of new rows, then decodes one token for every row that is past
its prompt. Knows tokens only: no text, no requests, no event loop. Imports torch: loaded by the
transformers engine only.

What a row computes does not depend on its neighbours, bit for bit where the matrix products allow
it: a prompt is read alone, in pieces of fixed size; decoding has one token per row, each with its
own cache slot, generator and constraint. Matrix products of one, two or three rows go through other
kernels than larger ones, so a decoding pass always has at least ``MIN_ROWS`` rows. (Measured on
AVX-512 and AMX: from 2 rows in bfloat16 and from 4 in float32, all sizes up to 16 give equal bits;
a pass of 4 costs as much as one of 1 in bfloat16, 1.2 times as much in float32.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from experts.kv_cache import SlotCache
from experts.lora import AdapterRows

if TYPE_CHECKING:
    from experts.sampling import Drawn, Sampler

__all__ = ["MIN_ROWS", "Decoder", "Prompt", "Row", "Sink"]

T = TypeVar("T")

MIN_ROWS = 4

# Prompt tokens read per step; bounds how long a long prompt holds up rows that are decoding.
_PREFILL_TOKENS = 512


class Sink(Protocol):
    """Where a row's tokens go. Called from the decode thread; must not block."""

    def token(self, drawn: Drawn, finish_reason: str | None) -> bool:
        """Take a token; ``finish_reason`` is set on the last. Return whether to stop here."""
        ...

    def fail(self, error: Exception) -> None:
        """Take note that no more tokens will come."""
        ...


@dataclass(slots=True, eq=False)
class Prompt:
    """A prompt, shared by the rows that answer it.

    Attributes:
        token_ids: Its tokens.
        adapter: Index of the adapter, 0 for none.
        logits: Logits after its last token, once a row has read it.
    """

    token_ids: Sequence[int]
    adapter: int = 0
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
        length: Number of its tokens in the cache.
        drawn: Number of tokens drawn; the last of them is not in the cache yet.
        last_id: The token drawn last.
        order: Its place among all rows ever submitted.
    """

    prompt: Prompt
    sampler: Sampler
    max_tokens: int
    end_ids: frozenset[int]
    sink: Sink
    cancelled: bool = False
    length: int = 0
    drawn: int = 0
    last_id: int = 0
    order: int = 0

    @property
    def decoding(self) -> bool:
        """Whether its prompt has been read."""
        return self.drawn > 0


class Decoder:
    """Decodes rows in a thread of its own.

    Args:
        model: A transformers causal language model in evaluation mode.
        adapter_rows: Told which adapter each row of a pass uses.
        max_rows: Rows decoded together; more wait, first come first served.
        threads: CPU threads of the passes; none leaves torch's default.
    """

    def __init__(
        self, model: Any, adapter_rows: AdapterRows, *, max_rows: int, threads: int | None = None
    ) -> None:
        self._model = model
        self._adapter_rows = adapter_rows
        self._max_rows = max_rows
        self._threads = threads
        self._device = torch.device(model.device)
        self._cache = self._new_cache()
        self._rows: list[Row] = []  # a row's index is its slot in the cache
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._accepted = 0
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
            for row in rows:
                self._accepted += 1
                row.order = self._accepted
                self._waiting.append(row)
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps, when it has the model for itself."""
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
            while self._next_work():
                try:
                    self._step()
                except Exception as exc:  # whatever the model raises, later rows must find a loop
                    self._fail_all(exc)
                    self._cache = self._new_cache()
        self._fail_all(RuntimeError("the engine was closed"))

    def _next_work(self) -> bool:
        """Wait for work; admit rows and run calls. False once closing."""
        with self._wake:
            while not (self._closing or self._rows or self._waiting or self._calls):
                self._wake.wait()
            if self._closing:
                return False
            calls = list(self._calls)
            self._calls.clear()
            self._waiting = deque(row for row in self._waiting if not row.cancelled)
            self._drop([row for row in self._rows if row.cancelled])
            while self._waiting and len(self._rows) < self._max_rows:
                self._rows.append(self._waiting.popleft())
        for function, future in calls:
            _answer(function, future)
        return True

    def _step(self) -> None:
        budget = _PREFILL_TOKENS
        for row in sorted(self._rows, key=lambda row: row.order):
            if not row.decoding and budget > 0:
                budget -= self._prefill(row, budget)
        if any(row.decoding for row in self._rows):
            self._decode()

    def _prefill(self, row: Row, budget: int) -> int:
        """Read the prompt's next tokens, within the budget; return how many."""
        prompt, slot = row.prompt, self._rows.index(row)
        twin = next((r for r in self._rows if r.prompt is prompt and r.decoding), None)
        if twin is not None and prompt.logits is not None:
            self._cache.copy(self._rows.index(twin), slot, len(prompt.token_ids))
            row.length = len(prompt.token_ids)
            self._draw(row, prompt.logits)
            return 0
        # Pieces start at multiples of a fixed size, whatever is left of this step's budget: where
        # they end may change the last bits.
        piece = list(prompt.token_ids[row.length : row.length + _PREFILL_TOKENS])
        if len(piece) > budget and budget < _PREFILL_TOKENS:
            return budget
        position_ids, mask = self._cache.for_prefill(slot, row.length, len(piece))
        logits = self._forward([piece], position_ids, mask, [prompt.adapter])[0]
        row.length += len(piece)
        if row.length == len(prompt.token_ids):
            prompt.logits = logits
            self._draw(row, logits)
        return len(piece)

    def _decode(self) -> None:
        rows = list(self._rows)
        count = max(len(rows), MIN_ROWS)
        # Rows still reading their prompt, and empty slots up to the minimum, take part with a dummy
        # token. It lands where their next real one will overwrite it.
        padding = [0] * (count - len(rows))
        lengths = [row.length for row in rows] + padding
        token_ids = [[row.last_id] for row in rows] + [[0] for _ in padding]
        position_ids, mask = self._cache.for_decoding(lengths)
        adapters = [row.prompt.adapter for row in rows] + padding
        logits = self._forward(token_ids, position_ids, mask, adapters)
        decoded = [pair for pair in zip(rows, logits, strict=False) if pair[0].decoding]
        for row, _ in decoded:
            # All of them before the first draw: a row that leaves moves another one's cache.
            row.length += 1
        for row, row_logits in decoded:
            self._draw(row, row_logits)

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
        """Free the slots of rows; the last row moves into each hole."""
        for row in rows:
            slot, last = self._rows.index(row), self._rows.pop()
            if last is not row:
                self._cache.copy(len(self._rows), slot, last.length)
                self._rows[slot] = last
        self._cache.shrink(max((row.length for row in self._rows), default=1))

    def _forward(
        self, token_ids: list[list[int]], position_ids: Any, mask: Any, adapters: list[int]
    ) -> torch.Tensor:
        """Logits after each row's last token; shape (n_rows, vocabulary), float32, on the CPU."""
        self._adapter_rows.indices = (
            torch.tensor(adapters, device=self._device) if any(adapters) else None
        )
        output = self._model(
            input_ids=torch.tensor(token_ids, device=self._device),
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits.float().cpu()

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

    def _new_cache(self) -> SlotCache:
        return SlotCache(self._model.config, max(self._max_rows, MIN_ROWS), self._device)


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as exc:  # belongs to the caller, who waits for it in another thread
        future.set_exception(exc)
