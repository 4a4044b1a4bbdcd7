"""Keys and values of the rows being decoded, one slot per row, each row at its own length.

transformers' own caches keep one length for the whole batch, so rows that join late need left
padding, and what a row computes then depends on its neighbours' lengths. Here every row starts at
position 0 of its slot and writes at its own position; what lies beyond is masked. Joining, leaving
and copying a row touch no other row. Imports torch: loaded by engines that decode in process only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from experts.errors import ExpertConfigError

__all__ = ["AttentionMask", "SlotCache"]

# Growing by blocks keeps reallocations rare; the unused part is masked, not computed twice.
_BLOCK = 128

AttentionMask = torch.Tensor | dict[str, torch.Tensor]


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, shape (n_slots, n_heads, capacity, head_size)."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        slots, capacity = self._cache.n_slots, self._cache.capacity
        self.keys = key_states.new_zeros(
            (slots, key_states.shape[1], capacity, key_states.shape[3])
        )
        self.values = value_states.new_zeros(
            (slots, value_states.shape[1], capacity, value_states.shape[3])
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.buffers()
        cache = self._cache
        if cache.start is None:
            # Decoding: one token for each of the first rows, each at its own position.
            keys[cache.rows, :, cache.positions] = key_states[:, :, 0]
            values[cache.rows, :, cache.positions] = value_states[:, :, 0]
            count = key_states.shape[0]
            return keys[:count, :, : cache.span], values[:count, :, : cache.span]
        slot = slice(cache.slot, cache.slot + 1)
        keys[slot, :, cache.start : cache.span] = key_states
        values[slot, :, cache.start : cache.span] = value_states
        return keys[slot, :, : cache.span], values[slot, :, : cache.span]

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.span, 0

    def get_seq_length(self) -> int:
        return self._cache.span

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A transformers cache for rows of different length.

    Before each forward pass call :meth:`for_prefill` or :meth:`for_decoding`; both return the
    position ids and the attention mask that belong to the pass.

    Attributes:
        n_slots: Number of rows it has room for.
        capacity: Tokens each slot has room for; grows by itself.
    """

    def __init__(self, config: PretrainedConfig, n_slots: int, device: torch.device) -> None:
        text_config = config.get_text_config()
        self._windows = _windows(text_config)
        self.n_slots = n_slots
        self.capacity = 0
        self.device = device
        self.slot = 0
        self.start: int | None = None
        self.span = 0
        self.rows = torch.empty(0, dtype=torch.long, device=device)
        self.positions = self.rows
        self._slots = [_SlotLayer(self) for _ in range(text_config.num_hidden_layers)]
        super().__init__(layers=list(self._slots))

    def for_prefill(self, slot: int, start: int, count: int) -> tuple[torch.Tensor, AttentionMask]:
        """Prepare a pass of ``count`` prompt tokens of one row, from position ``start`` on."""
        self.slot, self.start, self.span = slot, start, start + count
        self._reserve(self.span)
        positions = torch.arange(start, self.span, device=self.device)[None]
        return positions, self._mask(positions)

    def for_decoding(self, lengths: list[int]) -> tuple[torch.Tensor, AttentionMask]:
        """Prepare a pass of one token for each of the first rows, which hold ``lengths`` tokens."""
        self.start = None
        self._reserve(max(lengths) + 1)
        # Whole blocks: the attention kernel's order of summation then rarely depends on neighbours.
        self.span = self.capacity
        self.rows = torch.arange(len(lengths), device=self.device)
        self.positions = torch.tensor(lengths, device=self.device)
        positions = self.positions[:, None]
        return positions, self._mask(positions)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot to another, which forgets the rest."""
        for layer in self._slots:
            if layer.is_initialized:
                for buffer in layer.buffers():
                    buffer[target, :, :length] = buffer[source, :, :length]
                    buffer[target, :, length:] = 0

    def clear(self, slot: int) -> None:
        """Set a slot to zero."""
        for layer in self._slots:
            if layer.is_initialized:
                for buffer in layer.buffers():
                    buffer[slot] = 0

    def shrink(self, length: int) -> None:
        """Give back the memory beyond ``length`` tokens, if that is more than half of it."""
        wanted = -(-length // _BLOCK) * _BLOCK
        if wanted * 2 < self.capacity:
            self._resize(wanted)

    def _reserve(self, length: int) -> None:
        if length > self.capacity:
            self._resize(-(-length // _BLOCK) * _BLOCK)

    def _resize(self, capacity: int) -> None:
        kept = min(capacity, self.capacity)
        self.capacity = capacity
        for layer in self._slots:
            if not layer.is_initialized:
                continue
            old = layer.buffers()
            layer.lazy_initialization(*old)
            for target, source in zip(layer.buffers(), old, strict=True):
                target[:, :, :kept] = source[:, :, :kept]

    def _mask(self, positions: torch.Tensor) -> AttentionMask:
        columns = torch.arange(self.span, device=self.device)
        own = positions[:, None, :, None]
        masks = {
            kind: (columns <= own)
            if window is None
            else (columns <= own) & (columns > own - window)
            for kind, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _windows(config: PretrainedConfig) -> dict[str, int | None]:
    """The attention window of each kind of layer; none sees everything before it."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {"sliding_attention" if window else "full_attention": window}
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise ExpertConfigError(
            f"the transformers engine cannot host {config.model_type!r}: layers of kind "
            f"{sorted(unknown)} keep no keys and values per token; use engine vllm"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
