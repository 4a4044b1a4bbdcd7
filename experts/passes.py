"""What the decode loop computes with: a model and a cache with a slot for each row.

Knows tokens only. What a row computes does not depend on its neighbours, bit for bit where the
matrix products allow it: a prompt is read alone, in pieces of fixed size; decoding has one token
per row, each with its own cache slot. Matrix products of one, two or three rows go through other
kernels than larger ones, so a decoding pass always has at least ``MIN_ROWS`` rows. (Measured on
AVX-512 and AMX: from 2 rows in bfloat16 and from 4 in float32, all sizes up to 16 give equal bits;
a pass of 4 costs as much as one of 1 in bfloat16, 1.2 times as much in float32.) Imports torch:
loaded by engines that decode in process only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from experts.errors import ExpertConfigError
from experts.kv_cache import AttentionMask, SlotCache
from experts.lora import NO_ADAPTER, AdapterSlots, AdapterUse

if TYPE_CHECKING:
    from experts.decoding import Row

__all__ = ["MIN_ROWS", "PREFILL_TOKENS", "Lane", "ModelPasses", "Passes", "next_piece"]

MIN_ROWS = 4

PREFILL_TOKENS = 512
"""Prompt tokens read per step; bounds how long a long prompt holds up rows that are decoding."""

Logits = torch.Tensor
"""Of a row's next token: shape (vocabulary,), float32, on the CPU."""


class Passes(Protocol):
    """What the decode loop asks of models and caches; called from its thread alone.

    What any method raises fails all rows. An error it gives instead fails one.
    """

    def fits(self, row: Row) -> bool:
        """Whether there is a place for a row now; always, once all others have left."""
        ...

    def join(self, row: Row) -> Exception | None:
        """Give a row a place; an error if it can have none, which then need not be freed."""
        ...

    def leave(self, rows: Sequence[Row]) -> None:
        """Free the places of rows."""
        ...

    def read(self, row: Row, budget: int) -> tuple[int, Logits | Exception | None]:
        """Read a row's next prompt tokens.

        Args:
            row: A row that is still reading its prompt.
            budget: How many at most.

        Returns:
            What that takes off the budget, and the logits after the prompt's last token once it is
            read.
        """
        ...

    def decode(self, rows: Sequence[Row]) -> Mapping[Row, Logits | Exception]:
        """Put the last drawn token of each of these rows into the cache; return the logits."""
        ...

    def reset(self) -> None:
        """Forget all rows, after a failure."""
        ...


def next_piece(token_ids: Sequence[int], start: int, budget: int) -> list[int]:
    """The next tokens to read of a prompt; none if the budget does not do.

    Pieces start at multiples of a fixed size, whatever is left of a step's budget: where they end
    may change the last bits.
    """
    piece = list(token_ids[start : start + PREFILL_TOKENS])
    return piece if len(piece) <= budget or budget >= PREFILL_TOKENS else []


class Lane:
    """The rows that go through one model, with a slot of its cache each.

    Args:
        config: The model's.
        max_rows: Rows there may be.
        device: Where the model computes.

    Attributes:
        rows: A row's index is its slot.
        lengths: Number of tokens in each slot.
        cache: Keys and values.
    """

    def __init__(self, config: Any, max_rows: int, device: torch.device) -> None:
        self._config = config
        self._n_slots = max(max_rows, MIN_ROWS)
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self.rows: list[Row] = []
        self.lengths: list[int] = []
        self.cache = SlotCache(self._config, self._n_slots, self._device)

    def join(self, row: Row) -> None:
        """Give a row an empty slot."""
        # Masked numbers count zero times, but zero times NaN is NaN.
        self.cache.clear(len(self.rows))
        self.rows.append(row)
        self.lengths.append(0)

    def leave(self, rows: Sequence[Row]) -> None:
        """Free the slots of rows; the last row moves into each hole."""
        for row in rows:
            slot, last = self.rows.index(row), self.rows.pop()
            length = self.lengths.pop()
            if last is not row:
                self._move(len(self.rows), slot, length)
                self.rows[slot], self.lengths[slot] = last, length
        if rows and not self.rows:
            # Whatever a pass that failed left behind goes too.
            self.reset()
        elif rows:
            self.cache.shrink(max(self.lengths))

    def length(self, row: Row) -> int:
        """Number of a row's tokens in the cache."""
        return self.lengths[self.rows.index(row)]

    def advance(self, row: Row, count: int) -> None:
        """Take note that a pass has put so many tokens into a row's slot."""
        self.lengths[self.rows.index(row)] += count

    def copy(self, source: Row, target: Row, length: int) -> None:
        """Give a row the first ``length`` tokens of another."""
        slot = self.rows.index(target)
        self.cache.copy(self.rows.index(source), slot, length)
        self.lengths[slot] = length

    def for_prefill(self, row: Row, count: int) -> tuple[torch.Tensor, AttentionMask]:
        """Positions and mask of a pass of a row's next ``count`` prompt tokens."""
        slot = self.rows.index(row)
        return self.cache.for_prefill(slot, self.lengths[slot], count)

    def for_decoding(self) -> tuple[torch.Tensor, AttentionMask]:
        """Positions and mask of a pass of one token per row, filled up by ``padded``."""
        return self.cache.for_decoding(self.padded(self.lengths, 0))

    def padded(self, values: Sequence[Any], filler: Any) -> list[Any]:
        """One value per row, filled up to the rows of a decoding pass."""
        return [*values, *[filler] * (MIN_ROWS - len(values))]

    def _move(self, source: int, target: int, length: int) -> None:
        self.cache.copy(source, target, length)


class ModelPasses:
    """Passes of one model, its rows with adapters or none.

    Args:
        model: A transformers causal language model in evaluation mode.
        adapters: The model's.
        max_rows: Rows there may be.
    """

    def __init__(self, model: Any, adapters: AdapterSlots, *, max_rows: int) -> None:
        self._model = model
        self._adapters = adapters
        self._device = torch.device(model.device)
        self._lane = Lane(model.config, max_rows, self._device)

    def fits(self, row: Row) -> bool:
        """Whether the adapters of a row can be in memory now."""
        return self._adapters.fits(row.prompt.adapters)

    def join(self, row: Row) -> ExpertConfigError | None:
        """Give a row a place; an error if its adapters cannot be read any more."""
        try:
            self._adapters.acquire(row.prompt.adapters)
        except ExpertConfigError as exc:
            return exc
        self._lane.join(row)
        return None

    def leave(self, rows: Sequence[Row]) -> None:
        """Free the places of rows."""
        self._lane.leave(rows)
        for row in rows:
            self._adapters.release(row.prompt.adapters)

    def reset(self) -> None:
        """Forget all rows."""
        self._adapters.release_all()
        self._lane.reset()

    def read(self, row: Row, budget: int) -> tuple[int, Logits | None]:
        """Read a row's next prompt tokens; see ``Passes``."""
        lane, prompt = self._lane, row.prompt
        twin = next((r for r in lane.rows if r.prompt is prompt and r.decoding), None)
        if twin is not None and prompt.logits is not None:
            lane.copy(twin, row, len(prompt.token_ids))
            return 0, prompt.logits
        piece = next_piece(prompt.token_ids, lane.length(row), budget)
        if not piece:
            return budget, None
        position_ids, mask = lane.for_prefill(row, len(piece))
        logits = self._forward([piece], position_ids, mask, [prompt.adapters])[0]
        lane.advance(row, len(piece))
        if lane.length(row) < len(prompt.token_ids):
            return len(piece), None
        prompt.logits = logits
        return len(piece), logits

    def decode(self, rows: Sequence[Row]) -> dict[Row, Logits]:
        """Take the last drawn tokens, return the logits; see ``Passes``."""
        lane = self._lane
        # Rows still reading their prompt, and empty slots up to the minimum, take part with a dummy
        # token. It lands where their next real one will overwrite it.
        token_ids = lane.padded([[row.last_id] for row in lane.rows], [0])
        adapters = lane.padded([row.prompt.adapters for row in lane.rows], NO_ADAPTER)
        position_ids, mask = lane.for_decoding()
        logits = self._forward(token_ids, position_ids, mask, adapters)
        for row in rows:
            lane.advance(row, 1)
        return {row: logits[lane.rows.index(row)] for row in rows}

    def _forward(
        self,
        token_ids: list[list[int]],
        position_ids: Any,
        mask: Any,
        adapters: Sequence[AdapterUse],
    ) -> torch.Tensor:
        """Logits after each row's last token; shape (n_rows, vocabulary), float32, on the CPU."""
        self._adapters.set_rows(adapters)
        output = self._model(
            input_ids=torch.tensor(token_ids, device=self._device),
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=self._lane.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits.float().cpu()
